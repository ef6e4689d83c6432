"""The table that `qat-edge sweep` prints. Not among the other tables: it needs the extra of this command."""

from __future__ import annotations

from rich.table import Table

from qat_edge.report.sweep_results import SweepResult
from qat_edge.train.search_space import describe

NOT_MEASURED = "-"


def sweep_table(result: SweepResult, most: int = 10) -> Table:
    """Return the `most` trials with the lowest loss, each with its difference from the best one."""
    ranked = result.ranked
    table = Table(
        title="Loss of the frozen checkpoint, in nats per token",
        title_justify="left", caption_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("trial", no_wrap=True)
    for name in ("loss", "above best", "95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("options")
    for trial in ranked[:most]:
        interval = None if trial.difference is None else trial.difference.interval
        table.add_row(
            f"{trial.number}{'*' if trial.number == result.as_given else ''}",
            f"{trial.score:.4f}",
            NOT_MEASURED if interval is None else f"{interval.value:.4f}",
            NOT_MEASURED if interval is None else f"{interval.low:.4f} to {interval.high:.4f}",
            describe(trial.values),
        )
    notes = [f"{len(ranked) - most} more in report.html"] if len(ranked) > most else []
    notes += ["*: the options as they were given"] if result.as_given in [trial.number for trial in ranked] else []
    table.caption = "; ".join(notes)
    return table
