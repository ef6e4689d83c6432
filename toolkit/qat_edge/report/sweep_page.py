"""Page of `qat-edge sweep` (report.html): the loss of every trial, by its number and by the value of each option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element

from markupsafe import Markup

from qat_edge import __version__, config
from qat_edge.report.charts import (
    WIDTH,
    Scale,
    canvas,
    marker,
    path,
    shorten,
    text,
    to_svg,
    x_axis,
    y_axis,
)
from qat_edge.report.formatting import duration
from qat_edge.report.run_page import Plot, environment, style
from qat_edge.report.sweep_results import COMPLETE, FAILED, INTERRUPTED, PRUNED, SweepResult, TrialResult
from qat_edge.report.tables import Table, TableCell, TableRow
from qat_edge.train.search_space import LOG, write

LEFT, TOP, BOTTOM = 48, 34, 240
LOG_FROM = 3.0  # the axis of losses is logarithmic from this ratio on
MOST_LABEL = 70.0  # width of the label of a value
# CSS class of a trial's point, and the legend of the charts.
BEST, EQUAL, OTHER = "c-qat", "c-ptq", "c-base"
SHAPES = {PRUNED: "triangle", FAILED: "star"}  # of trials without a loss, on the axis


def render(result: SweepResult) -> str:
    """Return the HTML of the whole page."""
    first, *others = result.verdict()
    return environment().get_template("sweep.html").render(
        model=result.model,
        style=style(),
        result=result,
        first=first,
        others=others,
        plots=_plots(result),
        ranked=ranked_table(result),
        rest=rest_table(result),
        version=__version__,
    )  # fmt: skip


def ranked_table(result: SweepResult) -> Table | None:
    """Return the complete trials, the lowest loss first; None without one."""
    if not result.ranked:
        return None
    names = list(result.ranked[0].values)
    rows = []
    for trial in result.ranked:
        score = trial.score or 0.0
        cells = [TableCell(f"{score:.4f}", score, best=trial.number == result.best), *_difference_cells(trial)]
        cells += [_value_cell(trial.values[name]) for name in names]
        cells.append(_time_cell(trial))
        rows.append(TableRow(_name(result, trial), _role(result, trial), cells))
    heads = [("Loss", "nats per token"), ("Above the best", "nats"), ("95% interval", "nats")]
    heads += [(name, "") for name in names] + [("Time", "")]
    return Table("Complete trials, the lowest loss first", heads, rows, first="Trial")


def rest_table(result: SweepResult) -> Table | None:
    """Return the trials without a loss, with the reason; None where there are none."""
    rest = [trial for trial in result.trials if trial.state != COMPLETE]
    if not rest:
        return None
    names = list(rest[0].values)
    rows = []
    for trial in rest:
        reason = f"{trial.reason}; run again" if trial.state == INTERRUPTED else trial.reason
        cells = [TableCell(trial.state, css="fact"), *(_value_cell(trial.values[name]) for name in names)]
        rows.append(TableRow(_name(result, trial), "", [*cells, _time_cell(trial), TableCell(reason, css="fact")]))
    heads = [("State", ""), *((name, "") for name in names), ("Time", ""), ("Reason", "")]
    return Table("Trials without a loss", heads, rows, first="Trial")


def by_trial(name: str, result: SweepResult) -> str:
    """Draw the loss of each trial by its number, and the lowest loss so far."""
    complete = sorted(result.ranked, key=lambda trial: trial.number)
    if not complete:
        return ""
    last = max(trial.number for trial in result.trials)
    root = canvas(name, "Loss by trial", _description(result), 290)
    x, y = Scale(0, max(last, 1), LEFT + 10, WIDTH - 16), _loss_scale(complete)
    _draw_loss_axis(root, y, WIDTH - 16)
    # As many ticks as are whole numbers.
    most = next(count for count in range(6, 0, -1) if all(tick % 1 == 0 for tick in x.ticks(count)))
    x_axis(root, x, BOTTOM, "trial", most)

    # A step at each trial that is better than all before it.
    steps, lowest = [], complete[0].score or 0.0
    for trial in complete:
        steps.append((x(trial.number), y(lowest)))
        lowest = min(lowest, trial.score or 0.0)
        steps.append((x(trial.number), y(lowest)))
    path(root, [*steps, (x(last), y(lowest))], "smooth s-qat")
    for trial in complete:
        _draw_trial(root, result, trial, x(trial.number), y(trial.score or 0.0))
    for trial in result.trials:
        if trial.state in SHAPES:
            tip = f"trial {trial.number}: {trial.state}, {trial.reason}"
            marker(root, x(trial.number), BOTTOM - 7, SHAPES[trial.state], "point c-other", tip)
    return to_svg(root)


def by_value(name: str, option: str, result: SweepResult) -> str:
    """Draw the loss of each complete trial by the value of one option."""
    complete = [trial for trial in reversed(result.ranked) if option in trial.values]
    if not complete:
        return ""
    root = canvas(name, f"Loss by {option}", _description(result), 290)
    y = _loss_scale(complete)
    _draw_loss_axis(root, y, WIDTH - 16)

    written = next(search for search in result.search if config.searched_name(search) == option)
    if ":" in written.partition("=")[2]:
        values = [trial.values[option] for trial in complete]
        x = Scale(min(values), max(values), LEFT + 14, WIDTH - 24, log=written.endswith(f":{LOG}"))
        x_axis(root, x, BOTTOM, option, most=5)
        places = {value: x(value) for value in values}
    else:
        places = _places(root, [trial.values[option] for trial in complete])
        text(root, (LEFT + WIDTH) / 2, BOTTOM + 35, option, "name", "middle")
    for trial in complete:
        _draw_trial(root, result, trial, places[trial.values[option]], y(trial.score or 0.0))
    return to_svg(root)


def _plots(result: SweepResult) -> list[Plot]:
    """Return a chart by trial, and one for each option."""
    if not result.ranked:
        return []
    legend = [(f"l-circle {BEST}", "lowest loss")]
    if any(trial.may_equal_best for trial in result.ranked):
        legend.append((f"l-circle {EQUAL}", "no difference shown"))
    if any(trial.difference is not None and trial.difference.is_shown for trial in result.ranked):
        legend.append((f"l-circle {OTHER}", "higher loss"))
    shapes = [(f"l-{shape} c-other", state) for state, shape in SHAPES.items() if result.count(state)]
    plots = [Plot("Loss by trial", Markup(by_trial("by-trial", result)), "Line: lowest loss so far.", legend + shapes)]
    for option in map(config.searched_name, result.search):
        svg = by_value(f"by-{option.replace('_', '-')}", option, result)
        plots.append(Plot(f"Loss by {option}", Markup(svg), "Other options differ between the points, too.", legend))
    return plots


def _draw_trial(root: Element, result: SweepResult, trial: TrialResult, x: float, y: float) -> None:
    values = ", ".join(f"{name} {write(value)}" for name, value in trial.values.items())
    color = BEST if trial.number == result.best else EQUAL if trial.may_equal_best else OTHER
    marker(root, x, y, "circle", f"point {color}", f"trial {trial.number}: {trial.score:.4f}; {values}")


def _loss_scale(trials: Sequence[TrialResult]) -> Scale:
    """Return the axis of losses, logarithmic where they differ by a large factor."""
    losses = [trial.score or 0.0 for trial in trials]
    low, high = min(losses), max(losses)
    return Scale(low, high, BOTTOM - 20, TOP + 4, log=low > 0 and high > LOG_FROM * low)


def _draw_loss_axis(root: Element, y: Scale, right: float) -> None:
    text(root, 0, 14, f"loss, nats per token{', logarithmic' if y.log else ''}", "name")
    y_axis(root, y, right, LEFT)


def _places(root: Element, values: Sequence[Any]) -> dict[Any, float]:
    """Write each value below the axis, at equal distances; return their positions."""
    different = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    width = (WIDTH - LEFT - 24) / len(different)
    places = {}
    for index, value in enumerate(different):
        places[value] = round(LEFT + 8 + width * (index + 0.5), 2)
        text(root, places[value], BOTTOM + 17, shorten(write(value), min(width, MOST_LABEL)), "tick", "middle")
    return places


def _difference_cells(trial: TrialResult) -> list[TableCell]:
    if trial.difference is None:
        return [TableCell("the best"), TableCell("")]
    interval = trial.difference.interval
    shown = TableCell(f"{interval.low:.4f} to {interval.high:.4f}", css="fact")
    return [TableCell(f"{interval.value:.4f}", interval.value), shown]


def _value_cell(value: Any) -> TableCell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return TableCell(write(value), float(value)) if is_number else TableCell(write(value), css="fact")


def _time_cell(trial: TrialResult) -> TableCell:
    return TableCell("") if trial.seconds is None else TableCell(duration(trial.seconds), trial.seconds)


def _name(result: SweepResult, trial: TrialResult) -> str:
    return f"{trial.number} (as given)" if trial.number == result.as_given else str(trial.number)


def _role(result: SweepResult, trial: TrialResult) -> str:
    return "qat" if trial.number == result.best else "ptq" if trial.may_equal_best else "base"


def _description(result: SweepResult) -> str:
    losses = [trial.score or 0.0 for trial in result.ranked]
    return f"{len(losses)} trials, from {min(losses):.4f} to {max(losses):.4f} nats per token."
