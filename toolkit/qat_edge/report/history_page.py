"""Page of several runs (history.html): each metric over the runs, and the settings that differ between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qat_edge import __version__
from qat_edge.report import glossary
from qat_edge.report.formatting import TARGET_TITLES, label, number, plain, role, role_legend
from qat_edge.report.history import METRICS, Change, History, Incomparable, Metric, Point, Series
from qat_edge.report.plots import SHAPES
from qat_edge.report.run_details import DetailList
from qat_edge.report.run_page import Plot, environment, style
from qat_edge.report.tables import MISSING, Table, TableCell, TableRow
from qat_edge.report.trend import trend

NOT_CLEAR = "within the spread of repeats, the sampling error of the prompts or the last digit"


@dataclass(frozen=True)
class DeviceHistory:
    """Everything the page shows about one device.

    Attributes:
        name: Name of the device.
        cautions: Sentences on runs that are not comparable.
        legend: CSS class of each swatch, and its text.
        plots: One chart per metric.
        shown: Tables of the QAT artifacts.
        folded: Tables of the models that QAT is compared with, folded on the page.
    """

    name: str
    cautions: list[str]
    legend: list[tuple[str, str]]
    plots: list[Plot]
    shown: list[Table]
    folded: list[Table]


def render(history: History) -> str:
    """Return the HTML of the whole page."""
    names = run_names(history)
    # Usually one model; a series may still change its base.
    models = list(dict.fromkeys(entry.results.model for entry in history.entries))
    return environment().get_template("history.html").render(
        model=", ".join(models),
        count=len(names),
        style=style(),
        runs=_runs_table(history, names),
        devices=[_device_history(history, names, device, index) for index, device in enumerate(history.devices)],
        changes=_setting_changes(history, names),
        glossary=glossary.RUN_TERMS,
        version=__version__,
    )  # fmt: skip


def run_names(history: History) -> list[str]:
    """Return the folder names with a number in front, so that equal names differ."""
    return [f"{index} {plain(entry.name)}" for index, entry in enumerate(history.entries, start=1)]


def _runs_table(history: History, names: Sequence[str]) -> Table:
    rows = []
    for name, entry in zip(names, history.entries, strict=True):
        results, frozen = entry.results, entry.results.quantized
        commit = (frozen.get("git_revision") or "")[:12]
        cells = [results.model, results.reports[0].created, frozen.get("qat_edge"), commit]
        rows.append(TableRow(name, "run", [TableCell(str(cell or "–"), css="fact") for cell in cells]))
    heads = [("Base model", ""), ("Validated", ""), ("qat-edge", "version"), ("Commit", "")]
    return Table("Runs, the oldest first", heads, rows, first="Run")


def _device_history(history: History, names: Sequence[str], device: str, index: int) -> DeviceHistory:
    series = [one for one in history.series if one.device == device]
    charts = [(metric, trend(f"trend-{index}-{i}", metric, series, names)) for i, metric in enumerate(METRICS)]
    # The artifacts that ship are shown; the models they are compared with are folded.
    qat = [one for one in series if role(one.model) == "qat"]
    return DeviceHistory(
        name=device,
        cautions=[
            *_outdated(history, names, device),
            *(_caution(names, pair) for pair in history.incomparable(device)),
        ],
        legend=_legend(series),
        plots=[Plot(_title(metric), Markup(svg), "", []) for metric, svg in charts if svg],
        shown=[_series_table(one, names) for one in qat],
        folded=[_series_table(one, names) for one in series if one not in qat],
    )


def _caution(names: Sequence[str], pair: Incomparable) -> str:
    return f"{names[pair.later]} ≠ {names[pair.earlier]}: {pair.reason}. Not compared: {', '.join(pair.metrics)}."


def _title(metric: Metric) -> str:
    direction = "higher" if metric.column.sign > 0 else "lower"
    unit = f", {metric.column.unit}" if metric.column.unit else ""
    return f"{metric.name}{unit} ({direction} is better)"


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Return the colors of the models, the shapes of the runtimes and the sign of an interrupted line."""
    colors = role_legend([one.model for one in series])
    targets = dict.fromkeys(one.model.target for one in series)
    shapes = {f"l-{SHAPES.get(t, 'diamond')}": TARGET_TITLES.get(t, plain(t)) for t in targets}
    return [*colors, *shapes.items(), ("l-apart", "≠ not comparable")]


def _outdated(history: History, names: Sequence[str], device: str) -> list[str]:
    """Return which runs have figures of artifacts that are no longer there."""
    found = [(name, entry.results.outdated.get(device)) for name, entry in zip(names, history.entries, strict=True)]
    return [f"{name}: {note}" for name, note in found if note]


def _series_table(one: Series, names: Sequence[str]) -> Table:
    """Return a table with a row per run; the changes of a metric are below its value."""
    # A metric that no run has gets no column.
    used = [metric for metric in METRICS if any(point.value is not None for point in one.metrics[metric.name])]
    rows = [
        TableRow(name, role(one.model), [_cell(metric, one.metrics[metric.name][index], names) for metric in used])
        for index, name in enumerate(names)
    ]
    heads = [(metric.name, metric.column.unit) for metric in used]
    return Table(f"{label(one.model)} on {plain(one.device)}", heads, rows, first="Run")


def _cell(metric: Metric, point: Point, names: Sequence[str]) -> TableCell:
    if point.value is None:
        return MISSING
    # In the second run, the previous run is the first one: the change is shown once.
    changes = [point.before, point.first] if point.before != point.first else [point.before]
    below = [_change_cell(metric, change, names) for change in changes if change is not None]
    if point.spread is not None:
        least, greatest = (metric.column.write(end) for end in (point.spread.least, point.spread.greatest))
        below.insert(0, TableCell(f"{least} to {greatest}"))
    return TableCell(metric.column.bare(point.value), point.value, below=tuple(below))


def _change_cell(metric: Metric, change: Change, names: Sequence[str]) -> TableCell:
    """Return `−2.1% vs 1`: the change, and the number of the run that it is relative to."""
    # Runs are numbered from 1 on the page.
    since = change.since + 1
    if change.amount is None:
        return TableCell(f"≠ {since}", tip=f"not comparable with {names[change.since]}: {', '.join(change.reasons)}")
    # Only a change that the measurement can resolve is colored.
    css = ("better" if change.better else "worse") if change.clear else ""
    tip = f"{css or NOT_CLEAR}, compared with {names[change.since]}"
    return TableCell(f"{change_text(metric, change.amount)} vs {since}", change.amount, tip=tip, css=css)


def change_text(metric: Metric, amount: float) -> str:
    """Format a change: `+2.1%` of a ratio, `+1.2 pp` of a share, `+0.012` nats, `±0` if it rounds to zero."""
    if metric.change_unit == "ratio":
        words = f"{amount * 100:+.1f}%"
    elif metric.change_unit == "points":
        words = f"{amount * 100:+.1f} pp"
    else:
        words = f"{'+' if amount > 0 else ''}{number(amount, 2)}"
    # A change that rounds to zero has no sign.
    rounded = float(words.split()[0].rstrip("%").partition("×")[0])
    return "±0" if rounded == 0 else words.replace("-", "−")


def _setting_changes(history: History, names: Sequence[str]) -> list[DetailList]:
    """Return the settings of each run that differ from those of the previous run."""
    return [
        DetailList(f"{names[index]}, changed since {names[index - 1]}", [
            (one.name, f"{one.before} → {one.after}") for one in found
        ])
        for index, found in enumerate(history.differences, start=1)
    ]  # fmt: skip
