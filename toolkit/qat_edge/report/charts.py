"""Drawing primitives of the charts: scales, ticks, axes and shapes, as an element tree so that text is escaped.

Colors are CSS classes of style.css. A chart is 410 units wide, so that its text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from qat_edge.report.formatting import number, plain

WIDTH = 410
RAW_POINTS = 360  # of an unsmoothed line: more would be narrower than a pixel
LINE = 15  # height of a line of text
# SVG cannot measure text without a browser, so labels are placed by this estimate.
_CHARACTER = 6.4  # mean width of a character at font size 12

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """Map values to coordinates, linearly or logarithmically.

    Attributes:
        low: Value at the coordinate `start`.
        high: Value at the coordinate `end`.
        start: First coordinate.
        end: Last coordinate.
        log: Whether the scale is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value, the middle if all values are equal."""
        low, high = self._map(self.low), self._map(self.high)
        share = (self._map(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values within the scale, about `most` of them or fewer."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return multiples of 1, 2, 2.5 or 5 times a power of ten between `low` and `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    # The smallest round step with at most `most` intervals; the tolerance keeps a step equal to `raw` up to rounding.
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))

    # Ticks outside the axis are left out, up to rounding errors.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between `low` and `high`; fewer per power if those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # From the densest to the sparsest choice.
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**p for p in powers for s in steps]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    # Even the powers of ten are too many: take every second or third.
    return found[:: math.ceil(len(found) / most)]


def nice_top(value: float) -> float:
    """Return the first tick at or above `value`: the end of an axis that starts at zero."""
    if value <= 0:
        return 1.0
    ticks = linear_ticks(0, value, 5)
    step = ticks[1] - ticks[0]
    return round(math.ceil(value / step - 1e-9) * step, 12)


def smooth(points: Points) -> Points:
    """Return the exponential moving average over about a twentieth of the points.

    Dividing by the sum of the weights corrects the bias at the start, as Adam does (https://arxiv.org/abs/1412.6980).
    """
    # Weight of the past for a span of n points: 1 - 2 / (n + 1).
    keep = 1 - 2 / (max(len(points) / 20, 1) + 1)
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append((step, mean / weight))
    return smoothed


def thin(points: Points, most: int = RAW_POINTS) -> Points:
    """Return about `most` points or fewer: the minimum and the maximum of each stretch, so that peaks stay visible."""
    if len(points) <= most:
        return points
    # Two points remain of each stretch.
    stretch = math.ceil(2 * len(points) / most)
    kept: Points = []
    for first in range(0, len(points), stretch):
        part = sorted(points[first : first + stretch], key=lambda point: point[1])
        # In their original order; a stretch with one extreme gives one point.
        kept += sorted({part[0], part[-1]})
    return kept


def canvas(name: str, title: str, description: str, height: float, width: float = WIDTH) -> ET.Element:
    """Return an empty chart with a title and a description for screen readers.

    Args:
        name: Prefix of the element ids, unique on the page.
        title: Title of the chart.
        description: The data of the chart, in words.
        height: Height in units of the view box.
        width: Width in units of the view box.
    """
    # The view box scales the chart to the width of its container.
    root = ET.Element(
        "svg",
        {
            "class": "chart",
            "viewBox": f"0 0 {width:g} {height:g}",
            "role": "img",
            "aria-labelledby": f"{name}-title {name}-desc",
        },
    )
    ET.SubElement(root, "title", {"id": f"{name}-title"}).text = plain(title)
    ET.SubElement(root, "desc", {"id": f"{name}-desc"}).text = plain(description)
    return root


def rect(parent: ET.Element, x: float, y: float, width: float, height: float, css: str, tip: str = "") -> None:
    """Draw a rectangle; `tip` is its tooltip."""
    size = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{max(width, 0):g}", "height": f"{max(height, 0):g}"}
    _tooltip(ET.SubElement(parent, "rect", {**size, "class": css}), tip)


def line(parent: ET.Element, start: tuple[float, float], end: tuple[float, float], css: str) -> None:
    """Draw a straight line."""
    ends = {"x1": f"{start[0]:g}", "y1": f"{start[1]:g}", "x2": f"{end[0]:g}", "y2": f"{end[1]:g}"}
    ET.SubElement(parent, "line", {**ends, "class": css})


def path(parent: ET.Element, points: Sequence[tuple[float, float]], css: str) -> None:
    """Draw a line through all points."""
    if points:
        steps = " ".join(f"{x:g},{y:g}" for x, y in points)
        ET.SubElement(parent, "polyline", {"points": steps, "class": css})


def text(parent: ET.Element, x: float, y: float, words: str, css: str = "", anchor: str = "start") -> None:
    """Write text on the baseline `y`. anchor: "start", "middle" or "end", the part of the text at `x`."""
    position = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor}
    ET.SubElement(parent, "text", {**position, "class": css} if css else position).text = plain(words)


def marker(parent: ET.Element, x: float, y: float, shape: str, css: str, tip: str = "") -> None:
    """Draw a point. shape: "circle", "square", "diamond", "triangle" or "star"; `tip` is its tooltip."""
    if shape == "circle":
        element = ET.SubElement(parent, "circle", {"cx": f"{x:g}", "cy": f"{y:g}", "r": "5.5", "class": css})
    else:
        # A diamond is drawn larger, so that all shapes look equally large.
        r = 5 if shape == "square" else 7
        corners = {
            "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
            "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)],
            "triangle": [(0, -r), (r, r - 1), (-r, r - 1)],
            "star": [(0, -r), (2, -2), (r, 0), (2, 2), (0, r), (-2, 2), (-r, 0), (-2, -2)],
        }
        points = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in corners[shape])
        element = ET.SubElement(parent, "polygon", {"points": points, "class": css})
    _tooltip(element, tip)


def row_label(parent: ET.Element, x: float, middle: float, name: str, detail: str) -> None:
    """Write `name · detail` to the left of `x`, on two lines if one is too long."""
    whole = f"{name} · {detail}" if detail else name
    if text_width(whole) <= x or not detail:
        text(parent, x, middle + 4, shorten(whole, x), "row", "end")
        return
    text(parent, x, middle - 3, shorten(name, x), "row", "end")
    text(parent, x, middle + 10, shorten(detail, x), "tick", "end")


def x_axis(parent: ET.Element, scale: Scale, y: float, name: str, most: int = 6) -> None:
    """Draw ticks with their values below `y`, and the name of the axis."""
    line(parent, (scale.start, y), (scale.end, y), "axis")
    for value in scale.ticks(most):
        line(parent, (scale(value), y), (scale(value), y + 4), "axis")
        text(parent, scale(value), y + 17, tick_text(value), "tick", "middle")
    if name:
        text(parent, (scale.start + scale.end) / 2, y + 35, name, "name", "middle")


def y_axis(parent: ET.Element, scale: Scale, right: float, x: float, most: int = 5, unit: str = "") -> None:
    """Draw grid lines from `x` to `right`, with their values at the left."""
    for value in scale.ticks(most):
        line(parent, (x, scale(value)), (right, scale(value)), "grid")
        text(parent, x - 7, scale(value) + 4, tick_text(value) + unit, "tick", "end")


def tick_text(value: float) -> str:
    """Format the value of a tick, without trailing zeros."""
    # Ten digits hide the rounding error of a multiple of the step.
    short = f"{value:,.10g}" if abs(value) >= 1e-4 or value == 0 else number(value)
    return short.replace("-", "−")


def shorten(words: str, width: float) -> str:
    """Cut a text with an ellipsis so that it fits `width` units."""
    most = max(int(width / _CHARACTER), 2)
    return words if len(words) <= most else words[: most - 1] + "…"


def text_width(words: str) -> float:
    """Return the approximate width of a text in units."""
    return len(words) * _CHARACTER


def to_svg(root: ET.Element) -> str:
    """Return the chart as markup."""
    return ET.tostring(root, encoding="unicode")


def _tooltip(element: ET.Element, words: str) -> None:
    if words:
        ET.SubElement(element, "title").text = plain(words)
