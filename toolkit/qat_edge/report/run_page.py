"""The page: tables, plots and facts in the order they are read, filled into page.html with all text escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qat_edge.evaluate.results import Measured, Report
from qat_edge.report import plots, run_details, tables, waterfall
from qat_edge.report.collect import Story
from qat_edge.report.figures import (
    ROLES,
    TARGETS,
    Model,
    duration,
    label,
    megabytes,
    number,
    percent,
    plain,
    role,
    span,
    whole_percent,
)
from qat_edge.report.tables import Table
from qat_edge.report.verdict import Verdict, shipped

HERE = Path(__file__).parent
NOT_VALIDATED = "no row of the report holds this; `qat-edge validate` measures it"


@dataclass(frozen=True)
class Plot:
    """svg empty: nothing to draw, `caption` then gives the reason. legend: CSS class of the swatch, words."""

    title: str
    svg: Markup
    caption: str
    legend: list[tuple[str, str]]
    table: Table | None = None


@dataclass(frozen=True)
class Tile:
    """One figure large: QAT's, with what it is to be compared with below."""

    name: str
    figure: str
    unit: str
    beside: list[tuple[str, str]]


@dataclass(frozen=True)
class Device:
    """Everything about one report."""

    report: Report
    verdict: Verdict
    tiles: list[Tile]
    gates: list[dict[str, Any]]
    summary: Table
    parity: Table | None
    plots: list[Plot]
    facts: list[run_details.Facts]


def environment() -> Environment:
    """Templates beside this file, with everything they are given escaped."""
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )


def style() -> Markup:
    """The style sheet, to stand inside a page."""
    return Markup((HERE / "style.css").read_text(encoding="utf-8"))


def render(story: Story) -> str:
    """The whole page as one text."""
    devices = [_device(story, index) for index in range(len(story.reports))]
    return (
        environment()
        .get_template("page.html")
        .render(
            model=story.model,
            subtitle=subtitle(story),
            style=style(),
            devices=devices,
            about=run_details.about_run(story),
            artifacts=run_details.artifacts(story),
            verified=story.verified,
            missing=story.missing,
            words=run_details.WORDS,
            version=story.quantized.get("qat_edge"),
        )
    )


def _device(story: Story, index: int) -> Device:
    report, judged = story.reports[index], story.verdicts[index]
    training = [training_plot(story)] if index == 0 else []
    return Device(
        report=report,
        verdict=judged,
        tiles=_tiles(report),
        gates=tables.gates(report.gates),
        summary=tables.summary(report),
        parity=tables.parity(report),
        plots=[*training, *_measured_plots(report, index), *_budget_plots(report, index)],
        facts=run_details.about_report(report),
    )


def subtitle(story: Story) -> list[str]:
    """Short facts under the model's name."""
    rank, group = story.options("finetune").get("lora_rank"), story.options("finetune").get("group_size")
    words = [
        f"LoRA of rank {rank}" if rank is not None else "",
        f"int4 weights in groups of {group}, int8 activations" if group is not None else "",
        f"measured on {', '.join(one.device for one in story.measurements)}",
        str(story.measurements[0].created),
    ]
    return [word for word in words if word]


def _tiles(report: Report) -> list[Tile]:
    """QAT's own figures, each with those of the fine-tune and of post-training quantization."""
    qat, ptq = shipped(report, "qat"), shipped(report, "ptq")
    tuned = [row for row in report.measured if role(row) == "tuned"]
    tiles = []
    columns = {column.name: column for column in tables.COLUMNS}
    picks: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("Exact match", "%", lambda share: percent(share).removesuffix("%")),
        ("Perplexity", "", number),
        ("Size", "MB", megabytes),
        ("Decode", "tokens/s", number),
    )
    for name, unit, write in picks:
        column = columns[name]
        known = {
            kind: [value for row in rows if (value := column.value(row)) is not None]
            for kind, rows in (("qat", qat), ("tuned", tuned), ("ptq", ptq))
        }
        if not known["qat"]:
            continue
        beside = [
            (name, span(known[kind], write, "–"))
            for kind, name in (("tuned", "FP32 fine-tuned"), ("ptq", "PTQ"))
            if known[kind]
        ]
        tiles.append(Tile(column.name, span(known["qat"], write, "–"), unit, beside))
    return tiles


def training_plot(story: Story, unit: str = "nats per token") -> Plot:
    """The loss over the steps. unit: what it is counted in."""
    title = "Training"
    if story.training is None:
        return _not_measured(title, story.missing["training"])
    log = story.training
    curve = [row for row in log.get("curve", []) if isinstance(row, dict)]
    svg = plots.loss_curve("training", curve, unit)
    if not svg:
        return _not_measured(title, "the training log holds no finite loss")
    legend = [("l-raw", "each step"), ("l-smooth", "smoothed")]
    if any("eval_loss" in row for row in curve):
        legend.append(("l-eval", "evaluation rows"))
    return Plot(title, Markup(svg), _training_words(log), legend, tables.losses(curve, unit))


def _training_words(log: dict[str, Any]) -> str:
    """How long training took and on what, as far as the log says."""
    words = []
    start, steps = log.get("qat_start_step"), log.get("steps")
    if start is not None and steps is not None:
        words.append(f"Steps 1 to {start} train LoRA in float, the rest up to {steps} with the deployed rounding")
    how = [str(log["device"])] if log.get("device") else []
    if isinstance(log.get("wall_s"), int | float):
        how.insert(0, duration(log["wall_s"]))
    if isinstance(log.get("peak_memory_bytes"), int):
        how.append(f"peak memory {number(log['peak_memory_bytes'] / 1e9)} GB")
    if how:
        words.append(", ".join(how))
    if log.get("truncated_rows") is not None:
        words.append(f"{log['truncated_rows']} training rows were cut at the longest length")
    return ". ".join(words) + "." if words else ""


def _measured_plots(report: Report, index: int) -> list[Plot]:
    rows = report.measured
    return [
        _quality_plot(rows, index),
        parts_plot(rows, index),
        _speed_plot(rows, index),
    ]


def _quality_plot(rows: Sequence[Measured], index: int) -> Plot:
    title = "Accuracy against size"
    svg = plots.accuracy_by_size(f"quality-{index}", rows)
    if not svg:
        return _not_measured(title, NOT_VALIDATED)
    shown = plots.shown_by_size(rows)
    shapes = {plots.SHAPES.get(row.target, "diamond"): TARGETS.get(row.target, row.target) for row in shown}
    legend = [(f"l-{shape}", name) for shape, name in shapes.items()]
    if {"ptq", "qat"} <= {role(row) for row in shown}:
        legend.append(("l-gain", "what QAT changes"))
    caption = f"{'Up' if plots.exact_drawn(rows) else 'Down'} and to the left is better."
    return Plot(title, Markup(svg), caption, legend, tables.quality(rows))


def parts_plot(rows: Sequence[Model], index: int) -> Plot:
    """What takes how much of every artifact, and of the FP32 fine-tune's size."""
    title = "Size by part"
    svg = plots.size_by_part(f"parts-{index}", rows)
    if not svg:
        return _not_measured(title, NOT_VALIDATED)
    shown = plots.shown_by_part(rows)
    names = dict.fromkeys(part for row in shown for part, _ in plots.ordered_parts(row))
    legend = [(f"p-{plots.part_class(part)}", part) for part in names]
    tuned = next((row for row in rows if role(row) == "tuned" and row not in shown and row.total_bytes), None)
    caption = ""
    if tuned:
        shares = [row.total_bytes / tuned.total_bytes for row in shown]
        caption = (
            f"{span(shares, whole_percent)} of the FP32 fine-tune, whose weights take "
            f"{megabytes(tuned.total_bytes)} MB (not drawn)."
        )
    return Plot(title, Markup(svg), caption, legend, tables.parts([*shown, *([tuned] if tuned else [])]))


def _speed_plot(rows: Sequence[Measured], index: int) -> Plot:
    title = "Speed"
    svg = plots.speed_bars(f"speed-{index}", rows)
    if not svg:
        return _not_measured(title, NOT_VALIDATED)
    untimed = [label(row) for row in rows if row.speed is None]
    caption = "Bars are medians, whiskers reach from the slowest to the fastest repeat."
    if untimed:
        caption += f" Not measured: {', '.join(untimed)}."
    kinds = dict.fromkeys(role(row) for row in rows if row.speed is not None)
    legend = [(f"l-bar c-{kind}", ROLES.get(kind, "other")) for kind in kinds]
    return Plot(title, Markup(svg), caption, legend, tables.speeds(rows))


def _budget_plots(report: Report, index: int) -> list[Plot]:
    """One a budget; none where validate was not asked for any."""
    legend = [
        ("l-bar c-more", "costs"),
        ("l-bar c-less", "gains"),
        ("l-bar c-qat", "sums"),
        ("l-bar c-floor", "noise floor"),
    ]
    found = []
    for number_, budget in enumerate(report.budgets):
        title = f"Error budget, QAT · {TARGETS.get(budget.target, budget.target)}"
        svg = waterfall.waterfall(f"budget-{index}-{number_}", budget)
        if svg:
            found.append(Plot(title, Markup(svg), waterfall.caption(budget), legend, waterfall.table(budget)))
        else:
            found.append(_not_measured(title, "a perplexity or a KL divergence is not finite"))
    return found


def _not_measured(title: str, reason: str) -> Plot:
    return Plot(title, Markup(""), f"Not measured: {reason}.", [])
