"""Report messages and progress through a replaceable `Reporter`.

Library code calls `info`, `warn` and `bar`; none of it knows how they are shown. The command line shows them on stderr
(`qat_edge.cli.console`), so that stdout stays free for results. Without `report_to`, they go to the `qat_edge` logger
of the standard library, as in any other library.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

LINE_EVERY_S = 60.0  # a line of progress in a log, at least this far apart
QUARTER = 0.25  # and one at each quarter of the way
_logger = logging.getLogger("qat_edge")


class Bar(Protocol):
    """Progress of one piece of work."""

    def start_at(self, done: int) -> None:
        """Begin at `done` steps, which an earlier process did: they do not count for the estimate of the rest."""

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are done. note: a short text about the latest one, such as its loss."""


class Reporter(Protocol):
    """Receiver of messages and progress."""

    def info(self, text: str) -> None:
        """Take one line about what is being done."""

    def warn(self, text: str) -> None:
        """Take one line about something the user should look at."""

    def progress(self, title: str, total: int) -> AbstractContextManager[Bar]:
        """Return a bar of `total` steps."""


@dataclass
class LineBar:
    """Progress as a few lines of text, for logs and for anything that is no terminal."""

    title: str
    total: int
    write: Callable[[str], None]
    _done: int = 0
    _first: int = 0
    _shown: int = 0
    _started: float = field(default_factory=lambda: time.monotonic())
    _last_line: float = field(default_factory=lambda: time.monotonic())

    def start_at(self, done: int) -> None:
        """Begin at `done` steps."""
        self._done = self._first = self._shown = done

    def update(self, done: int, note: str = "") -> None:
        """Write a line at each quarter of the way, and once a minute in between."""
        self._done = done
        now = time.monotonic()
        quarter = int(done / self.total / QUARTER) > int(self._shown / self.total / QUARTER)
        if quarter or now - self._last_line >= LINE_EVERY_S:
            self._last_line, self._shown = now, done
            self.write(f"  {self.title} {done}/{self.total}  {note}  {self._eta(now)}".rstrip())

    def _eta(self, now: float) -> str:
        if not self._first < self._done < self.total:
            return ""
        left_s = (now - self._started) / (self._done - self._first) * (self.total - self._done)
        return f"{left_s / 60:.0f} min left" if left_s >= 90 else f"{left_s:.0f} s left"


class LogReporter:
    """Reports to the `qat_edge` logger; the default where a program calls the library."""

    def info(self, text: str) -> None:
        """Log at level INFO."""
        _logger.info(text.strip())

    def warn(self, text: str) -> None:
        """Log at level WARNING."""
        _logger.warning(text.strip())

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """Log a few lines."""
        yield LineBar(title, total, self.info)


class SilentReporter:
    """Shows nothing."""

    def info(self, text: str) -> None:
        """Drop a line."""

    def warn(self, text: str) -> None:
        """Drop a line."""

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """Show no bar."""
        yield LineBar(title, total, self.info)


@dataclass(frozen=True)
class PrefixedReporter:
    """Another reporter, each line of which begins with a name: for work on several devices at once."""

    name: str
    inner: Reporter

    def info(self, text: str) -> None:
        """Pass on "NAME: text"."""
        self.inner.info(f"{self.name}: {text.strip()}")

    def warn(self, text: str) -> None:
        """Pass on "NAME: text"."""
        self.inner.warn(f"{self.name}: {text.strip()}")

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """Write lines: a terminal shows one moving bar at a time."""
        yield LineBar(title, total, self.info)


_current: ContextVar[Reporter] = ContextVar("reporter", default=LogReporter())  # noqa: B039  it has no state


def current() -> Reporter:
    """Return the reporter in force. A new thread has the default one: start it with a copy of the context."""
    return _current.get()


@contextmanager
def report_to(reporter: Reporter) -> Iterator[None]:
    """Send messages and progress to `reporter` inside the block."""
    token = _current.set(reporter)
    try:
        yield
    finally:
        _current.reset(token)


def use(reporter: Reporter) -> None:
    """Send messages and progress to `reporter` from here to the end of this process or thread."""
    _current.set(reporter)


def info(text: str) -> None:
    """Report one line about what is being done."""
    current().info(text)


def warn(text: str) -> None:
    """Report one line about something the user should look at."""
    current().warn(text)


def bar(title: str, total: int) -> AbstractContextManager[Bar]:
    """Report the progress of `total` steps."""
    return current().progress(title, total)
