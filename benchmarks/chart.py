"""SVG plots of the benchmark reports: rows of dots (a row for each model or engine), and two figures of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree as ET

from qat_edge.report.charts import (
    WIDTH,
    Scale,
    canvas,
    line,
    marker,
    nice_top,
    rect,
    text,
    text_width,
    to_svg,
    x_axis,
    y_axis,
)

Points = Sequence[tuple[str, float]]  # (kind of mark, value)

LEFT, ROW, HEAD, FOOT = 122.0, 24.0, 44.0, 52.0
SCATTER_LEFT, SCATTER_HEIGHT = 56.0, 300.0
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.name,.tick{fill:#555}.head{font-weight:600}"
    ".paper{fill:#fff}.axis{stroke:#888}.row{stroke:#e4e4e4}"
    ".circle{fill:none;stroke:#1b5e9b;stroke-width:1.6}.square{fill:#c4501b}.diamond{fill:#2d8a4e}"
    ".triangle{fill:#8a8a8a}"
)


@dataclass(frozen=True)
class Dots:
    """Description of a dot plot.

    Attributes:
        name: identifier of the SVG.
        title: title of the SVG.
        description: sentence for readers who do not see the plot.
        axis: label of the axis.
        marks: kind of mark -> its shape and its label in the legend.
    """

    name: str
    title: str
    description: str
    axis: str
    marks: Mapping[str, tuple[str, str]]


PERPLEXITIES = Dots(
    "perplexity",
    "Perplexity of the FP32 fine-tune and of its quantized versions",
    "Lower is better; one mark per seed and runtime.",
    "perplexity, lower is better",
    {"torch": ("circle", "torch"), "executorch": ("square", ".pte"), "onnx": ("diamond", "ONNX")},
)


def dots(plot: Dots, panels: Mapping[str, Mapping[str, Points]]) -> str:
    """Return a dot plot as SVG; empty where nothing was measured.

    Args:
        plot: its description.
        panels: title of the panel -> title of the row -> points.
    """
    drawn = {title: rows for title, rows in panels.items() if any(rows.values())}
    if not drawn:
        return ""
    heights = [HEAD + FOOT + ROW * len(rows) for rows in drawn.values()]
    root = canvas(plot.name, plot.title, plot.description, sum(heights))
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ET.SubElement(root, "style").text = STYLE
    rect(root, 0, 0, WIDTH, sum(heights), "paper")
    top = 0.0
    for (title, rows), height in zip(drawn.items(), heights, strict=True):
        _panel(root, plot, title, rows, top)
        top += height
    return to_svg(root)


class Point(NamedTuple):
    """A mark of a scatter plot, and the name that its tooltip shows."""

    x: float
    y: float
    name: str


def scatter(
    name: str, title: str, axes: tuple[str, str], groups: Mapping[str, tuple[str, Sequence[Point]]], level: float | None
) -> str:
    """Return a plot of two figures of each model as SVG, both axes from 0; empty where nothing was measured.

    Args:
        name: identifier of the SVG.
        title: title of the plot, with what is drawn upwards.
        axes: label of the axis across, and unit of the one upwards.
        groups: shape of the marks -> label in the legend, and points.
        level: a figure upwards that all models are compared with, as a dashed line; None for none.
    """
    points = [point for _, found in groups.values() for point in found]
    if not points:
        return ""
    root = canvas(name, title, "One mark per model.", SCATTER_HEIGHT)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ET.SubElement(root, "style").text = STYLE + ".grid{stroke:#e4e4e4}.limit{stroke:#888;stroke-dasharray:5 4}"
    rect(root, 0, 0, WIDTH, SCATTER_HEIGHT, "paper")
    text(root, 8, 18, title, "head")
    _legend(root, {shape: label for shape, (label, _) in groups.items()}, 16, 38)

    right, bottom = WIDTH - 14, SCATTER_HEIGHT - FOOT
    across = Scale(0, nice_top(max(point.x for point in points)), SCATTER_LEFT, right)
    up = Scale(0, nice_top(max(*(point.y for point in points), level or 0.0)), bottom, HEAD + 12)
    y_axis(root, up, right, SCATTER_LEFT, unit=axes[1])
    x_axis(root, across, bottom, axes[0])
    if level is not None:
        line(root, (SCATTER_LEFT, up(level)), (right, up(level)), "limit")
    for shape, (_, found) in groups.items():
        for x, y, named in found:
            marker(root, across(x), up(y), shape, shape, f"{named}: {x:.4g}, {y:.4g}")
    return to_svg(root)


def _panel(root: ET.Element, plot: Dots, title: str, rows: Mapping[str, Points], top: float) -> None:
    # The scale leaves a margin, so that no mark is cut off at either end.
    values = [value for points in rows.values() for _, value in points]
    pad = (max(values) - min(values)) * 0.06 or 1.0
    scale = Scale(min(values) - pad, max(values) + pad, LEFT, WIDTH - 14)
    text(root, 8, top + 18, title, "head")
    _legend(root, dict(plot.marks.values()), LEFT + 60, top + 18)

    for index, (row, points) in enumerate(rows.items()):
        y = top + HEAD + ROW * (index + 0.5)
        text(root, LEFT - 10, y + 4, row, "", "end")
        line(root, (LEFT, y), (WIDTH - 14, y), "row")
        for kind, value in points:
            shape, label = plot.marks[kind]
            marker(root, scale(value), y, shape, shape, f"{row}, {label}: {value:.4g}")
        if not points:
            text(root, LEFT + 4, y + 4, "not measured", "tick")
    x_axis(root, scale, top + HEAD + ROW * len(rows), plot.axis)


def _legend(root: ET.Element, labels: Mapping[str, str], x: float, y: float) -> None:
    for shape, label in labels.items():
        marker(root, x, y - 4, shape, shape)
        text(root, x + 10, y, label, "tick")
        x += 30 + text_width(label)
