"""Several runs as a series: every figure of every model, with its change to the run before and to the first.

A change is given only where both figures were measured on the same: perplexity on the same tokens, KL and top-1 also
against the same fine-tune, exact match on the same prompts, speed on the same machine and timed alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from qat_edge.evaluate.results import Measured, Report, Spread
from qat_edge.report.collect import Story, finite
from qat_edge.report.figures import label
from qat_edge.report.run_details import flatten, versions
from qat_edge.report.tables import COLUMNS, Column
from qat_edge.report.verdict import within_chance

FORMAT = 1
SECTIONS = ("finetune", "quantize", "export", "validate")
MACHINE = ("machine", "cpu_model", "cores")
Seen = tuple[Report, Measured]  # one model in one run's report


@dataclass(frozen=True)
class Entry:
    """One run of the series, by its folder's name."""

    name: str
    story: Story


@dataclass(frozen=True)
class Figure:
    """same: names of `CONDITIONS` that must hold for a change to mean something."""

    column: Column[Measured]
    same: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.column.name

    @property
    def kind(self) -> str:
        """How a change is counted: "ratio" (0.1 is 10% more), "points" (of a share), "nats"."""
        return {"%": "points", "nats": "nats"}.get(self.column.unit, "ratio")


@dataclass(frozen=True)
class Change:
    """From the run at index `since`. amount: see `Figure.kind`; None where not comparable, as `reasons` say.

    clear: more than the repeats' spread, the chance of so few prompts, or the last digit shown. better: by its sign.
    """

    since: int
    amount: float | None
    reasons: tuple[str, ...] = ()
    clear: bool = False
    better: bool = False


@dataclass(frozen=True)
class Point:
    """A figure in one run; value None where it was not measured. before, first: None where there is none earlier."""

    value: float | None
    spread: Spread | None = None
    before: Change | None = None
    first: Change | None = None


@dataclass(frozen=True)
class Series:
    """One model in one runtime on one device. figures: by name, a point a run."""

    device: str
    model: Measured  # as it was first seen
    figures: dict[str, list[Point]]


@dataclass(frozen=True)
class Difference:
    """What is not the same in a run and the one before."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class History:
    """differences: one list for each run after the first."""

    entries: list[Entry]
    series: list[Series]
    differences: list[list[Difference]]

    @property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(one.device for one in self.series))

    def apart(self, device: str) -> list[tuple[int, int, str, list[str]]]:
        """Neighbours not comparable on a device: indices of both, the reason, and of which figures it is true."""
        found: dict[tuple[int, int, str], list[str]] = {}
        for name, points in ((n, p) for one in self.series if one.device == device for n, p in one.figures.items()):
            for index, point in enumerate(points):
                for since, reason in [(point.before.since, r) for r in point.before.reasons] if point.before else []:
                    names = found.setdefault((since, index, reason), [])
                    names += [] if name in names else [name]
        return [(*key, names) for key, names in sorted(found.items(), key=lambda item: item[0][1:])]

    def document(self) -> dict[str, Any]:
        """The same as plain values for history.json; a figure that is not finite becomes null."""
        runs = [
            {"name": entry.name, "model": entry.story.model, "validated": [r.created for r in entry.story.reports]}
            for entry in self.entries
        ]
        series = [
            {
                "device": one.device,
                "model": one.model.name,
                "target": one.model.target,
                "figures": {name: [asdict(point) for point in points] for name, points in one.figures.items()},
            }
            for one in self.series
        ]
        differences = [[asdict(one) for one in found] for found in self.differences]
        plain: dict[str, Any] = finite(
            {"format": FORMAT, "runs": runs, "series": series, "differences": [[], *differences]}
        )
        return plain


# What must be the same, what is said where it is not, and where it is recorded; None where it is not.
CONDITIONS: Mapping[str, tuple[str, Callable[[Report, Measured], Any]]] = {
    "tokens": ("other evaluation tokens", lambda report, row: report.identities.get("tokens")),
    "prompts": ("other prompts", lambda report, row: report.identities.get("prompts")),
    "reference": ("another FP32 fine-tune to compare with", lambda report, row: report.identities.get("reference")),
    "machine": ("another machine of that name", lambda report, row: [report.machine.get(key) for key in MACHINE]),
    "timing": (
        "timed otherwise",
        lambda report, row: row.speed and (row.speed.threads, row.speed.prompt_tokens, row.speed.new_tokens),
    ),
}
_NEEDED = {
    "Size": (),
    "Perplexity": ("tokens",),
    "KL": ("tokens", "reference"),
    "Top-1": ("tokens", "reference"),
    "Exact match": ("prompts",),
    "Decode": ("machine", "timing"),
    "Prefill": ("machine", "timing"),
}
FIGURES = [Figure(column, _NEEDED[column.name]) for column in COLUMNS if column.name in _NEEDED]


def history(entries: Sequence[Entry]) -> History:
    """The runs as a series, in the order given: the first is what the others are held against."""
    rows: dict[tuple[str, str, str], list[Seen | None]] = {}
    for index, entry in enumerate(entries):
        for report in entry.story.reports:
            for row in report.measured:
                place = rows.setdefault((report.device, row.name, row.target), [None] * len(entries))
                place[index] = (report, row)
    order = {device: index for index, device in enumerate(dict.fromkeys(device for device, _, _ in rows))}
    series = []
    for (device, _, _), seen in sorted(rows.items(), key=lambda item: order[item[0][0]]):
        model = next(one[1] for one in seen if one is not None)
        series.append(Series(device, model, {figure.name: points(figure, seen) for figure in FIGURES}))
    return History(list(entries), series, [differences(one.story, other.story) for one, other in pairwise(entries)])


def points(figure: Figure, seen: Sequence[Seen | None]) -> list[Point]:
    """A figure over the runs; a run that lacks it is no run before."""
    found: list[Point] = []
    earlier: list[int] = []
    for index, now in enumerate(seen):
        value = None if now is None else figure.column.value(now[1])
        if now is None or value is None or math.isnan(value):
            found.append(Point(None))
            continue
        before, first = (
            (_change(figure, seen, i, index) for i in (earlier[-1], earlier[0])) if earlier else (None, None)
        )
        found.append(Point(value, figure.column.spread(now[1]), before, first))
        earlier.append(index)
    return found


def _change(figure: Figure, seen: Sequence[Seen | None], since: int, index: int) -> Change:
    one, other = seen[since], seen[index]
    assert one is not None and other is not None
    reasons = [reason for name in figure.same if (reason := _apart(name, one, other))]
    before, after = figure.column.value(one[1]), figure.column.value(other[1])
    assert before is not None and after is not None
    if not math.isfinite(before) or not math.isfinite(after) or (figure.kind == "ratio" and before == 0):
        reasons.append("not finite")
    if reasons:
        return Change(since, None, tuple(reasons))
    amount = after / before - 1 if figure.kind == "ratio" else after - before
    return Change(since, amount, (), _is_clear(figure.column, one[1], other[1]), amount * figure.column.sign > 0)


def _apart(name: str, one: Seen, other: Seen) -> str:
    """Why two reports do not compare, empty where they do."""
    words, recorded = CONDITIONS[name]
    before, after = recorded(*one), recorded(*other)
    if before is None or after is None:
        return f"not recorded whether {words}: validate again"
    return words if before != after else ""


def _is_clear(column: Column[Measured], one: Measured, other: Measured) -> bool:
    before, after = column.spread(one), column.spread(other)
    if before is not None and after is not None:
        return before.greatest < after.least or after.greatest < before.least
    if column.name == "Exact match":
        return not within_chance(one, other)
    return column.write(column.value(one) or 0.0) != column.write(column.value(other) or 0.0)


def differences(one: Story, other: Story) -> list[Difference]:
    """Options, versions, data and machines that are not those of the run before."""
    before, after = _circumstances(one), _circumstances(other)
    names = dict.fromkeys([*before, *after])
    return [
        Difference(name, before.get(name, "not recorded"), after.get(name, "not recorded"))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _circumstances(story: Story) -> dict[str, str]:
    """Everything recorded that may be why a figure changed."""
    frozen = story.quantized
    known: dict[str, Any] = {section: story.options(section) for section in SECTIONS}
    known["model"] = (frozen.get("model") or {}).get("identity") or {}
    known["training data"] = {"sha256": (frozen.get("data") or {}).get("sha256")}
    known["version"] = versions(frozen)
    for report in story.reports:
        known[report.device] = {
            **{key: value for key, value in report.machine.items() if not key.startswith("free_")},
            "runtime": {label(row): row.runtime for row in report.measured},
        }
    return dict(flatten(known))
