"""The table that validate prints: one row a model, the figures that decide."""

from __future__ import annotations

from rich.table import Table

from qat_edge.results import Measured, Report, Spread

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


def _cells(m: Measured) -> list[str]:
    artifact_memory = None if m.memory_bytes is None or m.runtime_bytes is None else m.memory_bytes - m.runtime_bytes
    return [
        m.name if m.target == "torch" else f"{m.name.split()[0]} {m.target}",
        f"{m.total_bytes / 1e6:.1f}",
        f"{m.perplexity:.2f}",
        "-" if m.exact_match is None else f"{m.exact_match:.1%}",
        "-" if m.agreement is None else f"{m.agreement.kl_nats:.4f}",
        "-" if m.agreement is None else f"{m.agreement.top1:.1%}",
        _median(None if m.speed is None else m.speed.decode),
        _median(None if m.speed is None else m.speed.prefill),
        "-" if artifact_memory is None else f"{artifact_memory / 1e6:.0f}",
    ]


def _median(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.0f}"
