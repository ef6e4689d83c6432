"""Charts of one run, each a pure function from metrics to SVG markup; empty if there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

from qat_edge.evaluate.results import Measurement, Spread
from qat_edge.report.charts import (
    LINE,
    WIDTH,
    Points,
    Scale,
    canvas,
    line,
    marker,
    nice_top,
    rect,
    row_label,
    shorten,
    smooth,
    text,
    text_width,
    thin,
    tick_text,
    to_svg,
    x_axis,
    y_axis,
)
from qat_edge.report.charts import path as polyline
from qat_edge.report.formatting import (
    PARTS,
    ROLES,
    ReportedModel,
    label,
    megabytes,
    model_label,
    number,
    part_label,
    percent,
    quantized,
    role,
    target_label,
)
from qat_edge_exporters.targets import TARGETS

# Shape of a point by its target; a diamond for torch and for unknown targets.
SHAPES = {target.name: target.marker for target in TARGETS.values()}
LOG_FROM = 12.0  # ratio of the largest to the smallest size above which the axis is logarithmic
LEFT = 42.0  # width of the tick values at the left of an axis
ROW = 30.0  # height of a bar with its margin
TALL_ROW = 40.0
LABELS = 124.0  # width of the labels at the left of the bars
# Titles of the training phases, in their order.
PHASES = {"lora": "LoRA, float", "qat": "QAT"}


class Box(NamedTuple):
    """A rectangle in chart units; y grows downwards."""

    left: float
    right: float
    top: float
    bottom: float


class Label(NamedTuple):
    """Extent and baseline of a label that was already placed."""

    left: float
    right: float
    baseline: float


def loss_curve(name: str, curve: Sequence[dict[str, Any]], unit: str = "nats per token") -> str:
    """Draw the training loss, raw and smoothed, and the evaluation losses over the steps of both phases.

    Args:
        name: Prefix of the element ids, unique on the page.
        curve: Rows of training.json with "step", "phase", and "loss" or "eval_loss".
        unit: Unit of the loss.
    """
    losses = {phase: _points(curve, phase, "loss") for phase in PHASES}
    evals = {phase: _points(curve, phase, "eval_loss") for phase in PHASES}
    drawn = [point for part in (*losses.values(), *evals.values()) for point in part]
    if not drawn:
        return ""

    # Loss that falls by a large factor would look flat on a linear axis.
    steps, values = [x for x, _ in drawn], [y for _, y in drawn]
    log = min(values) > 0 and max(values) / min(values) > 2 * LOG_FROM
    x = Scale(0, max(*steps, 1), LEFT, WIDTH - 12)
    y = Scale(min(values) if log else 0, max(values) if log else nice_top(max(values)), 252, 44, log)

    root = canvas(name, "Loss during training", _curve_description(losses, evals), 300)
    _shade_phases(root, losses, evals, x, y)
    text(root, 0, 14, f"loss, {unit}{', logarithmic' if log else ''}", "name")
    y_axis(root, y, x.end, LEFT, 7 if log else 5)
    x_axis(root, x, y.start, "optimizer step")

    for phase, points in losses.items():
        polyline(root, [(x(step), y(loss)) for step, loss in thin(points)], f"raw s-{phase}")
        polyline(root, [(x(step), y(loss)) for step, loss in thin(smooth(points))], f"smooth s-{phase}")
    for phase, points in evals.items():
        for step, loss in points:
            tip = f"step {step:g}: evaluation loss {number(loss)}"
            marker(root, x(step), y(loss), "circle", f"eval c-{phase}", tip)
    _label_evaluations(root, x, y, evals)
    return to_svg(root)


def accuracy_by_size(name: str, rows: Sequence[Measurement]) -> str:
    """Draw exact match over size, or perplexity over size if exact match was not measured for every model."""
    exact, rows = draws_exact_match(rows), rows_by_size(rows)
    if not rows:
        return ""

    # Scales: a logarithmic size axis if float models would press the quantized ones together.
    sizes = [row.total_bytes / 1e6 for row in rows]
    log = max(sizes) / min(sizes) > LOG_FROM
    low, high = (min(sizes) / 1.3, max(sizes) * 1.3) if log else (0, nice_top(max(sizes)))
    x = Scale(low, high, LEFT + 8, WIDTH - 14, log)
    top = 100.0 if exact else nice_top(max(row.perplexity for row in rows))
    y = Scale(0, top, 252, 34)
    positions = [(x(row.total_bytes / 1e6), y(_quality(row, exact))) for row in rows]

    # Axes.
    metric = "exact match" if exact else "perplexity"
    tips = [f"{label(row)}: {megabytes(row.total_bytes)} MB, {_quality_text(row, exact)}" for row in rows]
    root = canvas(name, f"{metric.capitalize()} against size", "; ".join(tips), 300)
    text(root, 0, 14, "exact match, higher is better" if exact else "perplexity, lower is better", "name")
    y_axis(root, y, x.end, x.start, 5, "%" if exact else "")
    x_axis(root, x, y.start, f"size, MB{', logarithmic' if log else ''}")

    # Markers cover the ends of the lines, labels come last.
    _draw_gains(root, rows, positions)
    for row, (left, height), tip in zip(rows, positions, tips, strict=True):
        marker(root, left, height, SHAPES.get(row.target, "diamond"), f"point c-{role(row)}", tip)
    _label_roles(root, rows, positions, x.end)
    return to_svg(root)


def size_by_part(name: str, rows: Sequence[ReportedModel]) -> str:
    """Draw stacked bars of the quantized artifacts; of the float models if there is nothing else."""
    rows = rows_by_part(rows)
    if not rows:
        return ""

    # Screen readers speak the totals; the table below the chart has the parts.
    description = "; ".join(f"{label(row)}: {megabytes(row.total_bytes)} MB" for row in rows)
    bottom = 26 + TALL_ROW * len(rows)
    root = canvas(name, "Size by part", description, bottom + 26)
    x = Scale(0, nice_top(max(row.total_bytes for row in rows) / 1e6 * 1.02), LABELS, WIDTH - 52)
    text(root, 0, 14, "size of all files that the device needs, MB", "name")

    for index, row in enumerate(rows):
        top = 26 + TALL_ROW * index
        middle = top + TALL_ROW / 2
        _row_label(root, row, middle)
        done = 0.0
        for part, size in ordered_parts(row):
            begin, end = x(done), x(done + size / 1e6)
            tip = f"{label(row)}, {part_label(part)}: {megabytes(size)} MB"
            rect(root, begin, top + 5, end - begin, TALL_ROW - 10, f"part p-{part_class(part)}", tip)
            # A narrow part has no space for its size; the tooltip and the table have it.
            size_text = megabytes(size)
            if end - begin > text_width(size_text) + 6:
                text(root, (begin + end) / 2, middle + 4, size_text, "inside", "middle")
            done += size / 1e6
        text(root, x(done) + 6, middle + 4, megabytes(row.total_bytes), "value")
    x_axis(root, x, bottom + 4, "")
    return to_svg(root)


def speed_bars(name: str, rows: Sequence[Measurement]) -> str:
    """Draw medians of prefill and decode speed, with whiskers from the slowest to the fastest repeat."""
    timed = [(row, row.speed) for row in rows if row.speed is not None]
    if not timed:
        return ""

    # Two panels of equal height, one below the other.
    height = 30 + ROW * len(timed) + 24
    descriptions = [
        f"{label(row)}: prefill {number(speed.prefill.median)}, decode {number(speed.decode.median)} tokens per second"
        for row, speed in timed
    ]
    root = canvas(name, "Speed", "; ".join(descriptions), 2 * height)
    _speed_panel(root, [(row, speed.prefill) for row, speed in timed], 0, "prefill, tokens per second")
    _speed_panel(root, [(row, speed.decode) for row, speed in timed], height, "decode, tokens per second")
    return to_svg(root)


def rows_by_part(rows: Sequence[ReportedModel]) -> list[ReportedModel]:
    """Return the rows that `size_by_part` draws."""
    sized = [row for row in rows if row.total_bytes > 0]
    return [row for row in sized if quantized(row)] or sized


def draws_exact_match(rows: Sequence[Measurement]) -> bool:
    """Return whether `accuracy_by_size` can draw exact match: it is known for every model but the base."""
    return all(row.exact_match is not None for row in rows if role(row) != "base")


def rows_by_size(rows: Sequence[Measurement]) -> list[Measurement]:
    """Return the rows that `accuracy_by_size` draws."""
    exact = draws_exact_match(rows)
    return [
        row
        for row in rows
        if row.total_bytes > 0 and (row.exact_match is not None if exact else math.isfinite(row.perplexity))
    ]


def ordered_parts(row: ReportedModel) -> list[tuple[str, int]]:
    """Return the parts with their bytes in the order of the stack, unknown parts last."""
    known = [(part, row.size_bytes[part]) for part in PARTS if row.size_bytes.get(part)]
    # Unknown parts come from a newer version; they are drawn in one color.
    return known + [(part, size) for part, size in sorted(row.size_bytes.items()) if part not in PARTS and size]


def part_class(part: str) -> str:
    """Return the CSS class of a part; unknown parts share one."""
    return part if part in PARTS else "other"


def _points(curve: Sequence[dict[str, Any]], phase: str, key: str) -> Points:
    """Return step and loss of one phase, without rows that are damaged or not finite."""
    rows = [row for row in curve if row.get("phase") == phase]
    pairs = [(row.get("step"), row.get(key)) for row in rows]
    return [
        (float(step), float(value))
        for step, value in pairs
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value)
    ]


def _curve_description(losses: dict[str, Points], evals: dict[str, Points]) -> str:
    phrases = []
    for phase, points in losses.items():
        if points:
            smoothed = smooth(points)
            ends = f"from {number(points[0][1])} to {number(smoothed[-1][1])} (smoothed)"
            phrases.append(f"{PHASES[phase]}: training loss {ends} at step {points[-1][0]:g}")
        if evals[phase]:
            phrases.append(f"evaluation loss {number(evals[phase][-1][1])} at its end")
    return "; ".join(phrases)


def _shade_phases(root: ET.Element, losses: dict[str, Points], evals: dict[str, Points], x: Scale, y: Scale) -> None:
    """Shade the background of each phase and write its name at the top, if it fits."""
    # Each phase begins where the one before ends.
    begin = 0.0
    for phase, title in PHASES.items():
        steps = [step for step, _ in (*losses[phase], *evals[phase])]
        if not steps:
            continue
        end = max(steps)
        rect(root, x(begin), y.end - 22, x(end) - x(begin), y.start - y.end + 22, f"phase b-{phase}")
        if x(end) - x(begin) > text_width(title):
            text(root, (x(begin) + x(end)) / 2, y.end - 7, title, f"phase-name t-{phase}", "middle")
        begin = end


def _label_evaluations(root: ET.Element, x: Scale, y: Scale, evals: dict[str, Points]) -> None:
    """Write the value of each phase's last evaluation near its point, where it covers the fewest other things."""
    # The squares around all points, and the labels placed so far: what a label may not cover.
    points = [_box(x(step) - 6, y(loss) + 6, 12, 12) for part in evals.values() for step, loss in part]
    labels: list[Box] = []
    for phase in reversed([phase for phase, part in evals.items() if part]):
        step, loss = evals[phase][-1]
        value_text, left, height = number(loss), x(step), y(loss)
        width = text_width(value_text)

        # Candidates, best first: above, below, left and right of the point, then further above and below.
        middle, level = min(left - width / 2, x.end - width), min(max(height + 4, y.end + LINE), y.start - 3)
        spots = [(middle, height - 11), (middle, height + 20), (left - 10 - width, level), (left + 10, level)]
        spots += [(middle, height - 11 - LINE), (middle, height + 20 + LINE)]
        boxes = [_box(begin, baseline + 1, width, LINE - 1) for begin, baseline in spots]
        inside = [
            box
            for box in boxes
            if x.start <= box.left and box.right <= x.end and y.end <= box.top and box.bottom < y.start
        ]

        best = min(inside or boxes, key=lambda box: (_overlaps(box, labels), _overlaps(box, points)))
        labels.append(best)
        text(root, (best.left + best.right) / 2, best.bottom - 1, value_text, f"value t-{phase} halo", "middle")


def _box(left: float, bottom: float, width: float, height: float) -> Box:
    return Box(left, left + width, bottom - height, bottom)


def _overlaps(box: Box, others: Sequence[Box]) -> int:
    """Return the number of other boxes that the box overlaps."""
    return sum(box.left < o.right and o.left < box.right and box.top < o.bottom and o.top < box.bottom for o in others)


def _quality(row: Measurement, exact: bool) -> float:
    return (row.exact_match or 0.0) * 100 if exact else row.perplexity


def _quality_text(row: Measurement, exact: bool) -> str:
    return f"exact match {percent(row.exact_match or 0.0)}" if exact else f"perplexity {number(row.perplexity)}"


def _draw_gains(root: ET.Element, rows: Sequence[Measurement], positions: Points) -> None:
    """Draw a line from each PTQ artifact to the QAT artifact of the same target."""
    for row, position in zip(rows, positions, strict=True):
        for other, end in zip(rows, positions, strict=True):
            if role(row) == "ptq" and role(other) == "qat" and row.target == other.target:
                line(root, position, end, "gain")


def _label_roles(root: ET.Element, rows: Sequence[Measurement], positions: Points, right: float) -> None:
    """Write one name per role next to its rightmost point, moved up or down until it covers no other name."""
    placed: list[Label] = []
    for name in dict.fromkeys(role(row) for row in rows):
        spots = [(*position, row) for row, position in zip(rows, positions, strict=True) if role(row) == name]
        # The rightmost point of the role has the most space at its right.
        left, height, row = max(spots, key=lambda spot: spot[0])
        title = shorten(ROLES["ptq"] if name == "ptq" else model_label(row), 150)
        width = text_width(title)

        # At the right edge the name is written to the left of the leftmost point instead.
        fits = left + 11 + width <= right + 8
        if not fits:
            left, height, row = min(spots, key=lambda spot: spot[0])
        begin = left + 11 if fits else max(left - 11 - width, 4)
        baseline = _free_baseline(placed, begin, begin + width, height + 4)
        placed.append(Label(begin, begin + width, baseline))
        anchor, at = ("start", begin) if fits else ("end", begin + width)
        text(root, at, baseline, title, f"point-name t-{name} halo", anchor)


def _free_baseline(placed: Sequence[Label], begin: float, end: float, wanted: float) -> float:
    """Return the baseline nearest to `wanted` at which the label covers no other; `wanted` if there is none."""
    for shift in (0, 1, -1, 2, -2, 3, -3):
        baseline = wanted + shift * LINE
        # Two labels overlap if their lines are closer than a line and their extents intersect.
        free = all(
            abs(baseline - other.baseline) >= LINE - 1 or end < other.left or begin > other.right for other in placed
        )
        # Within the plot area: below its top and above the size axis.
        if free and LINE < baseline < 250:
            return baseline
    return wanted


def _row_label(root: ET.Element, row: ReportedModel, middle: float) -> None:
    is_float = role(row) in ("base", "tuned") and row.target == "torch"
    row_label(root, LABELS - 8, middle, model_label(row), "" if is_float else target_label(row))


def _speed_panel(root: ET.Element, spreads: list[tuple[Measurement, Spread]], top: float, title: str) -> None:
    """Draw one speed of every model as horizontal bars."""
    # The axis has to include the whiskers, which are longer than the bars.
    highest = max(spread.greatest for _, spread in spreads)
    x = Scale(0, nice_top(highest), LABELS, WIDTH - 50)
    text(root, 0, top + 14, title, "name")

    bottom = top + 26 + ROW * len(spreads)
    # Grid lines with their values below.
    for value in x.ticks(5):
        line(root, (x(value), top + 24), (x(value), bottom), "grid")
        text(root, x(value), bottom + 15, tick_text(value), "tick", "middle")

    for index, (row, spread) in enumerate(spreads):
        # A bar for the median, a whisker for the range, and the median as text to the right of both.
        height = top + 26 + ROW * index
        middle = height + ROW / 2
        tip = (
            f"{label(row)}: median {number(spread.median)}, "
            f"{number(spread.least)} to {number(spread.greatest)} tokens per second"
        )
        _row_label(root, row, middle)
        rect(root, LABELS, height + 5, x(spread.median) - LABELS, ROW - 10, f"bar c-{role(row)}", tip)
        line(root, (x(spread.least), middle), (x(spread.greatest), middle), "whisker")
        for end in (spread.least, spread.greatest):
            line(root, (x(end), middle - 4), (x(end), middle + 4), "whisker")
        text(root, x(max(spread.greatest, spread.median)) + 7, middle + 4, number(spread.median), "value")
