"""The page of several runs: what does not compare, each figure over the runs, and what differs between neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qat_edge import __version__
from qat_edge.report import run_details
from qat_edge.report.figures import ROLES, TARGETS, label, number, plain, role
from qat_edge.report.history import FIGURES, Change, Figure, History, Point, Series
from qat_edge.report.plots import SHAPES
from qat_edge.report.run_details import Facts
from qat_edge.report.run_page import Plot, environment, style
from qat_edge.report.tables import Cell, Row, Table
from qat_edge.report.trend import trend

NO_CHANGE = "no more than the repeats, so few prompts or the last digit explain"


@dataclass(frozen=True)
class Device:
    """One device's part of the page. shown: tables of the QAT artifacts; folded: of what they are held against."""

    name: str
    cautions: list[str]
    legend: list[tuple[str, str]]
    plots: list[Plot]
    shown: list[Table]
    folded: list[Table]


def render(history: History) -> str:
    """The whole page as one text."""
    names = run_names(history)
    models = list(dict.fromkeys(entry.story.model for entry in history.entries))
    return environment().get_template("history.html").render(
        model=", ".join(models),
        count=len(names),
        style=style(),
        runs=_runs(history, names),
        devices=[_device(history, names, device, index) for index, device in enumerate(history.devices)],
        changes=_changes(history, names),
        words=run_details.WORDS,
        version=__version__,
    )  # fmt: skip


def run_names(history: History) -> list[str]:
    """Numbered, so that two folders of one name are told apart."""
    return [f"{index} {plain(entry.name)}" for index, entry in enumerate(history.entries, start=1)]


def _runs(history: History, names: Sequence[str]) -> Table:
    rows = []
    for name, entry in zip(names, history.entries, strict=True):
        story, frozen = entry.story, entry.story.quantized
        cells = [story.model, story.reports[0].created, frozen.get("qat_edge"), (frozen.get("git_revision") or "")[:12]]
        rows.append(Row(name, "run", [Cell(str(cell or "–"), css="told") for cell in cells]))
    heads = [("Base model", ""), ("Validated", ""), ("qat-edge", "version"), ("Commit", "")]
    return Table("Runs, the first is what the others are held against", heads, rows, first="Run")


def _device(history: History, names: Sequence[str], device: str, index: int) -> Device:
    series = [one for one in history.series if one.device == device]
    drawn = [(figure, trend(f"trend-{index}-{i}", figure, series, names)) for i, figure in enumerate(FIGURES)]
    qat = [one for one in series if role(one.model) == "qat"]
    return Device(
        name=device,
        cautions=[_caution(names, *found) for found in history.apart(device)],
        legend=_legend(series),
        plots=[Plot(_title(figure), Markup(svg), "", []) for figure, svg in drawn if svg],
        shown=[_table(one, names) for one in qat],
        folded=[_table(one, names) for one in series if one not in qat],
    )


def _caution(names: Sequence[str], since: int, index: int, reason: str, figures: Sequence[str]) -> str:
    return f"{names[index]} ≠ {names[since]}: {reason}. Not compared: {', '.join(figures)}."


def _title(figure: Figure) -> str:
    better = "more" if figure.column.sign > 0 else "less"
    unit = f", {figure.column.unit}" if figure.column.unit else ""
    return f"{figure.name}{unit} ({better} is better)"


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Colours of the models, shapes of the runtimes, and what a broken line is."""
    kinds = {f"l-bar c-{role(one.model)}": ROLES.get(role(one.model), "other") for one in series}
    targets = dict.fromkeys(one.model.target for one in series)
    shapes = {f"l-{SHAPES.get(t, 'diamond')}": TARGETS.get(t, plain(t)) for t in targets}
    return [*kinds.items(), *shapes.items(), ("l-apart", "≠ not comparable")]


def _table(one: Series, names: Sequence[str]) -> Table:
    """Rows are runs; below each figure its changes."""
    used = [figure for figure in FIGURES if any(point.value is not None for point in one.figures[figure.name])]
    rows = [
        Row(name, role(one.model), [_cell(figure, one.figures[figure.name][index], names) for figure in used])
        for index, name in enumerate(names)
    ]
    heads = [(figure.name, figure.column.unit) for figure in used]
    return Table(f"{label(one.model)} on {plain(one.device)}", heads, rows, first="Run")


def _cell(figure: Figure, point: Point, names: Sequence[str]) -> Cell:
    if point.value is None:
        return Cell("–")
    changes = [point.before, point.first] if point.before != point.first else [point.before]
    below = [_change(figure, change, names) for change in changes if change is not None]
    if point.spread is not None:
        least, greatest = (figure.column.write(end) for end in (point.spread.least, point.spread.greatest))
        below.insert(0, Cell(f"{least} to {greatest}"))
    return Cell(figure.column.write(point.value).removesuffix("%"), point.value, below=tuple(below))


def _change(figure: Figure, change: Change, names: Sequence[str]) -> Cell:
    """`−2.1% vs 1`: the amount and the number of the run it is held against."""
    since = change.since + 1
    if change.amount is None:
        return Cell(f"≠ {since}", tip=f"not comparable with {names[change.since]}: {', '.join(change.reasons)}")
    css = ("better" if change.better else "worse") if change.clear else ""
    tip = f"{css or NO_CHANGE}, against {names[change.since]}"
    return Cell(f"{amount_words(figure, change.amount)} vs {since}", change.amount, tip=tip, css=css)


def amount_words(figure: Figure, amount: float) -> str:
    """`+2.1%` of a ratio, `+1.2 pp` of a share in percentage points, `+0.012` nats; `±0` for nothing."""
    words = {"ratio": f"{amount * 100:+.1f}%", "points": f"{amount * 100:+.1f} pp"}.get(figure.kind)
    if words is None:
        words = f"{'+' if amount > 0 else ''}{number(amount, 2)}"
    return "±0" if float(words.split()[0].rstrip("%").partition("×")[0]) == 0 else words.replace("-", "−")


def _changes(history: History, names: Sequence[str]) -> list[Facts]:
    """What differs in each run from the one before."""
    return [
        Facts(f"{names[index]} from {names[index - 1]}", [(one.name, f"{one.before} → {one.after}") for one in found])
        for index, found in enumerate(history.differences, start=1)
    ]
