"""Tables that the commands print, each at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from qat_edge.evaluate.deployments import Deployment, DeploymentTable
from qat_edge.evaluate.metrics import perplexity
from qat_edge.evaluate.results import Measurement, Report, Spread
from qat_edge.quant.bit_allocation import Choice, LayerCost, Sensitivity
from qat_edge.quant.ptq.method_names import PTQ_METHODS
from qat_edge.report.formatting import megabytes, number, reference_title
from qat_edge.verbs.demo import Stage
from qat_edge.verbs.eval import Evaluated, SourceScore

# Short titles, so that a table fits a terminal of 80 columns.
SUMMARY_COLUMNS = ("model", "MB", "perpl.", "exact", "KL", "top-1", "decode", "prefill", "RAM MB")
SCHEMA_COLUMNS = ("answers by schema.json", "prompts", "valid", "constrained")
DEPLOYMENT_COLUMNS = ("deployment", "MB", "RAM MB", "ms/tok", "tok/s", "perpl.", "exact", "kept")
NOT_MEASURED = "-"
# Methods whose own name is too long for the first column, explained below the table.
ABBREVIATIONS = {"coordinate-descent": "cd"}


def summary_table(report: Report) -> Table:
    """Return the results of validate: one row per model, speeds in tokens per second."""
    table = Table(
        title=f"{report.tokens} tokens, compared with the {reference_title(report.measured)}",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    _add_columns(table, SUMMARY_COLUMNS, fixed=True)
    for measured in report.measured:
        table.add_row(*_summary_cells(measured))

    # Differences below the noise floor are rounding, not quality.
    floor = report.noise_floor
    captions = [f"Noise floor: KL {floor.kl_nats:.3g}, top-1 {floor.top1:.1%}"]
    for method, abbreviation in ABBREVIATIONS.items():
        if any(measured.name.endswith(f"({PTQ_METHODS[method]})") for measured in report.measured):
            captions.append(f"{abbreviation}: {PTQ_METHODS[method]}")
    table.caption = "\n".join(captions)
    return table


def schema_table(report: Report) -> Table | None:
    """Return the valid answers of each artifact with a schema; None if there is none."""
    judged = [(measured, measured.schema) for measured in report.measured if measured.schema is not None]
    if not judged:
        return None
    table = Table(title_justify="left", caption_justify="left", box=None, pad_edge=False)
    _add_columns(table, SCHEMA_COLUMNS)
    captions = []
    for measured, found in judged:
        name = f"{_short_name(measured.name)} {measured.target}"
        table.add_row(
            name,
            f"{found.answers} of {found.answers + found.left_out}",
            NOT_MEASURED if found.valid_share is None else f"{found.valid} ({found.valid_share:.1%})",
            NOT_MEASURED if found.constrained is None else f"{found.constrained} ({found.constrained_share:.1%})",
        )
        captions += [f"{name}: {remark}" for remark in found.remarks()]
    table.caption = "\n".join(captions)
    return table


def sensitivity_table(measured: Sensitivity, choice: Choice | None, most: int = 10) -> Table:
    """Return the `most` weights with the largest KL at their fewest bits.

    Args:
        measured: KL of each weight at each width.
        choice: The chosen bits, if a size or a KL was requested.
        most: Number of rows.
    """
    table = Table(
        title=f"KL in nats per token: the {most} most sensitive of {len(measured.weights)} weights",
        title_justify="left", caption_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    columns = [f"at {bits} bits" for bits in measured.widths]
    _add_columns(table, ("weight", *columns, *(["chosen"] if choice else [])))
    for name, weight in measured.by_cost()[:most]:
        costs = [_kl(weight, bits) for bits in measured.widths]
        table.add_row(name, *costs, *([str(choice.bits[name])] if choice else []))
    table.caption = "\n".join(
        f"all at {bits} bits: {number(kl)} measured, {number(measured.predicted(bits))} predicted by the sum"
        for bits, kl in measured.together.items()
    )
    return table


def _kl(weight: LayerCost, bits: int) -> str:
    return number(weight.costs[bits].kl_nats) if bits in weight.costs else NOT_MEASURED


def deployment_table(table: DeploymentTable, target: str) -> Table:
    """Return the deployments of one runtime; the caption explains the rows without values."""
    rows = [row for row in table.deployments if row.target == target]
    # Collapsed padding: with eight columns, every character counts.
    shown = Table(
        title=f"{target}, {table.tokens} tokens",
        title_justify="left", caption_justify="left", box=None, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    _add_columns(shown, DEPLOYMENT_COLUMNS)
    for row in rows:
        shown.add_row(row.title, *_deployment_cells(table, row))

    captions = ["kept: share of the improvement by fine-tuning that is left, in log perplexity"]
    if table.further_training:
        captions.append(table.further_training)
    captions += [f"{row.title}: {row.reason}" for row in rows if row.measured is None]
    shown.caption = "\n".join(captions)
    return shown


def eval_table(result: Evaluated) -> Table:
    """Return the score of each model, and its difference from the one it is compared with."""
    what = "perplexity" if result.is_perplexity else "right"
    table = Table(
        title=f"{result.task}: {result.title}, {result.package}",
        title_justify="left", caption_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    _add_columns(table, ("model", "questions", what, "95% interval", "difference", "95% interval"))
    for score in result.scores:
        table.add_row(score.source, str(score.questions), *_score_cells(score, result.is_perplexity))

    captions = []
    for score in result.scores:
        if score.difference is not None and not score.difference.is_shown:
            captions.append(f"{score.source} and {score.against}: no difference shown")
    unit = "nats per token" if result.is_perplexity else "points of 100"
    if any(score.difference is not None for score in result.scores):
        captions.append(f"differences in {unit}, on the same questions; intervals from 10,000 bootstrap resamples")
    table.caption = "\n".join(captions)
    return table


def _score_cells(score: SourceScore, is_perplexity: bool) -> list[str]:
    """Return score and difference, each with its interval."""

    def shown(value: float) -> str:
        return number(perplexity(value)) if is_perplexity else f"{value:.1%}"

    def change(value: float) -> str:
        # Adding 0.0 turns -0.0 into 0.0.
        return f"{round(value, 4) + 0.0:+.4f}" if is_perplexity else f"{round(100 * value, 1) + 0.0:+.1f}"

    measured = score.score
    cells = [shown(measured.value), f"{shown(measured.low)} to {shown(measured.high)}"]
    if score.difference is None:
        return [*cells, NOT_MEASURED, NOT_MEASURED]
    found = score.difference.interval
    return [*cells, change(found.value), f"{change(found.low)} to {change(found.high)}"]


def stage_table(stages: list[Stage]) -> Table:
    """Return the wall time and the peak memory of each stage of the demo."""
    table = Table(title="Time and memory by command")
    table.add_column("command")
    table.add_column("wall time", justify="right")
    table.add_column("peak memory", justify="right")
    for stage in stages:
        table.add_row(stage.name, f"{stage.wall_s:.0f} s", f"{stage.peak_memory_bytes / 1e9:.2f} GB")
    table.add_row("total", f"{sum(stage.wall_s for stage in stages) / 60:.1f} min", "")
    return table


def _add_columns(table: Table, names: Sequence[str], fixed: bool = False) -> None:
    """Add columns: the first aligned left, the others right. fixed: never narrower than their titles."""
    for index, name in enumerate(names):
        width = len(name) if fixed else None
        table.add_column(name, justify="right" if index else "left", no_wrap=True, min_width=width)


def _deployment_cells(table: DeploymentTable, row: Deployment) -> list[str]:
    measured = row.measured
    if measured is None:
        return [NOT_MEASURED] * (len(DEPLOYMENT_COLUMNS) - 1)
    kept = table.kept_perplexity(row)
    return [
        megabytes(measured.total_bytes),
        NOT_MEASURED if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f}",
        NOT_MEASURED if row.ms_per_token is None else number(row.ms_per_token),
        _median(None if measured.speed is None else measured.speed.decode),
        number(measured.perplexity),
        NOT_MEASURED if measured.exact_match is None else f"{measured.exact_match:.1%}",
        # Adding 0.0 turns -0.0 into 0.0, so that no "-0%" is printed.
        NOT_MEASURED if kept is None else f"{round(kept, 2) + 0.0:.0%}",
    ]


def _summary_cells(measured: Measurement) -> list[str]:
    memory = measured.above_runtime_bytes
    agreement, speed = measured.agreement, measured.speed
    return [
        measured.name if measured.target == "torch" else f"{_short_name(measured.name)} {measured.target}",
        f"{measured.total_bytes / 1e6:.1f}",
        f"{measured.perplexity:.2f}" if measured.scored else NOT_MEASURED,
        NOT_MEASURED if measured.exact_match is None else f"{measured.exact_match:.1%}",
        NOT_MEASURED if agreement is None else f"{agreement.kl_nats:.4f}",
        NOT_MEASURED if agreement is None else f"{agreement.top1:.1%}",
        _median(None if speed is None else speed.decode),
        _median(None if speed is None else speed.prefill),
        NOT_MEASURED if memory is None else f"{memory / 1e6:.0f}",
    ]


def _short_name(name: str) -> str:
    """Return `rtn` for `ptq (round-to-nearest)`, `adapters hqq` for `adapters (HQQ)`, others as they are."""
    kind, _, title = name.partition(" ")
    for method, known in PTQ_METHODS.items():
        if title == f"({known})":
            short = ABBREVIATIONS.get(method, method)
            return short if kind == "ptq" else f"{kind} {short}"
    return name


def _median(spread: Spread | None) -> str:
    return NOT_MEASURED if spread is None else f"{spread.median:.0f}"
