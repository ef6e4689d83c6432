"""Page of one run (run.html): verdict, tables, charts and details, with all text escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qat_edge.evaluate.results import Measurement, Report
from qat_edge.report import glossary, plots, run_details, tables, waterfall
from qat_edge.report.collect import RunResults
from qat_edge.report.formatting import (
    TARGET_TITLES,
    ReportedModel,
    duration,
    label,
    megabytes,
    number,
    own_title,
    part_label,
    percent,
    plain,
    reference_title,
    role,
    role_legend,
    role_names,
    span,
    whole_percent,
)
from qat_edge.report.guard_details import guard_sentence
from qat_edge.report.tables import GateRow, Table
from qat_edge.report.verdict import Verdict, shipped

HERE = Path(__file__).parent
# Reason shown in place of a chart without data.
NOT_VALIDATED = "no row of the report has it; `qat-edge validate` measures it"


@dataclass(frozen=True)
class Plot:
    """A chart with its title.

    Attributes:
        title: Title above the chart.
        svg: The chart; empty if there is nothing to draw, and `caption` then gives the reason.
        caption: Text below the chart.
        legend: CSS class of each swatch, and its text.
        table: The data of the chart, if the page offers it.
    """

    title: str
    svg: Markup
    caption: str
    legend: list[tuple[str, str]]
    table: Table | None = None


@dataclass(frozen=True)
class Tile:
    """One metric of the run's own model in large type.

    Attributes:
        model: Name of the model.
        name: Name of the metric.
        value: Its value, or its range over the targets.
        unit: Unit of the value.
        compared: Name and value of each model to compare it with.
    """

    model: str
    name: str
    value: str
    unit: str
    compared: list[tuple[str, str]]


@dataclass(frozen=True)
class DeviceSection:
    """Everything the page shows about the report of one device."""

    report: Report
    verdict: Verdict
    tiles: list[Tile]
    gates: list[GateRow]
    summary: Table
    parity: Table | None
    structured: Table | None
    plots: list[Plot]
    details: list[run_details.DetailList]


def environment() -> Environment:
    """Return the template environment: templates from this folder, every value escaped."""
    # StrictUndefined: a template that names a missing value is a bug, not an empty string.
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )


def style() -> Markup:
    """Return the style sheet, to be inserted into a page."""
    return Markup((HERE / "style.css").read_text(encoding="utf-8"))


def render(results: RunResults) -> str:
    """Return the HTML of the whole page."""
    devices = [_device_section(results, index) for index in range(len(results.reports))]
    return environment().get_template("run.html").render(
        model=results.model,
        subtitle=subtitle(results),
        style=style(),
        devices=devices,
        provenance=run_details.provenance(results),
        artifacts=run_details.artifacts(results),
        verified=results.verified,
        missing=results.missing,
        glossary=glossary.RUN_TERMS,
        version=results.quantized.get("qat_edge"),
    )  # fmt: skip


def _device_section(results: RunResults, index: int) -> DeviceSection:
    report = results.reports[index]
    # The training curve does not depend on the device, so only the first section shows it.
    training = [training_plot(results)] if index == 0 else []
    return DeviceSection(
        report=report,
        verdict=results.verdicts[index],
        tiles=_tiles(report),
        gates=tables.gates(report.gates),
        summary=tables.summary(report),
        parity=tables.parity(report),
        structured=tables.structured(report),
        plots=[*training, *_measured_plots(report, index), *_budget_plots(report, index)],
        details=run_details.report_details(report),
    )


def subtitle(results: RunResults) -> list[str]:
    """Return the phrases below the model's name: method, scheme, devices and date."""
    options = results.options("finetune")
    rank, group, bits = options.get("lora_rank"), options.get("group_size"), options.get("weight_bits", 4)
    devices = ", ".join(measured.device for measured in results.measurements)
    phrases = [
        "not trained here" if is_untrained(results) else f"LoRA of rank {rank}" if rank is not None else "",
        f"int{bits} weights in groups of {group}, int8 activations" if group is not None else "",
        f"measured on {devices}",
        str(results.measurements[0].created),
    ]
    return [phrase for phrase in phrases if phrase]


def is_untrained(results: RunResults) -> bool:
    """Return whether the model was quantized without any training."""
    return results.options("finetune").get("steps") == 0


def _tiles(report: Report) -> list[Tile]:
    """Return the own model's main metrics, each with those of the FP32 reference and of PTQ."""
    # Rows by role: the own model's, and those it is compared with.
    rows = {
        "qat": shipped(report, "qat"),
        "tuned": [row for row in report.measured if role(row) == "tuned"],
        "ptq": shipped(report, "ptq"),
    }

    # Metrics that an app developer decides by, in this order.
    columns = {column.name: column for column in tables.COLUMNS}
    metrics: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("Exact match", "%", lambda share: percent(share).removesuffix("%")),
        ("Perplexity", "", number),
        ("Size", "MB", megabytes),
        # Decode speed is what a user waits for; prefill is in the table.
        ("Decode", "tokens/s", number),
    )

    tiles, names = [], role_names(report.measured)
    for name, unit, write in metrics:
        values = {key: tables.known_values(columns[name], group) for key, group in rows.items()}
        # A tile without a value of its own would have nothing to show.
        if not values["qat"]:
            continue
        compared = [(names[key], span(values[key], write, "–")) for key in ("tuned", "ptq") if values[key]]
        tiles.append(Tile(names["qat"], name, span(values["qat"], write, "–"), unit, compared))
    return tiles


def training_plot(results: RunResults, unit: str = "nats per token") -> Plot:
    """Return the chart of the training loss. unit: unit of the loss."""
    title = "Training"
    if results.training is None:
        return _not_measured(title, results.missing["training"])

    if is_untrained(results):
        return Plot(title, Markup(""), "The model was not trained here.", [])

    log = results.training
    # The file may be damaged by hand: anything but an object is skipped.
    curve = [row for row in log.get("curve", []) if isinstance(row, dict)]
    svg = plots.loss_curve("training", curve, unit)
    if not svg:
        return _not_measured(title, "the training log has no finite loss")

    legend = [("l-raw", "each step"), ("l-smooth", "smoothed")]
    if any("eval_loss" in row for row in curve):
        legend.append(("l-eval", "evaluation rows"))
    return Plot(title, Markup(svg), _training_caption(log), legend, tables.losses(curve, unit))


def _training_caption(log: dict[str, Any]) -> str:
    """Return the phases, the time and the memory of the training, as far as the log records them."""
    sentences = []
    start, steps = log.get("qat_start_step"), log.get("steps")
    if start is not None and steps is not None:
        sentences.append(f"LoRA training in floats until step {start}, then QAT until step {steps}")

    if guarded := guard_sentence(log):
        sentences.append(guarded)

    resources = []
    if isinstance(log.get("wall_s"), int | float):
        resources.append(duration(log["wall_s"]))
    if log.get("device"):
        resources.append(str(log["device"]))
    if isinstance(log.get("peak_memory_bytes"), int):
        resources.append(f"peak memory {number(log['peak_memory_bytes'] / 1e9)} GB")
    if resources:
        sentences.append(", ".join(resources))

    # Truncated rows train on incomplete text, so users should know their number.
    if log.get("truncated_rows") is not None:
        sentences.append(f"{log['truncated_rows']} training rows were truncated to the maximum length")
    return ". ".join(sentences) + "." if sentences else ""


def _measured_plots(report: Report, index: int) -> list[Plot]:
    rows = report.measured
    return [
        _quality_plot(rows, index),
        parts_plot(rows, index),
        _speed_plot(rows, index),
    ]


def _quality_plot(rows: Sequence[Measurement], index: int) -> Plot:
    title = "Accuracy against size"
    svg = plots.accuracy_by_size(f"quality-{index}", rows)
    if not svg:
        return _not_measured(title, NOT_VALIDATED)

    drawn = plots.rows_by_size(rows)
    # Shapes stand for targets; colors are explained by the labels in the chart.
    shapes = {plots.SHAPES.get(row.target, "diamond"): TARGET_TITLES.get(row.target, row.target) for row in drawn}
    legend = [(f"l-{shape}", name) for shape, name in shapes.items()]
    if {"ptq", "qat"} <= {role(row) for row in drawn}:
        legend.append(("l-gain", f"from PTQ to {own_title(drawn)}"))
    caption = f"{'Up' if plots.draws_exact_match(rows) else 'Down'} and to the left is better."
    return Plot(title, Markup(svg), caption, legend, tables.quality(rows))


def parts_plot(rows: Sequence[ReportedModel], index: int) -> Plot:
    """Return the chart of each artifact's size by part, with its share of the FP32 reference's size as caption."""
    title = "Size by part"
    svg = plots.size_by_part(f"parts-{index}", rows)
    if not svg:
        return _not_measured(title, NOT_VALIDATED)

    drawn = plots.rows_by_part(rows)
    names = dict.fromkeys(part for row in drawn for part, _ in plots.ordered_parts(row))
    legend = [(f"p-{plots.part_class(part)}", part_label(part)) for part in names]

    # A float model is several times larger: its bar would make the parts of the others unreadable.
    tuned = next((row for row in rows if role(row) == "tuned" and row not in drawn and row.total_bytes), None)
    caption = ""
    if tuned:
        shares = [row.total_bytes / tuned.total_bytes for row in drawn]
        caption = (
            f"{span(shares, whole_percent)} of the size of the {reference_title(rows)}, whose weights take "
            f"{megabytes(tuned.total_bytes)} MB (not drawn)."
        )
    return Plot(title, Markup(svg), caption, legend, tables.parts([*drawn, *([tuned] if tuned else [])]))


def _speed_plot(rows: Sequence[Measurement], index: int) -> Plot:
    title = "Speed"
    svg = plots.speed_bars(f"speed-{index}", rows)
    if not svg:
        return _not_measured(title, NOT_VALIDATED)

    caption = "Bars are medians; whiskers span the slowest to the fastest repeat."
    # The caption names the models without a speed, so that nobody looks for their bars.
    untimed = [label(row) for row in rows if row.speed is None]
    if untimed:
        caption += f" Not measured: {', '.join(untimed)}."
    legend = role_legend([row for row in rows if row.speed is not None])
    return Plot(title, Markup(svg), caption, legend, tables.speeds(rows))


def _budget_plots(report: Report, index: int) -> list[Plot]:
    """Return one chart per error budget; none if validate did not compute any."""
    legend = [
        ("l-bar c-more", "increases loss"),
        ("l-bar c-less", "reduces loss"),
        ("l-bar c-qat", "total"),
        ("l-bar c-floor", "noise floor"),
    ]
    found = []
    for position, budget in enumerate(report.budgets):
        title = f"Error budget, {own_title(report.measured)} · {TARGET_TITLES.get(budget.target, budget.target)}"
        # Element ids have to be unique on the page: a chart per device and artifact.
        svg = waterfall.waterfall(f"budget-{index}-{position}", budget)
        if svg:
            found.append(Plot(title, Markup(svg), waterfall.caption(budget), legend, waterfall.table(budget)))
        else:
            found.append(_not_measured(title, "a perplexity or a KL divergence is not finite"))
    return found


def _not_measured(title: str, reason: str) -> Plot:
    return Plot(title, Markup(""), f"Not measured: {reason}.", [])
