"""Page of `qat-edge compare` (comparison.html): a verdict, a table and bar charts for each runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qat_edge import __version__
from qat_edge.evaluate.deployments import PTQ, Deployment, DeploymentTable
from qat_edge.evaluate.results import Measurement, Speed, Spread
from qat_edge.report.charts import LINE, WIDTH, Scale, canvas, nice_top, rect, text, to_svg, x_axis
from qat_edge.report.formatting import TARGET_TITLES, megabytes, number, percent, plain, whole_percent
from qat_edge.report.glossary import COMPARISON_TERMS
from qat_edge.report.run_details import DetailList, flatten
from qat_edge.report.run_page import Plot, environment, style
from qat_edge.report.tables import Column, Table, TableRow, best_rows

# CSS class of a deployment's color, by its name; merged PTQ is "ptq".
CSS = {"base": "base", "lora": "lora", "naive": "other", "merged": "tuned", "qat": "qat"}
LEGEND = {"base": "base", "other": "naive PTQ", "tuned": "FP32 fine-tune", "ptq": "merged PTQ", "qat": "QAT-LoRA"}
QUANTIZED = ("other", "ptq", "qat")  # CSS classes of the deployments that are not in floats
# A long title does not fit next to a bar, so it is above it.
BAR = 38.0  # height of a bar with its name above it
FAR = 3.0  # a base this many times worse than the others would make their bars look equal, so it is not drawn
PLOT_CAPTIONS = {
    "Perplexity": "Lower is better.",
    "Exact match": "Percentage of the prompts; higher is better.",
    "Size": "All files that the device needs, in MB.",
    "Time": "Milliseconds per generated token, median.",
}


@dataclass(frozen=True)
class RuntimeSection:
    """Everything the page shows about one runtime."""

    name: str
    verdict: str
    table: Table
    plots: list[Plot]


def render(table: DeploymentTable) -> str:
    """Return the HTML of the whole page."""
    return environment().get_template("comparison.html").render(
        model=table.model,
        subtitle=_subtitle(table),
        style=style(),
        further_training=table.further_training,
        runtimes=[_runtime_section(table, target, index) for index, target in enumerate(table.targets)],
        glossary=COMPARISON_TERMS,
        details_blocks=[
            DetailList("Machine", flatten(table.machine)),
            DetailList("Runtimes", _runtimes(table)),
            DetailList("Options of compare", flatten(table.options)),
        ],
        version=__version__,
    )  # fmt: skip


def _subtitle(table: DeploymentTable) -> list[str]:
    """Return the phrases below the model's name."""
    prompts = [row.measured.prompts for row in table.deployments if row.measured and row.measured.prompts]
    length = table.options.get("context_length")
    return [
        f"{table.tokens:,} tokens compared",
        f"exact match on {max(prompts)} prompts" if prompts else "exact match not measured",
        *([f"context of {length:,} tokens"] if length else []),
        f"measured on {table.device}",
        table.created,
    ]


def columns(table: DeploymentTable) -> list[Column[Deployment]]:
    """Return every metric of the table, in the order of the page."""
    return [
        Column("Size", "MB", _of(lambda m: m.total_bytes), megabytes, -1),
        Column("Memory", "MB", lambda row: row.memory_bytes, megabytes, -1),
        Column("Time", "ms/token", lambda row: row.ms_per_token, number, -1, _repeats(lambda speed: speed.decode)),
        _speed_column("Decode", lambda speed: speed.decode),
        Column("Perplexity", "", _of(lambda m: m.perplexity), number, -1),
        Column("Exact match", "%", _of(lambda m: m.exact_match), percent, 1),
        Column("KL", "nats", _of(lambda m: None if m.agreement is None else m.agreement.kl_nats), number, -1),
        Column("Gain kept, perplexity", "%", table.kept_perplexity, _share, 1),
        Column("Gain kept, exact match", "%", table.kept_exact_match, _share, 1),
        _speed_column("Prefill", lambda speed: speed.prefill),
        Column("Load", "ms", _of(lambda m: m.load_ms), number, -1),
    ]


def css(row: Deployment) -> str:
    """Return the CSS class that colors the row."""
    return "ptq" if row.name.startswith(PTQ) else CSS.get(row.name, "other")


def verdict(table: DeploymentTable, target: str) -> str:
    """Return sentences on fused QAT-LoRA in one runtime, compared with the other deployments."""
    qat, merged = table.row("qat", target), table.row("merged", target)
    if qat is None or qat.measured is None:
        return "Fused QAT-LoRA was not measured in this runtime, so there is no result yet."
    sentences = [_size_and_speed(qat, merged), _gain_kept(table, qat)]

    # Quantized deployments only: a float one keeps everything by definition.
    others = [r for r in table.deployments if r.target == target and (r.name == "naive" or r.name.startswith(PTQ))]
    known = [(row, kept) for row, kept in ((row, table.kept_perplexity(row)) for row in others) if kept is not None]
    if known:
        sentences.append(f"By perplexity, the others keep: {_others_kept(known)}.")
    return " ".join(sentence for sentence in sentences if sentence)


def _others_kept(known: Sequence[tuple[Deployment, float]]) -> str:
    """Return `Naive PTQ base + adapters 87%; merged PTQ by round-to-nearest 98%, by HQQ 98%`."""
    naive, merged = [], []
    for row, kept in known:
        share = _whole(kept) + (" (worse than the base)" if kept < 0 else "")
        if row.name.startswith(PTQ):
            method = row.title.partition(", ")[2]
            # All methods of merged PTQ share one phrase.
            merged.append(f"by {method} {share}")
        else:
            naive.append(f"{row.title} {share}")
    return "; ".join([*naive, *([f"merged PTQ {', '.join(merged)}"] if merged else [])])


def _size_and_speed(qat: Deployment, merged: Deployment | None) -> str:
    if merged is None or merged.measured is None or qat.measured is None:
        return ""
    changes = [f"{megabytes(merged.measured.total_bytes)} to {megabytes(qat.measured.total_bytes)} MB"]
    # Some runtimes report no speed.
    if merged.ms_per_token and qat.ms_per_token:
        changes.append(f"{number(merged.ms_per_token)} to {number(qat.ms_per_token)} ms per token")
        changes.append(f"{number(1e3 / merged.ms_per_token)} to {number(1e3 / qat.ms_per_token)} tokens per second")
    return f"From merged FP32 to fused QAT-LoRA: {', '.join(changes)}."


def _gain_kept(table: DeploymentTable, qat: Deployment) -> str:
    base, tuned = table.base, table.reference
    kept = []
    exact, perplexity = table.kept_exact_match(qat), table.kept_perplexity(qat)
    if exact is not None and base and base.exact_match is not None and tuned.exact_match is not None:
        gained = f"exact match {percent(base.exact_match)} to {percent(tuned.exact_match)}"
        kept.append(f"{_whole(exact)} of what fine-tuning gained ({gained})")
    if perplexity is not None and base:
        gained = f"perplexity {number(base.perplexity)} to {number(tuned.perplexity)}"
        kept.append(f"{_whole(perplexity)} of the gain in log perplexity ({gained})")
    if not kept:
        return "The improvement by fine-tuning was not measured, so the share that QAT keeps is unknown."
    return f"It keeps {' and '.join(kept)}."


def _whole(share: float) -> str:
    return whole_percent(share).replace("-", "−")


def _share(share: float) -> str:
    """Format a share as a percentage, without a sign if it rounds to zero."""
    # Below half of the last digit, the sign would be all that is left.
    return percent(share if abs(share) >= 0.0005 else 0.0)


def _repeats(pick: Callable[[Speed], Spread]) -> Callable[[Deployment], Spread | None]:
    """Return a function from a deployment to the spread of one of its speeds."""
    return lambda row: None if row.measured is None or row.measured.speed is None else pick(row.measured.speed)


def _speed_column(name: str, pick: Callable[[Speed], Spread]) -> Column[Deployment]:
    """Return a column of medians in tokens per second."""
    repeats = _repeats(pick)

    def median(row: Deployment) -> float | None:
        found = repeats(row)
        return None if found is None else found.median

    return Column(name, "tok/s", median, number, 1, repeats)


def _of(pick: Callable[[Measurement], float | None]) -> Callable[[Deployment], float | None]:
    """Return a function from a deployment to one of its metrics, None if it was not measured."""
    return lambda row: None if row.measured is None else pick(row.measured)


def _runtime_section(table: DeploymentTable, target: str, index: int) -> RuntimeSection:
    rows = [row for row in table.deployments if row.target == target]
    name = TARGET_TITLES.get(target, plain(target))
    return RuntimeSection(name, verdict(table, target), _main_table(table, rows, name), _plots(table, rows, index))


def _main_table(table: DeploymentTable, rows: Sequence[Deployment], name: str) -> Table:
    """Return a table of all rows, with the best quantized deployment of each column marked."""
    table_rows = [TableRow(row.title, css(row), []) for row in rows]
    # No column for a metric that this runtime does not report.
    used = [column for column in columns(table) if any(column.value(row) is not None for row in rows)]
    for column in used:
        best = best_rows([row for row in rows if css(row) in QUANTIZED], column)
        for table_row, row in zip(table_rows, rows, strict=True):
            table_row.cells.append(column.cell(column.value(row), row in best))
    heads = [(column.name, column.unit) for column in used]
    notes = [f"{row.title}: {row.reason}" for row in rows if row.measured is None]
    return Table(f"Deployments in {name}", heads, table_rows, first="Deployment", notes=notes)


def _plots(table: DeploymentTable, rows: Sequence[Deployment], index: int) -> list[Plot]:
    """Return one bar chart for each metric of `PLOT_CAPTIONS` that was measured."""
    # Charts show the metrics that a choice between deployments depends on.
    by_name = {column.name: column for column in columns(table)}
    plots = []
    for name, caption in PLOT_CAPTIONS.items():
        values = [(row, by_name[name].value(row)) for row in rows]
        found = [(row, value) for row, value in values if value is not None and math.isfinite(value)]

        # A perplexity far above the others is left out of the chart, and stated below it.
        base = _far_base(found) if name == "Perplexity" else 0.0
        if base:
            found = [(row, value) for row, value in found if row.name != "base"]
            caption = f"{caption} The base's, {number(base)}, is left out."
        if not any(value > 0 for _, value in found):
            continue

        svg = _bars(f"{name.lower().replace(' ', '-')}-{index}", name, found, by_name[name])
        # The unmerged adapters have the color of the merged ones: both are the FP32 fine-tune.
        classes = dict.fromkeys({"lora": "tuned"}.get(css(row), css(row)) for row, _ in found)
        legend = [(f"l-bar c-{css_class}", LEGEND[css_class]) for css_class in classes]
        plots.append(Plot(name, Markup(svg), caption, legend))
    return plots


def _far_base(found: Sequence[tuple[Deployment, float]]) -> float:
    """Return the base's perplexity if it exceeds `FAR` times the largest of the others, else 0."""
    base = [value for row, value in found if row.name == "base"]
    others = [value for row, value in found if row.name != "base"]
    return base[0] if base and others and base[0] > FAR * max(others) else 0.0


def _bars(name: str, title: str, rows: Sequence[tuple[Deployment, float]], column: Column[Deployment]) -> str:
    """Draw a bar per row, with its name above it and its value at its end."""
    # Values are drawn in the unit of their column.
    unit = {"MB": 1e6, "%": 0.01}.get(column.unit, 1.0)
    tips = [f"{row.title}: {column.write(value)}" for row, value in rows]
    bottom = BAR * len(rows) + 4
    root = canvas(name, title, "; ".join(tips), bottom + 24)
    x = Scale(0, nice_top(max(value for _, value in rows) / unit * 1.02), 0, WIDTH - 52)
    for index, ((row, value), tip) in enumerate(zip(rows, tips, strict=True)):
        top = BAR * index + LINE
        end = x(value / unit)
        text(root, 0, top - 4, row.title, "tick")
        rect(root, 0, top, end, BAR - LINE - 8, f"c-{css(row)}", tip)
        text(root, end + 6, top + 12, column.bare(value), "value")
    x_axis(root, x, bottom, "")
    return to_svg(root)


def _runtimes(table: DeploymentTable) -> list[tuple[str, str]]:
    """Return the version of each runtime, and that of the reference."""
    used = {
        (TARGET_TITLES.get(row.target, row.target), row.measured.runtime) for row in table.deployments if row.measured
    }
    return [*sorted(used), ("reference", table.reference.runtime)]
