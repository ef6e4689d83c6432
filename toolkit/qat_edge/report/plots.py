"""The four plots, each a pure function from figures to SVG; empty where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree as ET

from qat_edge.evaluate.results import Measured, Spread
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
from qat_edge.report.figures import PARTS, ROLES, Model, label, megabytes, number, percent, plain, quantized, role

SHAPES = {"executorch": "circle", "onnx": "square"}
LOG_FROM = 12.0  # ratio of largest to smallest size from which a logarithm is easier to read
LEFT = 42.0
ROW = 30.0
TALL_ROW = 40.0
LABELS = 124.0  # width kept for the names beside bars
PHASES = {"lora": "LoRA, float", "qat": "QAT"}
_Box = tuple[float, float, float, float]  # left, right, top, bottom


def loss_curve(name: str, curve: Sequence[dict[str, Any]], unit: str = "nats per token") -> str:
    """Training loss, raw and smoothed, and evaluation losses over the steps of both phases."""
    losses = {phase: _points(curve, phase, "loss") for phase in PHASES}
    evals = {phase: _points(curve, phase, "eval_loss") for phase in PHASES}
    drawn = [point for part in (*losses.values(), *evals.values()) for point in part]
    if not drawn:
        return ""
    steps, values = [x for x, _ in drawn], [y for _, y in drawn]
    log = min(values) > 0 and max(values) / min(values) > 2 * LOG_FROM
    root = canvas(name, "Loss during training", _curve_words(losses, evals), 300)
    x = Scale(0, max(*steps, 1), LEFT, WIDTH - 12)
    y = Scale(min(values) if log else 0, max(values) if log else nice_top(max(values)), 252, 44, log)
    _shade_phases(root, losses, evals, x, y)
    text(root, 0, 14, f"loss, {unit}{', logarithmic' if log else ''}", "name")
    y_axis(root, y, x.end, LEFT, 7 if log else 5)
    x_axis(root, x, y.start, "optimizer step")
    for phase, points in losses.items():
        polyline(root, [(x(step), y(loss)) for step, loss in thin(points)], f"raw s-{phase}")
        polyline(root, [(x(step), y(loss)) for step, loss in thin(smooth(points))], f"smooth s-{phase}")
    for phase, points in evals.items():
        for step, loss in points:
            marker(root, x(step), y(loss), "circle", f"eval c-{phase}", f"step {step:g}: eval loss {number(loss)}")
    _eval_labels(root, x, y, evals)
    return to_svg(root)


def accuracy_by_size(name: str, rows: Sequence[Measured]) -> str:
    """Exact match over size, or perplexity where a model was asked no prompts."""
    exact, rows = exact_drawn(rows), shown_by_size(rows)
    if not rows:
        return ""
    sizes = [row.total_bytes / 1e6 for row in rows]
    log = max(sizes) / min(sizes) > LOG_FROM
    x = Scale(min(sizes) / 1.3, max(sizes) * 1.3, LEFT + 8, WIDTH - 14, log=True) if log else Scale(
        0, nice_top(max(sizes)), LEFT + 8, WIDTH - 14
    )  # fmt: skip
    top = 100.0 if exact else nice_top(max(row.perplexity for row in rows))
    y = Scale(0, top, 252, 34)
    places = [(x(row.total_bytes / 1e6), y(_quality(row, exact))) for row in rows]
    what = "exact match" if exact else "perplexity"
    words = "; ".join(f"{label(row)}: {megabytes(row.total_bytes)} MB, {_quality_words(row, exact)}" for row in rows)
    root = canvas(name, f"{what.capitalize()} against size", words, 300)
    text(root, 0, 14, "exact match, higher is better" if exact else "perplexity, lower is better", "name")
    y_axis(root, y, x.end, x.start, 5, "%" if exact else "")
    x_axis(root, x, y.start, f"size, MB{', logarithmic' if log else ''}")
    _gains(root, rows, places)
    for row, (left, height) in zip(rows, places, strict=True):
        tip = f"{label(row)}: {megabytes(row.total_bytes)} MB, {_quality_words(row, exact)}"
        marker(root, left, height, SHAPES.get(row.target, "diamond"), f"point c-{role(row)}", tip)
    _role_labels(root, rows, places, x.end)
    return to_svg(root)


def size_by_part(name: str, rows: Sequence[Model]) -> str:
    """Stacked bars of the quantized artifacts; of the float models where nothing else was measured."""
    rows = shown_by_part(rows)
    if not rows:
        return ""
    words = "; ".join(f"{label(row)}: {megabytes(row.total_bytes)} MB" for row in rows)
    bottom = 26 + TALL_ROW * len(rows)
    root = canvas(name, "Size by part", words, bottom + 26)
    x = Scale(0, nice_top(max(row.total_bytes for row in rows) / 1e6 * 1.02), LABELS, WIDTH - 52)
    text(root, 0, 14, "size of everything the device needs, MB", "name")
    for index, row in enumerate(rows):
        top = 26 + TALL_ROW * index
        middle = top + TALL_ROW / 2
        _row_label(root, row, middle)
        done = 0.0
        for part, size in ordered_parts(row):
            begin, end = x(done), x(done + size / 1e6)
            tip = f"{label(row)}, {plain(part)}: {megabytes(size)} MB"
            rect(root, begin, top + 5, end - begin, TALL_ROW - 10, f"part p-{part_class(part)}", tip)
            figure = megabytes(size)
            if end - begin > text_width(figure) + 6:
                text(root, (begin + end) / 2, middle + 4, figure, "inside", "middle")
            done += size / 1e6
        text(root, x(done) + 6, middle + 4, megabytes(row.total_bytes), "value")
    x_axis(root, x, bottom + 4, "")
    return to_svg(root)


def speed_bars(name: str, rows: Sequence[Measured]) -> str:
    """Medians of prefill and decode, with whiskers from the slowest to the fastest repeat."""
    rows = [row for row in rows if row.speed is not None]
    if not rows:
        return ""
    height = 30 + ROW * len(rows) + 24
    words = "; ".join(_speed_words(row) for row in rows)
    root = canvas(name, "Speed", words, 2 * height)
    timed = [(row, row.speed) for row in rows if row.speed is not None]
    _speed_panel(root, [(row, speed.prefill) for row, speed in timed], 0, "prefill, tokens per second")
    _speed_panel(root, [(row, speed.decode) for row, speed in timed], height, "decode, tokens per second")
    return to_svg(root)


def shown_by_part(rows: Sequence[Model]) -> list[Model]:
    """The rows `size_by_part` draws."""
    sized = [row for row in rows if row.total_bytes > 0]
    return [row for row in sized if quantized(row)] or sized


def exact_drawn(rows: Sequence[Measured]) -> bool:
    """Whether exact match can be drawn: every model but the base was asked."""
    return all(row.exact_match is not None for row in rows if role(row) != "base")


def shown_by_size(rows: Sequence[Measured]) -> list[Measured]:
    """The rows `accuracy_by_size` draws."""
    exact = exact_drawn(rows)
    return [
        row
        for row in rows
        if row.total_bytes > 0 and (row.exact_match is not None if exact else math.isfinite(row.perplexity))
    ]


def ordered_parts(row: Model) -> list[tuple[str, int]]:
    """Parts in the order they are stacked, the unknown ones last."""
    known = [(part, row.size_bytes[part]) for part in PARTS if row.size_bytes.get(part)]
    return known + [(part, size) for part, size in sorted(row.size_bytes.items()) if part not in PARTS and size]


def part_class(part: str) -> str:
    """CSS class of a part; one for all parts this page does not know."""
    return part if part in PARTS else "other"


def _points(curve: Sequence[dict[str, Any]], phase: str, key: str) -> Points:
    rows = [row for row in curve if row.get("phase") == phase]
    pairs = [(row.get("step"), row.get(key)) for row in rows]
    return [
        (float(step), float(value))
        for step, value in pairs
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value)
    ]


def _curve_words(losses: dict[str, Points], evals: dict[str, Points]) -> str:
    words = []
    for phase, points in losses.items():
        if points:
            smoothed = smooth(points)
            ends = f"from {number(points[0][1])} to {number(smoothed[-1][1])} (smoothed)"
            words.append(f"{PHASES[phase]}: training loss {ends} at step {points[-1][0]:g}")
        if evals[phase]:
            words.append(f"evaluation loss {number(evals[phase][-1][1])} at its end")
    return "; ".join(words)


def _shade_phases(root: ET.Element, losses: dict[str, Points], evals: dict[str, Points], x: Scale, y: Scale) -> None:
    begin = 0.0
    for phase, words in PHASES.items():
        steps = [step for step, _ in (*losses[phase], *evals[phase])]
        if not steps:
            continue
        end = max(steps)
        rect(root, x(begin), y.end - 22, x(end) - x(begin), y.start - y.end + 22, f"phase b-{phase}")
        if x(end) - x(begin) > text_width(words):
            text(root, (x(begin) + x(end)) / 2, y.end - 7, words, f"phase-name t-{phase}", "middle")
        begin = end


def _eval_labels(root: ET.Element, x: Scale, y: Scale, evals: dict[str, Points]) -> None:
    """The figure of each phase's last evaluation: above its point, or where it covers the least near it."""
    points = [_box(x(step) - 6, y(loss) + 6, 12, 12) for part in evals.values() for step, loss in part]
    labels: list[_Box] = []
    for phase in reversed([phase for phase, part in evals.items() if part]):
        step, loss = evals[phase][-1]
        words, left, height = number(loss), x(step), y(loss)
        wide = text_width(words)
        middle, level = min(left - wide / 2, x.end - wide), min(max(height + 4, y.end + LINE), y.start - 3)
        spots = [(middle, height - 11), (middle, height + 20), (left - 10 - wide, level), (left + 10, level)]
        spots += [(middle, height - 11 - LINE), (middle, height + 20 + LINE)]
        boxes = [_box(begin, baseline + 1, wide, LINE - 1) for begin, baseline in spots]
        inside = [b for b in boxes if x.start <= b[0] and b[1] <= x.end and y.end <= b[2] and b[3] < y.start]
        best = min(inside or boxes, key=lambda box: (_covered(box, labels), _covered(box, points)))
        labels.append(best)
        text(root, (best[0] + best[1]) / 2, best[3] - 1, words, f"value t-{phase} halo", "middle")


def _box(left: float, bottom: float, width: float, height: float) -> _Box:
    return left, left + width, bottom - height, bottom


def _covered(box: _Box, others: Sequence[_Box]) -> int:
    """How many of the others it lies on."""
    return sum(box[0] < o[1] and o[0] < box[1] and box[2] < o[3] and o[2] < box[3] for o in others)


def _quality(row: Measured, exact: bool) -> float:
    return (row.exact_match or 0.0) * 100 if exact else row.perplexity


def _quality_words(row: Measured, exact: bool) -> str:
    return f"exact match {percent(row.exact_match or 0.0)}" if exact else f"perplexity {number(row.perplexity)}"


def _gains(root: ET.Element, rows: Sequence[Measured], places: Points) -> None:
    """A line from each post-training artifact to the QAT one of the same target: what QAT changes."""
    for row, place in zip(rows, places, strict=True):
        for other, end in zip(rows, places, strict=True):
            if role(row) == "ptq" and role(other) == "qat" and row.target == other.target:
                line(root, place, end, "gain")


def _role_labels(root: ET.Element, rows: Sequence[Measured], places: Points, right: float) -> None:
    """One name beside the outermost point of each kind, moved down or up until none covers another."""
    taken: list[tuple[float, float, float]] = []
    for kind in dict.fromkeys(role(row) for row in rows):
        spots = [(*place, row) for row, place in zip(rows, places, strict=True) if role(row) == kind]
        left, height, row = max(spots, key=lambda spot: spot[0])
        words = shorten(ROLES.get(kind, row.name), 150)
        wide = text_width(words)
        fits = left + 11 + wide <= right + 8
        if not fits:
            left, height, row = min(spots, key=lambda spot: spot[0])
        begin = left + 11 if fits else max(left - 11 - wide, 4)
        baseline = _free_height(taken, begin, begin + wide, height + 4)
        taken.append((begin, begin + wide, baseline))
        anchor, at = ("start", begin) if fits else ("end", begin + wide)
        text(root, at, baseline, words, f"point-name t-{kind} halo", anchor)


def _free_height(taken: list[tuple[float, float, float]], begin: float, end: float, wanted: float) -> float:
    for shift in (0, 1, -1, 2, -2, 3, -3):
        baseline = wanted + shift * LINE
        free = all(abs(baseline - other) >= LINE - 1 or end < left or begin > right for left, right, other in taken)
        if free and LINE < baseline < 250:
            return baseline
    return wanted


def _row_label(root: ET.Element, row: Model, middle: float) -> None:
    text(root, LABELS - 8, middle + 4, shorten(label(row), LABELS - 8), "row", "end")


def _speed_words(row: Measured) -> str:
    if row.speed is None:
        return ""
    prefill, decode = number(row.speed.prefill.median), number(row.speed.decode.median)
    return f"{label(row)}: prefill {prefill}, decode {decode} tokens per second"


def _speed_panel(root: ET.Element, spreads: list[tuple[Measured, Spread]], top: float, title: str) -> None:
    highest = max(spread.greatest for _, spread in spreads)
    x = Scale(0, nice_top(highest), LABELS, WIDTH - 50)
    text(root, 0, top + 14, title, "name")
    bottom = top + 26 + ROW * len(spreads)
    for value in x.ticks(5):
        line(root, (x(value), top + 24), (x(value), bottom), "grid")
        text(root, x(value), bottom + 15, tick_text(value), "tick", "middle")
    for index, (row, spread) in enumerate(spreads):
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
