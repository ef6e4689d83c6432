"""Page of `qat-edge sensitivity` (sensitivity.html): the KL that each weight costs, and what more bits would save."""

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
from qat_edge.report.formatting import duration, megabytes, number
from qat_edge.report.run_page import Plot, environment, style
from qat_edge.report.tables import Table, TableCell, TableRow

SHADES = 9  # CSS classes shade-1 to shade-9, which the template defines
DECADES = 4.0  # range of the shades: from the largest KL down to this many powers of ten below it
CELL = 22.0  # height of a row of the heat map
# Shades of the map of chosen bits, by the number of widths that were measured.
CHOSEN = {1: (SHADES,), 2: (2, SHADES), 3: (1, 4, SHADES)}
NAMES = 78.0  # width of the row names at the left of a heat map


def render(measured: Sensitivity, choice: Choice | None) -> str:
    """Return the HTML of the whole page.

    Args:
        measured: KL and size of each weight at each width.
        choice: The chosen bits, if a size or a KL was requested.
    """
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
        chosen=_choice_summary(measured, choice) if choice else "",
        uniform=_uniform_table(measured),
        plots=_plots(measured, choice),
        table=table(measured, choice),
        version=__version__,
    )  # fmt: skip


def raised(measured: Sensitivity, choice: Choice) -> str:
    """Return `53 of 210 weights get 8 bits`, counting only the weights that can have more than one width.

    With three widths, `53 of 210 weights get 8 bits, 20 get 4 bits`.
    """
    # Embedding and head have one width only, so they do not count.
    free = [name for name, weight in measured.weights.items() if len(weight.costs) > 1]
    counts = [(bits, sum(choice.bits[name] == bits for name in free)) for bits in reversed(measured.widths[1:])]
    (widest, count), *others = counts or [(8, 0)]
    return f"{count} of {len(free)} weights get {widest} bits" + "".join(f", {n} get {bits} bits" for bits, n in others)


def table(measured: Sensitivity, choice: Choice | None) -> Table:
    """Return all weights, sorted by their KL at the fewest bits, the largest first."""
    heads = [(f"KL, {bits} bits", "nats") for bits in measured.widths]
    heads += [(f"Size, {bits} bits", "kB") for bits in measured.widths]
    if choice is not None:
        heads.append(("Chosen", "bits"))
    rows = []
    # A weight that got more than its fewest bits is marked.
    for name, weight in measured.by_cost():
        cells = [_kl_cell(weight, bits) for bits in measured.widths]
        cells += [_size_cell(weight, bits) for bits in measured.widths]
        if choice is not None:
            bits = choice.bits[name]
            cells.append(TableCell(str(bits), bits, best=bits > min(weight.costs)))
        rows.append(TableRow(name, "", cells))
    caption = "Each weight is quantized alone, with int8 inputs of its layer (one scale per token)."
    return Table(caption, heads, rows, first="Weight")


def heat_map(name: str, measured: Sensitivity, bits: int) -> str:
    """Draw KL at `bits` by decoder layer (across) and projection (down), on a logarithmic scale of shades."""
    largest = _largest_kl(measured)
    cells = []
    for weight in measured.weights.values():
        if weight.layer is None or bits not in weight.costs:
            continue
        kl = weight.costs[bits].kl_nats
        tip = f"{number(kl)} nats per token at {bits} bits"
        cells.append(HeatMapCell(weight.layer, weight.kind, tip, shade(kl, largest)))
    return _heat_map(name, f"KL at {bits} bits", cells)


def chosen_map(name: str, measured: Sensitivity, choice: Choice) -> str:
    """Draw the chosen bits by decoder layer (across) and projection (down)."""
    shades = _width_shades(measured)
    cells = [
        HeatMapCell(weight.layer, weight.kind, f"{choice.bits[name]} bits", shades[choice.bits[name]])
        for name, weight in measured.weights.items()
        if weight.layer is not None
    ]
    return _heat_map(name, "Chosen bits", cells)


def _width_shades(measured: Sensitivity) -> dict[int, int]:
    """Return the shade of each measured width in the map of chosen bits."""
    return dict(zip(measured.widths, CHOSEN[len(measured.widths)], strict=True))


def shade(kl: float, largest: float) -> int:
    """Return a shade from 1 (`DECADES` powers of ten below the largest KL, or less) to SHADES (the largest KL)."""
    if kl <= 0 or largest <= 0:
        return 1
    # Equal steps of the logarithm, since KL spans several powers of ten.
    below = math.log10(largest / kl) / DECADES
    return max(1, SHADES - math.floor(min(below, 1.0) * SHADES))


def trade_off(name: str, measured: Sensitivity, choice: Choice | None) -> str:
    """Draw the predicted KL against the size of all weights, as layers are raised from the fewest bits to 8."""
    points = [(size / MEGABYTE, kl) for size, kl in frontier(measured.costs, measured.float_bytes)]
    if len(points) < 2:
        return ""

    root = canvas(name, "Predicted KL against size", _trade_off_description(points), 290)
    # From the smallest size (fewest bits) to the largest.
    x = Scale(points[0][0], points[-1][0], 48, WIDTH - 16)
    y = Scale(0, nice_top(points[0][1]), 240, 30)
    text(root, 0, 14, "predicted KL, nats per token", "name")
    y_axis(root, y, x.end, x.start)
    x_axis(root, x, y.start, "codes, scales and float parameters, MB")
    path(root, [(x(size), y(kl)) for size, kl in points], "smooth s-qat")

    _mark_uniform(root, x, y, points, measured.widths)
    if choice is not None:
        _mark_choice(root, x, y, choice)
    return to_svg(root)


@dataclass(frozen=True)
class HeatMapCell:
    """One cell of a heat map.

    Attributes:
        layer: Index of the decoder layer.
        projection: Name of the projection, such as "q_proj".
        tip: Tooltip, without layer and projection.
        shade: 1 to SHADES.
    """

    layer: int
    projection: str
    tip: str
    shade: int


def _heat_map(name: str, title: str, cells: Sequence[HeatMapCell]) -> str:
    """Draw decoder layers across and projections down; empty if there are no cells."""
    if not cells:
        return ""
    layers = 1 + max(cell.layer for cell in cells)
    projections = list(dict.fromkeys(cell.projection for cell in cells))
    bottom = CELL * len(projections)
    root = canvas(name, title, f"{layers} decoder layers across, {', '.join(projections)} down.", bottom + 44)
    x = Scale(0, layers, NAMES, WIDTH - 4)

    for index, projection in enumerate(projections):
        text(root, NAMES - 8, CELL * (index + 0.5) + 4, shorten(projection, NAMES - 8), "row", "end")
    for cell in cells:
        left, right = x(cell.layer), x(cell.layer + 1)
        tip = f"layer {cell.layer}, {cell.projection}: {cell.tip}"
        top = CELL * projections.index(cell.projection)
        rect(root, left, top, right - left, CELL, f"heat shade-{cell.shade}", tip)

    # About eight of the layers are numbered, so that the numbers do not touch.
    for layer in range(0, layers, max(1, math.ceil(layers / 8))):
        text(root, x(layer + 0.5), bottom + 15, str(layer), "tick", "middle")
    text(root, (x.start + x.end) / 2, bottom + 34, "decoder layer", "name", "middle")
    return to_svg(root)


def _mark_uniform(
    root: Element, x: Scale, y: Scale, points: Sequence[tuple[float, float]], widths: Sequence[int]
) -> None:
    """Mark the ends of the line: every weight at its fewest bits, and every weight that gains by it at most bits."""
    ends = ((points[0], widths[0], "start", 10), (points[-1], widths[-1], "end", -10))
    for (size, kl), bits, anchor, shift in ends:
        tip = f"all at {bits} bits: {number(size)} MB, {number(kl)} nats per token predicted"
        marker(root, x(size), y(kl), "square", "point c-ptq", tip)
        text(root, x(size) + shift, y(kl) - 14, f"all {bits} bits", "point-name t-ptq halo", anchor)


def _mark_choice(root: Element, x: Scale, y: Scale, choice: Choice) -> None:
    """Mark the chosen bits, with the label on the side that has space."""
    left, height = x(choice.size_bytes / MEGABYTE), y(choice.kl_nats)
    tip = f"chosen: {megabytes(choice.size_bytes)} MB, {number(choice.kl_nats)} nats per token predicted"
    line(root, (left, height), (left, y.start), "gain")
    marker(root, left, height, "circle", "point c-qat", tip)
    anchor = "end" if left + 10 + text_width("chosen") > x.end else "start"
    text(root, left + (10 if anchor == "start" else -10), height - 12, "chosen", "point-name t-qat halo", anchor)


def _plots(measured: Sensitivity, choice: Choice | None) -> list[Plot]:
    """Return the heat maps, and the chart of KL against size; a chart without data is left out."""
    legend = _shade_legend(_largest_kl(measured))
    # Embedding and head belong to no decoder layer.
    tables = [name for name, weight in measured.weights.items() if weight.layer is None]
    outside = f"Not in a decoder layer (see the table): {', '.join(tables)}." if tables else ""
    fewest, *wider = measured.widths
    captions = {fewest: outside} | dict.fromkeys(wider, f"Same shades as for {fewest} bits.")
    plots = []

    # All maps share their shades, so that they can be compared.
    for bits, caption in captions.items():
        svg = heat_map(f"heat-{bits}", measured, bits)
        if svg:
            plots.append(Plot(f"KL of each weight at {bits} bits", Markup(svg), caption, legend))

    if choice is not None:
        svg = chosen_map("chosen", measured, choice)
        if svg:
            widths = [(f"shade-{shade}", f"{bits} bits") for bits, shade in _width_shades(measured).items()]
            plots.append(Plot("Chosen bits", Markup(svg), "", widths))

    # Size against KL comes last: it sums up the maps.
    svg = trade_off("trade-off", measured, choice)
    if svg:
        caption = f"Predicted KL is the sum of the KL of each weight alone. {_sizes_note(measured)}"
        ends = [("l-square c-ptq", "all weights at one width"), *([("l-circle c-qat", "chosen")] if choice else [])]
        plots.append(Plot("Predicted KL against size", Markup(svg), caption, ends))
    return plots


def _sizes_note(measured: Sensitivity) -> str:
    """Return which artifact the sizes are those of."""
    if min(measured.widths) < 4:
        return "Sizes are those of an ONNX folder, which alone can hold 2-bit weights; its scales are float32."
    return (
        "Sizes are those of a .pte with embedding and head in two tables. With --rotate off, embedding and head share "
        "one int8 table, in a .pte and in an ONNX folder; ONNX stores float32 scales."
    )


def _uniform_table(measured: Sensitivity) -> Table:
    """Return, for every weight at one width, the sum of the single KLs and the KL measured with all together."""
    rows = []
    for bits, kl in measured.together.items():
        # The difference shows how far the prediction can be trusted.
        predicted, size = measured.predicted(bits), measured.size_bytes(bits)
        cells = [
            TableCell(number(predicted), predicted),
            TableCell(number(kl), kl),
            TableCell(megabytes(size), size),
        ]
        rows.append(TableRow(f"all at {bits} bits", "", cells))
    heads = [("KL, predicted", "nats"), ("KL, measured", "nats"), ("Weights", "MB")]
    return Table("All weights at one width, embedding and head always at 8 bits", heads, rows, first="Scheme")


def _choice_summary(measured: Sensitivity, choice: Choice) -> str:
    return (
        f"{choice.request}: {raised(measured, choice)} instead of {min(measured.widths)}. All weights together take "
        f"{megabytes(choice.size_bytes)} MB; the predicted KL is {number(choice.kl_nats)} nats per token."
    )


def _kl_cell(weight: LayerCost, bits: int) -> TableCell:
    if bits not in weight.costs:
        return TableCell("int8 only")
    kl = weight.costs[bits].kl_nats
    return TableCell(number(kl), kl)


def _size_cell(weight: LayerCost, bits: int) -> TableCell:
    if bits not in weight.costs:
        return TableCell("int8 only")
    size = weight.costs[bits].size_bytes
    return TableCell(f"{size / 1e3:,.0f}", size)


def _largest_kl(measured: Sensitivity) -> float:
    """Return the largest KL of a weight in a decoder layer, which gets the darkest shade."""
    inside = [weight for weight in measured.weights.values() if weight.layer is not None]
    return max((cost.kl_nats for weight in inside for cost in weight.costs.values()), default=0.0)


def _shade_legend(largest: float) -> list[tuple[str, str]]:
    """Return a swatch for the largest KL and for each power of ten below it, down to the lightest shade."""
    if largest <= 0:
        return []
    # The last swatch includes everything below it.
    values = [largest / 10**step for step in range(int(DECADES) + 1)]
    return [(f"shade-{shade(kl, largest)}", f"{'≤ ' if kl == values[-1] else ''}{number(kl, 2)}") for kl in values]


def _trade_off_description(points: Sequence[tuple[float, float]]) -> str:
    (small, high), (large, low) = points[0], points[-1]
    return f"From {number(small)} MB and {number(high)} nats per token to {number(large)} MB and {number(low)}."
