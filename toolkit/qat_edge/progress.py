"""What people read while a verb runs: lines and progress bars on stderr, so that stdout stays for results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)
LINE_EVERY_S = 10.0  # where there is no terminal, a bar is a line now and then


def say(text: str) -> None:
    """One line about what is being done."""
    console.print(text, markup=False, soft_wrap=True)


@dataclass
class Bar:
    """A progress bar on a terminal, a line every few seconds elsewhere."""

    title: str
    total: int
    progress: Progress | None
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    first: int = 0
    last_line: float = field(default_factory=time.monotonic)

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are done; `note` says how it goes."""
        self.done = done
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=done, note=note)
        elif time.monotonic() - self.last_line >= LINE_EVERY_S or done == self.total:
            self.last_line = time.monotonic()
            say(f"  {self.title} {done}/{self.total}  {note}  {self._eta()}")

    def start_at(self, done: int) -> None:
        """Count from `done`: what an earlier run did says nothing about this one's speed."""
        self.first = done
        self.update(done)

    def _eta(self) -> str:
        if self.done <= self.first:
            return ""
        left = (time.monotonic() - self.started) / (self.done - self.first) * (self.total - self.done)
        return f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A bar of `total` steps."""
    if not console.is_terminal:
        yield Bar(title, total, None)
        return
    columns = (
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        progress.add_task(title, total=total, note="")
        yield Bar(title, total, progress)
