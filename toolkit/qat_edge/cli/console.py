"""Messages, progress bars and tables for people, on stderr. Results go to stdout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from qat_edge.progress import Bar, LineBar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@cache
def console() -> Console:
    """Return the console on stderr. rich is imported here, when something is printed: `--help` does without it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class ConsoleReporter:
    """Lines of text and progress bars on stderr; where stderr is no terminal, a few lines instead of a bar."""

    def info(self, text: str) -> None:
        """Print one line."""
        console().print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line, in yellow on a terminal."""
        console().print(f"Warning: {text}", markup=False, soft_wrap=True, style="yellow")

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """Show a bar of `total` steps."""
        if not console().is_terminal:
            yield LineBar(title, total, self.info)
            return

        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console()) as shown:
            shown.add_task(title, total=total, note="")
            yield _RichBar(shown)


@dataclass(frozen=True)
class _RichBar:
    """The one task of a rich progress display."""

    shown: Progress

    def start_at(self, done: int) -> None:
        self.shown.reset(self.shown.task_ids[0], completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        self.shown.update(self.shown.task_ids[0], completed=done, note=note)
