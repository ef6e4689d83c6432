"""The drawing under the plots: scales, ticks, axes and shapes as an element tree, so that any text is escaped.

Colours are CSS classes of style.css; a chart is drawn 410 units wide, so that text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from qat_edge.report.figures import number, plain

WIDTH = 410
RAW_POINTS = 360  # of a faint line: more would be narrower than a pixel
LINE = 15  # height of a line of text
_CHARACTER = 6.4  # mean width of a character at 12 units; labels are placed by it

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """Values `low` to `high` onto `start` to `end`, evenly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._map(self.low), self._map(self.high)
        share = (self._map(value) - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale, at most about `most` of them."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten between `low` and `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2 and 5 times powers of ten between `low` and `high`; the powers alone where that is too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**p for p in powers for s in steps]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def nice_top(value: float) -> float:
    """The first tick at or above `value`: where an axis that starts at zero may end."""
    if value <= 0:
        return 1.0
    ticks = linear_ticks(0, value, 5)
    step = ticks[1] - ticks[0]
    return round(math.ceil(value / step - 1e-9) * step, 12)


def smooth(points: Points) -> Points:
    """Exponential mean over about a twentieth of the points, corrected for its start."""
    keep = 1 - 2 / (max(len(points) / 20, 1) + 1)
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append((step, mean / weight))
    return smoothed


def thin(points: Points, most: int = RAW_POINTS) -> Points:
    """At most about `most` points that keep the least and the greatest of each stretch."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept: Points = []
    for first in range(0, len(points), stretch):
        part = sorted(points[first : first + stretch], key=lambda point: point[1])
        kept += sorted({part[0], part[-1]})
    return kept


def canvas(name: str, title: str, description: str, height: float, width: float = WIDTH) -> ET.Element:
    """An empty chart with the title and description that screen readers speak."""
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
    """A bar; `tip` shows when the pointer rests on it."""
    size = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{max(width, 0):g}", "height": f"{max(height, 0):g}"}
    _tip(ET.SubElement(parent, "rect", {**size, "class": css}), tip)


def line(parent: ET.Element, start: tuple[float, float], end: tuple[float, float], css: str) -> None:
    """A straight line."""
    ends = {"x1": f"{start[0]:g}", "y1": f"{start[1]:g}", "x2": f"{end[0]:g}", "y2": f"{end[1]:g}"}
    ET.SubElement(parent, "line", {**ends, "class": css})


def path(parent: ET.Element, points: Sequence[tuple[float, float]], css: str) -> None:
    """A line through all the points."""
    if points:
        steps = " ".join(f"{x:g},{y:g}" for x, y in points)
        ET.SubElement(parent, "polyline", {"points": steps, "class": css})


def text(parent: ET.Element, x: float, y: float, words: str, css: str = "", anchor: str = "start") -> None:
    """Words on a baseline; anchor: start, middle or end."""
    place = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor}
    ET.SubElement(parent, "text", {**place, "class": css} if css else place).text = plain(words)


def marker(parent: ET.Element, x: float, y: float, shape: str, css: str, tip: str = "") -> None:
    """A point: circle, square or diamond."""
    if shape == "circle":
        element = ET.SubElement(parent, "circle", {"cx": f"{x:g}", "cy": f"{y:g}", "r": "5.5", "class": css})
    else:
        r = 5 if shape == "square" else 7
        corners = [(-r, -r), (r, -r), (r, r), (-r, r)] if shape == "square" else [(0, -r), (r, 0), (0, r), (-r, 0)]
        points = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in corners)
        element = ET.SubElement(parent, "polygon", {"points": points, "class": css})
    _tip(element, tip)


def x_axis(parent: ET.Element, scale: Scale, y: float, name: str, most: int = 6) -> None:
    """Ticks and their values below `y`, and what they measure."""
    line(parent, (scale.start, y), (scale.end, y), "axis")
    for value in scale.ticks(most):
        line(parent, (scale(value), y), (scale(value), y + 4), "axis")
        text(parent, scale(value), y + 17, tick_text(value), "tick", "middle")
    if name:
        text(parent, (scale.start + scale.end) / 2, y + 35, name, "name", "middle")


def y_axis(parent: ET.Element, scale: Scale, right: float, x: float, most: int = 5, unit: str = "") -> None:
    """Grid lines from `x` to `right` with their values at the left."""
    for value in scale.ticks(most):
        line(parent, (x, scale(value)), (right, scale(value)), "grid")
        text(parent, x - 7, scale(value) + 4, tick_text(value) + unit, "tick", "end")


def tick_text(value: float) -> str:
    """A tick's value without trailing zeros."""
    short = f"{value:,.10g}" if abs(value) >= 1e-4 or value == 0 else number(value)
    return short.replace("-", "−")


def shorten(words: str, width: float) -> str:
    """The words, cut so that they fit `width` units."""
    most = max(int(width / _CHARACTER), 2)
    return words if len(words) <= most else words[: most - 1] + "…"


def text_width(words: str) -> float:
    """About how wide the words are drawn."""
    return len(words) * _CHARACTER


def to_svg(root: ET.Element) -> str:
    """The chart as markup."""
    return ET.tostring(root, encoding="unicode")


def _tip(element: ET.Element, words: str) -> None:
    if words:
        ET.SubElement(element, "title").text = plain(words)
