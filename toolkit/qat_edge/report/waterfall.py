"""The error budget drawn: steps as a waterfall of log perplexity, and below it what is left with a part off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from qat_edge.evaluate.results import Agreement, Budget, Step
from qat_edge.report.charts import (
    WIDTH,
    Scale,
    canvas,
    line,
    nice_top,
    rect,
    shorten,
    text,
    text_width,
    tick_text,
    to_svg,
)
from qat_edge.report.figures import number, percent
from qat_edge.report.tables import Cell, Row, Table

LABELS = 150.0  # width kept for the names beside bars
ROW = 28.0
SHORT = {
    "trained forward, fake-quantized": "rounding in training",
    "frozen checkpoint": "freezing",
    "inputs rounded per block, as ONNX Runtime does on x86": "inputs per block",
    "keys and values in int8": "int8 cache",
    "artifact on this machine": "runtime here",
    "artifact on the device": "runtime on the device",
}
Bars = list[tuple[str, float, float, str]]  # name, from, to, CSS class


def waterfall(name: str, budget: Budget) -> str:
    """Nats per token by step above the fine-tune's log perplexity, and KL with a part off; empty where not finite."""
    steps, parts = _step_bars(budget), _part_bars(budget)
    if not all(math.isfinite(value) for bar in (*steps, *parts) for value in bar[1:3]):
        return ""
    words = "; ".join(f"{step}: {_signed(end - start)}" for step, start, end, _ in steps)
    height = 26 + ROW * len(steps) + 48
    root = canvas(name, "Error budget", f"Nats per token. {words}", height + 26 + ROW * len(parts) + 24)
    _panel(root, steps, 0, "log perplexity above the fine-tune’s, nats per token", signed=True)
    _panel(root, parts, height, "KL to the fine-tune with one part off, nats per token", signed=False)
    return to_svg(root)


def table(budget: Budget) -> Table:
    """Every step and every part, against the fine-tune and against the step before."""
    rows = [Row(step.name, "", _cells(step.perplexity, step.agreement, step.change)) for step in budget.steps]
    rows += [
        Row(f"checkpoint, {part.name} off", "", _cells(part.perplexity, part.agreement, None)) for part in budget.parts
    ]
    rows += [Row("noise floor", "floor", _cells(None, None, found)) for found in budget.floor]
    before = " to the step before"
    heads = [("Perplexity", ""), ("KL to the fine-tune", "nats"), (f"KL{before}", "nats"), (f"Top-1{before}", "%")]
    return Table("Error budget", [*heads, (f"SQNR{before}", "dB")], rows, first="Step")


def caption(budget: Budget) -> str:
    """What the bars are, and what is left out of them."""
    base, tuned = (step.perplexity for step in budget.steps[:2])
    told = [
        "Bars add up from the fine-tune to the artifact.",
        f"Fine-tuning itself: {_signed(math.log(tuned / base))} from the base." if base > 0 and tuned > 0 else "",
        "A part that is off has the fine-tune’s own floats, so “weights” holds what QAT trained, too; "
        "keys and values are float in the checkpoint.",
        f"The frozen checkpoint parts from the trained forward: {budget.converted}." if budget.converted else "",
    ]
    return " ".join(filter(None, told))


def _step_bars(budget: Budget) -> Bars:
    tuned, *rest = budget.steps[1:]
    bars: Bars = []
    start = 0.0
    for step in rest:
        end = _log(step) - _log(tuned)
        bars.append((SHORT.get(step.name, step.name), start, end, "c-more" if end > start else "c-less"))
        start = end
    floor = max(map(abs, budget.floor_nats), default=0.0)
    return [*bars, ("all of it", 0.0, start, "c-qat"), ("noise floor", -floor, floor, "c-floor")]


def _part_bars(budget: Budget) -> Bars:
    last = next(step for step in budget.steps if step.name == "frozen checkpoint")
    rows = [("nothing off", last.agreement), *((f"{part.name} off", part.agreement) for part in budget.parts)]
    return [(name, 0.0, found.kl_nats, "c-qat") for name, found in rows if found is not None]


def _panel(root: ET.Element, bars: Bars, top: float, title: str, signed: bool) -> None:
    ends = [value for bar in bars for value in bar[1:3]]
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    x = Scale(-nice_top(-low) if low < 0 else 0.0, nice_top(high) if high > 0 else 0.0, LABELS, WIDTH - 58)
    text(root, 0, top + 14, title, "name")
    bottom = top + 26 + ROW * len(bars)
    for value in x.ticks(4):
        line(root, (x(value), top + 22), (x(value), bottom), "grid")
        text(root, x(value), bottom + 15, tick_text(value), "tick", "middle")
    line(root, (x(0), top + 22), (x(0), bottom), "axis")
    for index, (name, start, end, css) in enumerate(bars):
        middle = top + 26 + ROW * (index + 0.5)
        told = f"±{number(end)}" if css == "c-floor" else _signed(end - start) if signed else number(end)
        left, right = sorted((x(start), x(end)))
        text(root, LABELS - 8, middle + 4, shorten(name, LABELS - 8), "row", "end")
        rect(root, left, middle - 9, max(right - left, 1.5), 18, f"bar {css}", f"{name}: {told} nats per token")
        _value(root, told, left, right, middle + 4)


def _value(root: ET.Element, told: str, left: float, right: float, baseline: float) -> None:
    """A bar's figure on its right, or on its left where there is no room."""
    fits = right + 6 + text_width(told) <= WIDTH
    text(root, right + 6 if fits else left - 6, baseline, told, "value halo", "start" if fits else "end")


def _cells(perplexity: float | None, agreement: Agreement | None, change: Agreement | None) -> list[Cell]:
    figures: Sequence[tuple[float | None, str]] = (
        (perplexity, "number"),
        (None if agreement is None else agreement.kl_nats, "number"),
        (None if change is None else change.kl_nats, "number"),
        (None if change is None else change.top1, "percent"),
        (None if change is None else change.sqnr_db, "number"),
    )
    equal = change is not None and change.sqnr_db is None and change.kl_nats == 0
    cells = [
        Cell("–") if v is None else Cell(number(v) if how == "number" else percent(v).removesuffix("%"), v)
        for v, how in figures
    ]
    return [*cells[:-1], Cell("equal")] if equal else cells


def _log(step: Step) -> float:
    return math.log(step.perplexity) if step.perplexity > 0 else math.nan


def _signed(nats: float) -> str:
    return ("+" if nats > 0 else "") + number(nats).replace("-", "−")
