"""Metrics of several runs as series, each with its change since the previous run and since the first run.

A change is computed only if both values were measured under the same conditions: perplexity on the same tokens; KL and
top-1 on the same tokens and against the same fine-tune; exact match on the same prompts; speed on the same machine
with the same settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from qat_edge.evaluate.results import Measurement, Report, Spread
from qat_edge.report.collect import RunResults, finite
from qat_edge.report.formatting import label
from qat_edge.report.run_details import flatten, versions
from qat_edge.report.tables import COLUMNS, Column
from qat_edge.report.verdict import within_chance

FORMAT = 1  # of history.json
# Sections of config.yaml whose options may explain a changed metric.
SECTIONS = ("finetune", "quantize", "export", "validate")
# Properties that identify a machine; others, such as free memory, change from run to run.
MACHINE = ("machine", "cpu_model", "cores")


class Observation(NamedTuple):
    """One model in the report of one run."""

    report: Report
    row: Measurement


@dataclass(frozen=True)
class RunEntry:
    """One run of the series, named after its folder."""

    name: str
    results: RunResults


@dataclass(frozen=True)
class Metric:
    """A metric that is followed over the runs.

    Attributes:
        column: Name, unit and format.
        same: Names of the `CONDITIONS` that must be equal in both runs for a change to mean anything.
    """

    column: Column[Measurement]
    same: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the metric."""
        return self.column.name

    @property
    def change_unit(self) -> str:
        """Unit of a change: "ratio" (0.1 is 10% more), "points" (difference of shares) or "nats"."""
        # A ratio of shares would be misleading near 0 and 1, and KL may be 0 in the earlier run.
        return {"%": "points", "nats": "nats"}.get(self.column.unit, "ratio")


@dataclass(frozen=True)
class Change:
    """Change of a metric since an earlier run.

    Attributes:
        since: Index of the earlier run.
        amount: The change in `Metric.change_unit`; None if the two runs are not comparable.
        reasons: Why they are not comparable.
        clear: Whether the change exceeds the spread of repeats, the sampling error of the prompts or the last digit.
        better: Whether the change is an improvement.
    """

    since: int
    amount: float | None
    reasons: tuple[str, ...] = ()
    clear: bool = False
    better: bool = False


@dataclass(frozen=True)
class Point:
    """A metric in one run.

    Attributes:
        value: The value; None if it was not measured.
        spread: Range of repeated measurements, if there were any.
        before: Change since the previous run that has the metric; None if there is none.
        first: Change since the first run that has the metric; None if there is none.
    """

    value: float | None
    spread: Spread | None = None
    before: Change | None = None
    first: Change | None = None


@dataclass(frozen=True)
class Series:
    """One model in one runtime on one device.

    Attributes:
        device: Name of the device.
        model: The model as it was first measured.
        metrics: One point per run, by the name of the metric.
    """

    device: str
    model: Measurement
    metrics: dict[str, list[Point]]


@dataclass(frozen=True)
class Difference:
    """A setting, version or machine that differs between a run and the previous one."""

    name: str
    before: str
    after: str


class Incomparable(NamedTuple):
    """Two runs whose metrics cannot be compared, by their indices, for one reason."""

    earlier: int
    later: int
    reason: str
    metrics: list[str]


@dataclass(frozen=True)
class History:
    """Several runs in order.

    Attributes:
        entries: The runs.
        series: Metrics of every model.
        differences: One list for each run after the first.
    """

    entries: list[RunEntry]
    series: list[Series]
    differences: list[list[Difference]]

    @property
    def devices(self) -> list[str]:
        """Names of all devices, in the order in which they were first measured."""
        return list(dict.fromkeys(one.device for one in self.series))

    def incomparable(self, device: str) -> list[Incomparable]:
        """Return the consecutive runs whose metrics on a device are not comparable."""
        # Metrics by pair of runs and reason, so that each reason is reported once.
        found: dict[tuple[int, int, str], list[str]] = {}
        for one in self.series:
            if one.device != device:
                continue
            for name, points in one.metrics.items():
                for index, point in enumerate(points):
                    if point.before is None:
                        continue
                    for reason in point.before.reasons:
                        names = found.setdefault((point.before.since, index, reason), [])
                        if name not in names:
                            names.append(name)

        # By later run, then by reason.
        in_order = sorted(found.items(), key=lambda item: item[0][1:])
        return [Incomparable(*key, names) for key, names in in_order]

    def document(self) -> dict[str, Any]:
        """Return the contents of history.json; numbers that are not finite become null."""
        runs = [
            {"name": entry.name, "model": entry.results.model, "validated": [r.created for r in entry.results.reports]}
            for entry in self.entries
        ]
        series = [
            {
                "device": one.device,
                "model": one.model.name,
                "target": one.model.target,
                # The key "figures" and the names in it are part of the file format.
                "figures": {name: [asdict(point) for point in points] for name, points in one.metrics.items()},
            }
            for one in self.series
        ]
        differences = [[asdict(one) for one in found] for found in self.differences]
        document: dict[str, Any] = finite(
            {"format": FORMAT, "runs": runs, "series": series, "differences": [[], *differences]}
        )
        return document


class Condition(NamedTuple):
    """A condition of a measurement that must be equal for two values to be comparable.

    Attributes:
        reason: The explanation if it differs.
        recorded: Returns its value, None if the report does not have it.
    """

    reason: str
    recorded: Callable[[Report, Measurement], Any]


CONDITIONS: Mapping[str, Condition] = {
    "tokens": Condition("different evaluation tokens", lambda report, row: report.identities.get("tokens")),
    "prompts": Condition("different prompts", lambda report, row: report.identities.get("prompts")),
    "reference": Condition("different FP32 fine-tunes", lambda report, row: report.identities.get("reference")),
    "machine": Condition(
        "different machines of the same name", lambda report, row: [report.machine.get(key) for key in MACHINE]
    ),
    "timing": Condition(
        "different settings of the speed measurement",
        lambda report, row: row.speed and (row.speed.threads, row.speed.prompt_tokens, row.speed.new_tokens),
    ),
}
# The size of an artifact depends on nothing but the artifact.
_CONDITIONS_OF = {
    "Size": (),
    "Perplexity": ("tokens",),
    "KL": ("tokens", "reference"),
    "Top-1": ("tokens", "reference"),
    "Exact match": ("prompts",),
    "Decode": ("machine", "timing"),
    "Prefill": ("machine", "timing"),
}
METRICS = [Metric(column, _CONDITIONS_OF[column.name]) for column in COLUMNS if column.name in _CONDITIONS_OF]


def history(entries: Sequence[RunEntry]) -> History:
    """Return the metrics of the runs as series. entries: the runs, the oldest first."""
    # Observations by device, model and target: one per run, None where a run lacks the model.
    rows: dict[tuple[str, str, str], list[Observation | None]] = {}
    for index, entry in enumerate(entries):
        for report in entry.results.reports:
            for row in report.measured:
                observations = rows.setdefault((report.device, row.name, row.target), [None] * len(entries))
                observations[index] = Observation(report, row)

    # All series of a device are next to each other.
    order = {device: index for index, device in enumerate(dict.fromkeys(device for device, _, _ in rows))}
    series = []
    for (device, _, _), observations in sorted(rows.items(), key=lambda item: order[item[0][0]]):
        model = next(one.row for one in observations if one is not None)
        series.append(Series(device, model, {metric.name: points(metric, observations) for metric in METRICS}))

    changed = [differences(one.results, other.results) for one, other in pairwise(entries)]
    return History(list(entries), series, changed)


def points(metric: Metric, observations: Sequence[Observation | None]) -> list[Point]:
    """Return a metric over the runs; a run that lacks it is skipped as the previous run."""
    found: list[Point] = []
    measured: list[Observation] = []
    indices: list[int] = []
    for index, now in enumerate(observations):
        value = None if now is None else metric.column.value(now.row)
        # A perplexity is NaN where the runtime returns no logits.
        if now is None or value is None or math.isnan(value):
            found.append(Point(None))
            continue
        # Compare with the previous and with the first run that has the metric.
        before = first = None
        if measured:
            before = _change(metric, indices[-1], measured[-1], now)
            first = _change(metric, indices[0], measured[0], now)
        found.append(Point(value, metric.column.spread(now.row), before, first))
        measured.append(now)
        indices.append(index)
    return found


def _change(metric: Metric, since: int, earlier: Observation, now: Observation) -> Change:
    """Return the change since an earlier run. since: index of that run."""
    reasons = list(filter(None, (_difference_reason(name, earlier, now) for name in metric.same)))
    before, after = metric.column.value(earlier.row), metric.column.value(now.row)
    # `points` skips runs without the metric.
    assert before is not None and after is not None
    if not math.isfinite(before) or not math.isfinite(after) or (metric.change_unit == "ratio" and before == 0):
        reasons.append("not finite")
    if reasons:
        return Change(since, None, tuple(reasons))

    amount = after / before - 1 if metric.change_unit == "ratio" else after - before
    clear = _is_clear(metric.column, earlier.row, now.row)
    return Change(since, amount, (), clear, amount * metric.column.sign > 0)


def _difference_reason(name: str, one: Observation, other: Observation) -> str:
    """Return why a condition makes two reports incomparable; empty if it does not."""
    condition = CONDITIONS[name]
    before, after = condition.recorded(*one), condition.recorded(*other)
    # Reports of earlier versions do not record every condition: the values may be comparable, but need not be.
    if before is None or after is None:
        return f"possibly {condition.reason} (not recorded: validate again)"
    return condition.reason if before != after else ""


def _is_clear(column: Column[Measurement], one: Measurement, other: Measurement) -> bool:
    """Return whether a change exceeds the measurement's uncertainty."""
    before, after = column.spread(one), column.spread(other)
    # Repeated measurements differ clearly if their ranges do not overlap.
    if before is not None and after is not None:
        return before.greatest < after.least or after.greatest < before.least
    # A share of few prompts has a sampling error.
    if column.name == "Exact match":
        return not within_chance(one, other)
    # Everything else is deterministic up to the last digit shown.
    return column.write(column.value(one) or 0.0) != column.write(column.value(other) or 0.0)


def differences(one: RunResults, other: RunResults) -> list[Difference]:
    """Return the options, versions, data and machines of a run that differ from those of the previous run."""
    before, after = _settings(one), _settings(other)
    names = dict.fromkeys([*before, *after])
    return [
        Difference(name, before.get(name, "not recorded"), after.get(name, "not recorded"))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _settings(results: RunResults) -> dict[str, str]:
    """Return everything recorded that could explain a changed metric, by name."""
    frozen = results.quantized
    known: dict[str, Any] = {section: results.options(section) for section in SECTIONS}
    # The identity, not the path: the same model may be stored elsewhere.
    known["model"] = (frozen.get("model") or {}).get("identity") or {}
    known["training data"] = {"sha256": (frozen.get("data") or {}).get("sha256")}
    known["version"] = versions(frozen)
    for report in results.reports:
        known[report.device] = {
            # Free memory and disk space differ in every run.
            **{key: value for key, value in report.machine.items() if not key.startswith("free_")},
            "runtime": {label(row): row.runtime for row in report.measured},
        }
    return dict(flatten(known))
