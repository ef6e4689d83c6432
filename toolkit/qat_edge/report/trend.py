"""One figure over the runs, drawn small: a line a model, broken where two runs are not comparable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree as ET

from qat_edge.report.charts import Scale, canvas, line, linear_ticks, marker, text, to_svg, y_axis
from qat_edge.report.figures import label, quantized, role
from qat_edge.report.history import Figure, Point, Series
from qat_edge.report.plots import SHAPES

WIDTH, HEIGHT, LEFT = 300.0, 190.0, 46.0
UNITS = {"MB": 1e6, "%": 0.01}  # what a figure is divided by to be drawn in its column's unit


def trend(name: str, figure: Figure, series: Sequence[Series], runs: Sequence[str]) -> str:
    """The figure of every model that has it, by run; empty where no run has it. runs: their names."""
    drawn = [(one, one.figures[figure.name]) for one in series if any(map(_is_known, one.figures[figure.name]))]
    if figure.name == "Size":  # a float model's would press the others into one line
        drawn = [pair for pair in drawn if quantized(pair[0].model)] or drawn
    if not drawn:
        return ""
    words = "; ".join(f"{label(one.model)}: {_spoken(figure, points, runs)}" for one, points in drawn)
    root = canvas(name, f"{figure.name} by run", words, HEIGHT, WIDTH)
    # Room for half a marker at both ends; one alone stands in the middle.
    x = Scale(0, max(len(runs) - 1, 1), LEFT + 14, WIDTH - 14)
    y = _height(figure, [point for _, points in drawn for point in points])
    y_axis(root, y, WIDTH - 4, LEFT, 4)
    line(root, (LEFT, y.start), (WIDTH - 4, y.start), "axis")
    for index in sorted({round(value) for value in linear_ticks(0, len(runs) - 1, 8)}):
        text(root, x(index), y.start + 16, str(index + 1), "tick", "middle")
    for index in _breaks(points for _, points in drawn):
        middle = (x(index) + x(index - 1)) / 2
        line(root, (middle, y.end), (middle, y.start), "apart")
        text(root, middle, y.end - 3, "≠", "tick", "middle")
    for one, points in drawn:
        _draw(root, figure, one, points, x, y, runs)
    return to_svg(root)


def _draw(
    root: ET.Element, figure: Figure, one: Series, points: Sequence[Point], x: Scale, y: Scale, runs: Sequence[str]
) -> None:
    unit, css = UNITS.get(figure.column.unit, 1.0), role(one.model)
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
        tip = f"{runs[index]}, {label(one.model)}: {figure.column.write(point.value)}"
        marker(root, x(index), y(point.value / unit), SHAPES.get(one.model.target, "diamond"), f"point c-{css}", tip)


def _height(figure: Figure, points: Sequence[Point]) -> Scale:
    """From zero where the figures reach down to half of the greatest, else close around them."""
    unit = UNITS.get(figure.column.unit, 1.0)
    ends = [end for p in points if p.spread is not None for end in (p.spread.least, p.spread.greatest)]
    values = [
        value / unit for value in (*ends, *(p.value for p in points if p.value is not None)) if math.isfinite(value)
    ]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = 0.0 if 0 <= low < high / 2 else low - pad
    return Scale(min(bottom, low), high + pad, HEIGHT - 24, 16)


def _breaks(series: Iterable[Sequence[Point]]) -> list[int]:
    """Runs that some model's figure does not compare with the one before."""
    found = set()
    for points in series:
        found |= {i for i, point in enumerate(points) if point.before is not None and point.before.amount is None}
    return sorted(found)


def _spoken(figure: Figure, points: Sequence[Point], runs: Sequence[str]) -> str:
    told = [(runs[i], p.value) for i, p in enumerate(points) if p.value is not None]
    return ", ".join(f"{figure.column.write(value)} in {run}" for run, value in told)


def _is_known(point: Point) -> bool:
    return point.value is not None and math.isfinite(point.value)
