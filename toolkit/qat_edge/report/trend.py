"""Small chart of one metric over several runs: a line per model, interrupted between runs that are not comparable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree as ET

from qat_edge.report.charts import Scale, canvas, line, linear_ticks, marker, text, to_svg, y_axis
from qat_edge.report.formatting import label, quantized, role
from qat_edge.report.history import Metric, Point, Series
from qat_edge.report.plots import SHAPES

WIDTH, HEIGHT, LEFT = 300.0, 190.0, 46.0
UNITS = {"MB": 1e6, "%": 0.01}  # divisor of a value, by the unit of its column


def trend(name: str, metric: Metric, series: Sequence[Series], runs: Sequence[str]) -> str:
    """Draw a metric of every model over the runs.

    Args:
        name: Prefix of the element ids, unique on the page.
        metric: The metric to draw.
        series: Models; those without a finite value are left out.
        runs: Names of the runs.

    Returns:
        SVG markup; empty if no run has the metric.
    """
    drawn = [one for one in series if any(map(_is_known, one.metrics[metric.name]))]
    if metric.name == "Size":
        # A float model is several times larger: on its scale the quantized models would look equal.
        drawn = [one for one in drawn if quantized(one.model)] or drawn
    if not drawn:
        return ""

    description = "; ".join(
        f"{label(one.model)}: {_description(metric, one.metrics[metric.name], runs)}" for one in drawn
    )
    root = canvas(name, f"{metric.name} by run", description, HEIGHT, WIDTH)
    # Half a marker fits at both ends; a single run is in the middle.
    x = Scale(0, max(len(runs) - 1, 1), LEFT + 14, WIDTH - 14)
    y = _y_scale(metric, [point for one in drawn for point in one.metrics[metric.name]])
    y_axis(root, y, WIDTH - 4, LEFT, 4)
    line(root, (LEFT, y.start), (WIDTH - 4, y.start), "axis")
    # Run numbers on the axis, at most about eight.
    for index in sorted({round(value) for value in linear_ticks(0, len(runs) - 1, 8)}):
        text(root, x(index), y.start + 16, str(index + 1), "tick", "middle")

    _draw_breaks(root, _breaks(one.metrics[metric.name] for one in drawn), x, y)
    for one in drawn:
        _draw_series(root, metric, one, x, y, runs)
    return to_svg(root)


def _draw_breaks(root: ET.Element, breaks: Sequence[int], x: Scale, y: Scale) -> None:
    """Draw a dotted line between each run that is not comparable and the one before it."""
    for index in breaks:
        middle = (x(index) + x(index - 1)) / 2
        line(root, (middle, y.end), (middle, y.start), "apart")
        text(root, middle, y.end - 3, "≠", "tick", "middle")


def _draw_series(root: ET.Element, metric: Metric, one: Series, x: Scale, y: Scale, runs: Sequence[str]) -> None:
    unit, css = UNITS.get(metric.column.unit, 1.0), role(one.model)
    points = one.metrics[metric.name]

    # Lines first, so that markers cover their ends. Points that are not comparable stay unconnected.
    for index, point in enumerate(points):
        if point.before is not None and point.before.amount is not None and _is_known(point):
            before = points[point.before.since].value or 0.0
            ends = (x(point.before.since), y(before / unit)), (x(index), y((point.value or 0.0) / unit))
            line(root, *ends, f"trend s-{css}")

    for index, point in enumerate(points):
        if not _is_known(point) or point.value is None:
            continue
        if point.spread is not None:
            whisker = [(x(index), y(end / unit)) for end in (point.spread.least, point.spread.greatest)]
            line(root, whisker[0], whisker[1], "whisker")
        tip = f"{runs[index]}, {label(one.model)}: {metric.column.write(point.value)}"
        marker(root, x(index), y(point.value / unit), SHAPES.get(one.model.target, "diamond"), f"point c-{css}", tip)


def _y_scale(metric: Metric, points: Sequence[Point]) -> Scale:
    """Return a scale from zero if the smallest value is below half of the largest, else one close around them."""
    unit = UNITS.get(metric.column.unit, 1.0)
    # Whiskers have to fit as well as points.
    ends = [end for p in points if p.spread is not None for end in (p.spread.least, p.spread.greatest)]
    values = [
        value / unit for value in (*ends, *(p.value for p in points if p.value is not None)) if math.isfinite(value)
    ]
    low, high = min(values), max(values)
    # A little space above and below; some space even if all values are equal.
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = 0.0 if 0 <= low < high / 2 else low - pad
    return Scale(min(bottom, low), high + pad, HEIGHT - 24, 16)


def _breaks(series: Iterable[Sequence[Point]]) -> list[int]:
    """Return the indices of runs in which the metric of some model is not comparable with the run before."""
    found: set[int] = set()
    for points in series:
        found |= {i for i, point in enumerate(points) if point.before is not None and point.before.amount is None}
    return sorted(found)


def _description(metric: Metric, points: Sequence[Point], runs: Sequence[str]) -> str:
    values = [(runs[i], point.value) for i, point in enumerate(points) if point.value is not None]
    return ", ".join(f"{metric.column.write(value)} in {run}" for run, value in values)


def _is_known(point: Point) -> bool:
    return point.value is not None and math.isfinite(point.value)
