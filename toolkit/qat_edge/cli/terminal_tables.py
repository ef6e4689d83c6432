"""The table that validate prints: one row a model, the figures that decide."""

from __future__ import annotations

from rich.table import Table

from qat_edge.evaluate.deployments import Deployment, DeploymentTable
from qat_edge.evaluate.results import Measured, Report, Spread
from qat_edge.quant.bit_allocation import Choice, Sensitivity
from qat_edge.report.figures import megabytes, number
from qat_edge.run import PTQ_METHODS
from qat_edge.verbs.demo import Stage

# Short, so that the table fits a terminal of 80 columns.
COLUMNS = ("model", "MB", "perpl.", "exact", "KL", "top-1", "decode", "prefill", "RAM MB")


def summary_table(report: Report) -> Table:
    """The report's figures for a terminal; "-" is "not measured", speeds are tokens per second."""
    table = Table(
        title=f"{report.tokens} tokens against the FP32 fine-tune", title_justify="left", box=None, pad_edge=False
    )
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if index else "left", no_wrap=True, min_width=len(name))
    for measured in report.measured:
        table.add_row(*_cells(measured))
    floor = report.noise_floor
    table.caption = f"Arithmetic noise floor: KL {floor.kl_nats:.3g}, top-1 {floor.top1:.1%}"
    return table


def sensitivity_table(measured: Sensitivity, choice: Choice | None, most: int = 10) -> Table:
    """The `most` weights that cost most at their fewest bits, for a terminal."""
    table = Table(
        title=f"KL in nats per token, the {most} greatest of {len(measured.weights)} weights",
        title_justify="left", caption_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for index, name in enumerate(("weight", "at 4 bits", "at 8 bits", *(["chosen"] if choice else []))):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for name, weight in measured.by_cost()[:most]:
        costs = [number(weight.costs[bits].kl_nats) if bits in weight.costs else "-" for bits in (4, 8)]
        table.add_row(name, *costs, *([str(choice.bits[name])] if choice else []))
    table.caption = "\n".join(
        f"all at {bits} bits: {number(kl)} measured, {number(measured.predicted(bits))} by the sum"
        for bits, kl in measured.together.items()
    )
    return table


def deployment_table(table: DeploymentTable, target: str) -> Table:
    """One runtime's deployments for a terminal; below it why a row has no figures."""
    rows = [row for row in table.deployments if row.target == target]
    shown = Table(
        title=f"{target}, {table.tokens} tokens", title_justify="left", box=None, pad_edge=False, collapse_padding=True
    )
    for index, name in enumerate(("deployment", "MB", "RAM MB", "ms/tok", "tok/s", "perpl.", "exact", "kept")):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        shown.add_row(row.title, *_deployment_cells(table, row))
    untold = [f"{row.title}: {row.reason}" for row in rows if row.measured is None]
    kept = "kept: share of what fine-tuning gained over the base, in log perplexity"
    shown.caption = "\n".join([kept, *filter(None, [table.further_training]), *untold])
    shown.caption_justify = "left"
    return shown


def _deployment_cells(table: DeploymentTable, row: Deployment) -> list[str]:
    m = row.measured
    if m is None:
        return ["-"] * 7
    kept = table.kept_perplexity(row)
    return [
        megabytes(m.total_bytes),
        "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f}",
        "-" if row.ms_per_token is None else number(row.ms_per_token),
        _median(None if m.speed is None else m.speed.decode),
        number(m.perplexity),
        "-" if m.exact_match is None else f"{m.exact_match:.1%}",
        "-" if kept is None else f"{round(kept, 2) + 0.0:.0%}",
    ]


def _cells(m: Measured) -> list[str]:
    memory = m.above_runtime_bytes
    return [
        m.name if m.target == "torch" else f"{_short(m.name)} {m.target}",
        f"{m.total_bytes / 1e6:.1f}",
        f"{m.perplexity:.2f}" if m.scored else "-",
        "-" if m.exact_match is None else f"{m.exact_match:.1%}",
        "-" if m.agreement is None else f"{m.agreement.kl_nats:.4f}",
        "-" if m.agreement is None else f"{m.agreement.top1:.1%}",
        _median(None if m.speed is None else m.speed.decode),
        _median(None if m.speed is None else m.speed.prefill),
        "-" if memory is None else f"{memory / 1e6:.0f}",
    ]


def _short(name: str) -> str:
    """`rtn` for `ptq (round-to-nearest)`, so that the table fits."""
    return next((method for method, words in PTQ_METHODS.items() if name == f"ptq ({words})"), name)


def _median(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.0f}"


def stage_table(stages: list[Stage]) -> Table:
    """Wall time and peak memory of each stage of the demo."""
    table = Table(title="Where the time went")
    table.add_column("command")
    table.add_column("wall time", justify="right")
    table.add_column("peak memory", justify="right")
    for stage in stages:
        table.add_row(stage.name, f"{stage.wall_s:.0f} s", f"{stage.peak_memory_bytes / 1e9:.2f} GB")
    table.add_row("total", f"{sum(s.wall_s for s in stages) / 60:.1f} min", "")
    return table
