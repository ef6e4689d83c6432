"""Error budget as a chart: the loss added by each step, and below it the KL that remains without each part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
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
from qat_edge.report.formatting import number, percent
from qat_edge.report.tables import MISSING, Table, TableCell, TableRow

LABELS = 150.0  # width of the labels at the left of the bars
ROW = 28.0  # height of a bar with its margin
# Step names of a report, short enough for a label.
SHORT = {
    "trained forward, fake-quantized": "rounding in training",
    "frozen checkpoint": "freezing",
    "inputs rounded per block, as ONNX Runtime does on x86": "per-block inputs",
    "inputs of all but 4-bit layers rounded per block, as ONNX Runtime does on ARM": "per-block inputs",
    "inputs not rounded, as ONNX Runtime does in WebAssembly and on older ARM": "float inputs",
    "half steps of 2-bit weights in float": "half steps",
    "keys and values in int8": "int8 cache",
    "artifact on this machine": "local runtime",
    "artifact on the device": "device runtime",
}


class WaterfallBar(NamedTuple):
    """One bar of the chart, from `start` to `end` in nats per token. css: class that colors it."""

    name: str
    start: float
    end: float
    css: str


def waterfall(name: str, budget: Budget) -> str:
    """Draw the change in log perplexity of each step, and the KL with each part left unquantized.

    Args:
        name: Prefix of the element ids, unique on the page.
        budget: The error budget of one artifact.

    Returns:
        SVG markup; empty if a value is not finite.
    """
    steps, parts = _step_bars(budget), _part_bars(budget)
    if not all(math.isfinite(value) for bar in (*steps, *parts) for value in (bar.start, bar.end)):
        return ""

    description = "; ".join(f"{bar.name}: {_signed(bar.end - bar.start)}" for bar in steps)
    height = 26 + ROW * len(steps) + 48
    root = canvas(name, "Error budget", f"Nats per token. {description}", height + 26 + ROW * len(parts) + 24)
    _panel(root, steps, 0, "log perplexity relative to the FP32 model, nats per token", signed=True)
    _panel(root, parts, height, "KL to the FP32 model with one part in floats, nats per token", signed=False)
    return to_svg(root)


def table(budget: Budget) -> Table:
    """Return every step and every part, compared with the FP32 fine-tune and with the step before."""
    # Steps, then parts, then the perturbed checkpoints.
    rows = [TableRow(step.name, "", _cells(step.perplexity, step.agreement, step.change)) for step in budget.steps]
    rows += [
        TableRow(f"checkpoint, {part.name} in floats", "", _cells(part.perplexity, part.agreement, None))
        for part in budget.parts
    ]
    rows += [TableRow("noise floor", "floor", _cells(None, None, found)) for found in budget.floor]
    heads = [
        ("Perplexity", ""),
        ("KL to the FP32 model", "nats"),
        ("KL to the step before", "nats"),
        ("Top-1 with the step before", "%"),
        ("SQNR to the step before", "dB"),
    ]
    return Table("Error budget", heads, rows, first="Step")


def caption(budget: Budget) -> str:
    """Return an explanation of the bars, and of what they leave out."""
    base, tuned = (step.perplexity for step in budget.steps[:2])
    sentences = ["The bars add up from the FP32 model to the artifact."]
    if base > 0 and tuned > 0 and tuned != base:
        sentences.append(f"Fine-tuning itself changed log perplexity by {_signed(math.log(tuned / base))}.")
    sentences.append(
        "A part in floats has the values of the FP32 model, so “weights” includes what QAT learned after it; keys "
        "and values are floats in the checkpoint."
    )
    if budget.frozen_divergence:
        sentences.append(f"The frozen checkpoint differs from the model in training: {budget.frozen_divergence}.")
    return " ".join(sentences)


def _step_bars(budget: Budget) -> list[WaterfallBar]:
    """Return one bar per step, each starting where the one before ends; then the total and the noise floor."""
    # The first two steps are the base and the fine-tune; the bars start at the fine-tune.
    tuned, *rest = budget.steps[1:]
    bars: list[WaterfallBar] = []
    start = 0.0
    for step in rest:
        end = _log_perplexity(step) - _log_perplexity(tuned)
        bars.append(WaterfallBar(SHORT.get(step.name, step.name), start, end, "c-more" if end > start else "c-less"))
        start = end
    # The perturbed checkpoints move the loss both ways.
    floor = max(map(abs, budget.floor_nats), default=0.0)
    return [*bars, WaterfallBar("total", 0.0, start, "c-qat"), WaterfallBar("noise floor", -floor, floor, "c-floor")]


def _part_bars(budget: Budget) -> list[WaterfallBar]:
    checkpoint = next(step for step in budget.steps if step.name == "frozen checkpoint")
    rows = [("all quantized", checkpoint.agreement)]
    rows += [(f"{part.name} in floats", part.agreement) for part in budget.parts]
    return [WaterfallBar(name, 0.0, found.kl_nats, "c-qat") for name, found in rows if found is not None]


def _panel(root: ET.Element, bars: Sequence[WaterfallBar], top: float, title: str, signed: bool) -> None:
    """Draw horizontal bars on an axis that includes zero. signed: values are changes, shown with their sign."""
    # The axis includes zero, where the fine-tune is.
    ends = [value for bar in bars for value in (bar.start, bar.end)]
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    x = Scale(-nice_top(-low) if low < 0 else 0.0, nice_top(high) if high > 0 else 0.0, LABELS, WIDTH - 58)
    text(root, 0, top + 14, title, "name")

    # Grid, ticks and the zero line.
    bottom = top + 26 + ROW * len(bars)
    for value in x.ticks(4):
        line(root, (x(value), top + 22), (x(value), bottom), "grid")
        text(root, x(value), bottom + 15, tick_text(value), "tick", "middle")
    line(root, (x(0), top + 22), (x(0), bottom), "axis")

    for index, bar in enumerate(bars):
        middle = top + 26 + ROW * (index + 0.5)
        if bar.css == "c-floor":
            value_text = f"±{number(bar.end)}"
        else:
            value_text = _signed(bar.end - bar.start) if signed else number(bar.end)
        # A bar that reduces the loss runs from right to left.
        left, right = sorted((x(bar.start), x(bar.end)))
        text(root, LABELS - 8, middle + 4, shorten(bar.name, LABELS - 8), "row", "end")
        # A change of zero still shows, as a thin line.
        tip = f"{bar.name}: {value_text} nats per token"
        rect(root, left, middle - 9, max(right - left, 1.5), 18, f"bar {bar.css}", tip)
        _value_label(root, value_text, left, right, middle + 4)


def _value_label(root: ET.Element, value_text: str, left: float, right: float, baseline: float) -> None:
    """Write a bar's value at its right end, or at its left end if there is no space."""
    fits = right + 6 + text_width(value_text) <= WIDTH
    text(root, right + 6 if fits else left - 6, baseline, value_text, "value halo", "start" if fits else "end")


def _cells(perplexity: float | None, agreement: Agreement | None, change: Agreement | None) -> list[TableCell]:
    cells = [
        _number_cell(perplexity),
        _number_cell(None if agreement is None else agreement.kl_nats),
        _number_cell(None if change is None else change.kl_nats),
        MISSING if change is None else TableCell(percent(change.top1).removesuffix("%"), change.top1),
        _number_cell(None if change is None else change.sqnr_db),
    ]
    # Equal logits have no noise, so their SQNR is not a number.
    if change is not None and change.sqnr_db is None and change.kl_nats == 0:
        cells[-1] = TableCell("equal")
    return cells


def _number_cell(value: float | None) -> TableCell:
    return MISSING if value is None else TableCell(number(value), value)


def _log_perplexity(step: Step) -> float:
    return math.log(step.perplexity) if step.perplexity > 0 else math.nan


def _signed(nats: float) -> str:
    return ("+" if nats > 0 else "") + number(nats).replace("-", "−")
