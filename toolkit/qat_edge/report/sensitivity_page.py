"""The page of `qat-edge sensitivity`: where the bits matter, what more of them buy, every weight in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from markupsafe import Markup

from qat_edge import __version__
from qat_edge.quant.bit_allocation import MEGABYTE, Choice, LayerCost, Sensitivity, frontier
from qat_edge.report.charts import (
    WIDTH,
    Scale,
    canvas,
    line,
    marker,
    nice_top,
    path,
    rect,
    shorten,
    text,
    text_width,
    to_svg,
    x_axis,
    y_axis,
)
from qat_edge.report.figures import duration, megabytes, number
from qat_edge.report.run_page import Plot, environment, style
from qat_edge.report.tables import Cell, Row, Table

SHADES = 9  # classes shade-1 to shade-9 of the page's style
DECADES = 4.0  # of KL below the greatest that shades tell apart
CELL = 22.0  # height of a row of the heat map
CHOSEN = {4: 2, 8: SHADES}  # shades of the map of chosen bits
NAMES = 78.0  # width kept for the names beside it


def render(measured: Sensitivity, choice: Choice | None) -> str:
    """The whole page as one text."""
    return environment().get_template("sensitivity.html").render(
        model=measured.model,
        style=style(),
        shades=range(1, SHADES + 1),
        most_shade=SHADES,
        measured=measured,
        compared=f"{measured.compared:,}",
        tokens=f"{measured.tokens:,}",
        duration=duration(measured.wall_s),
        choice=choice,
        chosen=_chosen_words(measured, choice) if choice else "",
        uniform=_uniform_table(measured),
        plots=_plots(measured, choice),
        table=table(measured, choice),
        version=__version__,
    )  # fmt: skip


def raised(measured: Sensitivity, choice: Choice) -> str:
    """`53 of 210 weights get 8 bits`: of those that can have 4 or 8."""
    count = sum(bits > min(measured.weights[name].costs) for name, bits in choice.bits.items())
    return f"{count} of {sum(len(weight.costs) > 1 for weight in measured.weights.values())} weights get 8 bits"


def table(measured: Sensitivity, choice: Choice | None) -> Table:
    """The weights by what they cost at their fewest bits, the costliest first."""
    heads = [("4 bits", "KL, nats"), ("8 bits", "KL, nats"), ("4 bits", "kB"), ("8 bits", "kB")]
    if choice is not None:
        heads.append(("chosen", "bits"))
    rows = []
    for name, weight in measured.by_cost():
        cells = [_cell(weight, bits, "kl") for bits in (4, 8)] + [_cell(weight, bits, "size") for bits in (4, 8)]
        if choice is not None:
            cells.append(Cell(str(choice.bits[name]), choice.bits[name], best=choice.bits[name] > min(weight.costs)))
        rows.append(Row(name, "", cells))
    caption = "Each weight rounded alone, with the input of its layer as int8 per token."
    return Table(caption, heads, rows, first="Weight")


def heat_map(name: str, measured: Sensitivity, bits: int) -> str:
    """KL at `bits` by decoder layer (across) and kind of projection (down), shaded by logarithm."""
    greatest = _greatest(measured)
    cells = [
        _Square(weight.layer, weight.kind, f"{number(kl)} nats per token at {bits} bits", shade(kl, greatest))
        for weight in measured.weights.values()
        if weight.layer is not None and bits in weight.costs
        for kl in (weight.costs[bits].kl_nats,)
    ]
    return _map(name, f"KL at {bits} bits", cells)


def chosen_map(name: str, measured: Sensitivity, choice: Choice) -> str:
    """Bits by decoder layer (across) and kind of projection (down)."""
    cells = [
        _Square(weight.layer, weight.kind, f"{choice.bits[name]} bits", CHOSEN[choice.bits[name]])
        for name, weight in measured.weights.items()
        if weight.layer is not None
    ]
    return _map(name, "Chosen bits", cells)


def shade(kl: float, greatest: float) -> int:
    """1 for `DECADES` or more below the greatest, SHADES at it, even steps of the logarithm between."""
    if kl <= 0 or greatest <= 0:
        return 1
    below = math.log10(greatest / kl) / DECADES
    return max(1, SHADES - math.floor(min(below, 1.0) * SHADES))


def trade_off(name: str, measured: Sensitivity, choice: Choice | None) -> str:
    """Predicted KL against the size of all weights, as layers are raised from 4 to 8 bits."""
    points = [(size / MEGABYTE, kl) for size, kl in frontier(measured.costs, measured.float_bytes)]
    if len(points) < 2:
        return ""
    root = canvas(name, "What more bits buy", _trade_words(points), 290)
    x = Scale(points[0][0], points[-1][0], 48, WIDTH - 16)
    y = Scale(0, nice_top(points[0][1]), 240, 30)
    text(root, 0, 14, "predicted KL, nats per token", "name")
    y_axis(root, y, x.end, x.start)
    x_axis(root, x, y.start, "codes, scales and float parameters, MB")
    path(root, [(x(size), y(kl)) for size, kl in points], "smooth s-qat")
    _mark_uniform(root, x, y, points)
    if choice is not None:
        left, height = x(choice.size_bytes / MEGABYTE), y(choice.kl_nats)
        tip = f"chosen: {megabytes(choice.size_bytes)} MB, {number(choice.kl_nats)} nats per token predicted"
        line(root, (left, height), (left, y.start), "gain")
        marker(root, left, height, "circle", "point c-qat", tip)
        anchor = "end" if left + 10 + text_width("chosen") > x.end else "start"
        text(root, left + (10 if anchor == "start" else -10), height - 12, "chosen", "point-name t-qat halo", anchor)
    return to_svg(root)


@dataclass(frozen=True)
class _Square:
    """One square of a map. shade: 1 to SHADES."""

    layer: int
    kind: str
    words: str
    shade: int


def _map(name: str, title: str, squares: Sequence[_Square]) -> str:
    """Decoder layers across, kinds of projection down; empty where there is no square."""
    if not squares:
        return ""
    layers = 1 + max(square.layer for square in squares)
    kinds = list(dict.fromkeys(square.kind for square in squares))
    bottom = CELL * len(kinds)
    root = canvas(name, title, f"{layers} decoder layers across, {', '.join(kinds)} down.", bottom + 44)
    x = Scale(0, layers, NAMES, WIDTH - 4)
    for index, kind in enumerate(kinds):
        text(root, NAMES - 8, CELL * (index + 0.5) + 4, shorten(kind, NAMES - 8), "row", "end")
    for square in squares:
        left, right = x(square.layer), x(square.layer + 1)
        tip = f"layer {square.layer}, {square.kind}: {square.words}"
        rect(root, left, CELL * kinds.index(square.kind), right - left, CELL, f"heat shade-{square.shade}", tip)
    for layer in range(0, layers, max(1, math.ceil(layers / 8))):
        text(root, x(layer + 0.5), bottom + 15, str(layer), "tick", "middle")
    text(root, (x.start + x.end) / 2, bottom + 34, "decoder layer", "name", "middle")
    return to_svg(root)


def _mark_uniform(root: Element, x: Scale, y: Scale, points: Sequence[tuple[float, float]]) -> None:
    """The two ends of the line: every weight at its fewest bits, every weight at 8 that gains by it."""
    for (size, kl), words, anchor, shift in ((points[0], "4 bits", "start", 10), (points[-1], "8 bits", "end", -10)):
        tip = f"all at {words}: {number(size)} MB, {number(kl)} nats per token predicted"
        marker(root, x(size), y(kl), "square", "point c-ptq", tip)
        text(root, x(size) + shift, y(kl) - 14, f"all {words}", "point-name t-ptq halo", anchor)


def _plots(measured: Sensitivity, choice: Choice | None) -> list[Plot]:
    legend = _shade_legend(_greatest(measured))
    tables = [name for name, weight in measured.weights.items() if weight.layer is None]
    outside = f"Not in a decoder layer, see the table: {', '.join(tables)}." if tables else ""
    maps = [
        Plot(f"{bits} bits", Markup(svg), outside if bits == 4 else "Shaded on the same scale.", legend)
        for bits in (4, 8)
        if (svg := heat_map(f"heat-{bits}", measured, bits))
    ]
    if choice is not None and (svg := chosen_map("chosen", measured, choice)):
        words = [(f"shade-{CHOSEN[bits]}", f"{bits} bits") for bits in (4, 8)]
        maps.append(Plot("Chosen bits", Markup(svg), "", words))
    curve = trade_off("trade-off", measured, choice)
    if not curve:
        return maps
    caption = (
        "Sum of what each weight costs alone. Sizes as a .pte holds them, embedding and head in two tables: with "
        "--rotate off, a .pte and an ONNX folder have one int8 table for both; ONNX has float32 scales."
    )
    ends = [("l-square c-ptq", "all weights at one width"), *([("l-circle c-qat", "chosen")] if choice else [])]
    return [*maps, Plot("What more bits buy", Markup(curve), caption, ends)]


def _uniform_table(measured: Sensitivity) -> Table:
    """Every weight at one width: what the single costs predict, and what was measured of all at once."""
    rows = []
    for bits, kl in measured.together.items():
        predicted, size = measured.predicted(bits), measured.size_bytes(bits)
        cells = [Cell(number(predicted), predicted), Cell(number(kl), kl), Cell(megabytes(size), size)]
        rows.append(Row(f"all at {bits} bits", "", cells))
    heads = [("predicted", "KL, nats"), ("measured", "KL, nats"), ("weights", "MB")]
    return Table("Every weight at one width, embedding and head always at 8 bits.", heads, rows, first="Scheme")


def _chosen_words(measured: Sensitivity, choice: Choice) -> str:
    return (
        f"{choice.asked}: {raised(measured, choice)} instead of 4. All weights take "
        f"{megabytes(choice.size_bytes)} MB, {number(choice.kl_nats)} nats per token are predicted."
    )


def _cell(weight: LayerCost, bits: int, what: str) -> Cell:
    if bits not in weight.costs:
        return Cell("int8 only")
    cost = weight.costs[bits]
    if what == "kl":
        return Cell(number(cost.kl_nats), cost.kl_nats)
    return Cell(f"{cost.size_bytes / 1e3:,.0f}", cost.size_bytes)


def _greatest(measured: Sensitivity) -> float:
    """The greatest KL of a weight of a decoder layer, which gets the darkest shade."""
    inside = [weight for weight in measured.weights.values() if weight.layer is not None]
    return max((cost.kl_nats for weight in inside for cost in weight.costs.values()), default=0.0)


def _shade_legend(greatest: float) -> list[tuple[str, str]]:
    """Swatches of the darkest shade, the lightest and the steps of ten between them."""
    if greatest <= 0:
        return []
    values = [greatest / 10**step for step in range(int(DECADES) + 1)]
    return [(f"shade-{shade(kl, greatest)}", f"{'≤ ' if kl == values[-1] else ''}{number(kl, 2)}") for kl in values]


def _trade_words(points: Sequence[tuple[float, float]]) -> str:
    (small, much), (large, little) = points[0], points[-1]
    return f"From {number(small)} MB and {number(much)} nats per token to {number(large)} MB and {number(little)}."
