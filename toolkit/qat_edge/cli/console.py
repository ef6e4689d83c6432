"""Messages, progress bars and tables for people, on stderr. Results go to stdout."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import click

from qat_edge.errors import UsageError
from qat_edge.options import MOST_PROMPT
from qat_edge.progress import Bar, LineBar
from qat_edge.stop_signals import Stopped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# A terminal obeys control characters; marks of direction show text in another order than it has; no encoding has halves
# of surrogate pairs, which names of files may hold. New lines and tabs are ours.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_unencodable() -> None:
    """Let stdout and stderr write characters that their encoding does not have as escapes, instead of raising.

    The encoding is the user's: of a Windows console that is redirected, or of PYTHONIOENCODING.
    """
    for stream in (sys.stdout, sys.stderr):
        # Without a console there is no stream, and a notebook's has no encoding of its own.
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str) -> str:
    """Return a text with characters that could control the terminal as escapes: data, names and keys are anyone's."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def echo(text: str, err: bool = False, fg: str | None = None) -> None:
    """Print a line on stdout or stderr."""
    click.secho(visible(text), err=err, fg=fg)


def echo_error(text: str) -> None:
    """Print an error on stderr, in red on a terminal."""
    echo(f"Error: {text}", err=True, fg="red" if sys.stderr.isatty() else None)


def echo_generated(piece: str) -> None:
    """Print a piece of generated text, without a new line; a file or pipe gets it as it is."""
    click.echo(visible(piece) if sys.stdout.isatty() else piece, nl=False)


def typed_lines() -> Iterator[str]:
    """Yield lines typed at a prompt; the end of the input, or Ctrl-C at the prompt, ends them.

    Raises:
        Stopped: another signal.
    """
    with suppress(ImportError):  # there is none for Windows, whose console edits lines itself
        import readline  # noqa: F401  (arrow keys edit a line and bring back earlier ones)
    echo("Type a message, or /help.", err=True)
    while True:
        try:
            yield click.prompt(">", prompt_suffix=" ", default="", show_default=False)
        except click.Abort as abort:
            # click raises it instead of EOFError and KeyboardInterrupt, whatever the signal was.
            if isinstance(abort.__context__, Stopped) and abort.__context__.signum != signal.SIGINT:
                raise abort.__context__ from None
            echo("")
            return


def piped_lines() -> Iterator[str]:
    """Yield the lines of stdin.

    Raises:
        UsageError: they are not in the encoding of this environment.
    """
    try:
        while line := sys.stdin.readline(MOST_PROMPT + 2):
            yield line
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin: this is not text in {sys.stdin.encoding} ({error.reason}). Give a message on each line."
        ) from error


@cache
def console() -> Console:
    """Return the console on stderr. rich is imported here, when something is printed: `--help` does without it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class ConsoleReporter:
    """Lines of text and progress bars on stderr; where stderr is no terminal, a few lines instead of a bar."""

    def info(self, text: str) -> None:
        """Print one line."""
        console().print(visible(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line, in yellow on a terminal."""
        console().print(f"Warning: {visible(text)}", markup=False, soft_wrap=True, style="yellow")

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
            TextColumn("  {task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console()) as shown:
            shown.add_task(visible(title), total=total, note="")
            yield _RichBar(shown)


@dataclass(frozen=True)
class _RichBar:
    """The one task of a rich progress display."""

    shown: Progress

    def start_at(self, done: int) -> None:
        self.shown.reset(self.shown.task_ids[0], completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        self.shown.update(self.shown.task_ids[0], completed=done, note=visible(note))
