"""SIGINT, SIGTERM and SIGHUP end a command in order: work folders are removed, and training saves a checkpoint first.

`raise_on_signals` is in force for a whole command: a signal raises `Stopped`. `defer_signals` is in force while a
training runs: the first signal is noted, so that the step in progress can be finished and saved; a second one raises.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Windows has no SIGHUP.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Handler = Callable[[int, FrameType | None], Any]


class Stopped(KeyboardInterrupt):
    """A signal ended the work. Not an `Exception`, so that nothing which handles errors takes it for one.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, signum: int, message: str | None = None) -> None:
        super().__init__(message or f"Stopped by {signal.Signals(signum).name}.")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """Exit code of the command, as shells report a process that a signal ended."""
        return 128 + self.signum


class StopRequest:
    """The first signal since `defer_signals` began.

    Attributes:
        signum: Number of the signal; None while there was none.
    """

    def __init__(self, announce: Callable[[int], None]) -> None:
        self.signum: int | None = None
        self._announce = announce
        self._at_once = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the first signal; raise at the second, or where work can be stopped at any point."""
        if self._at_once or self.signum is not None:
            raise Stopped(signum)
        self.signum = signum
        self._announce(signum)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Stopped` inside the block: it may take long, and half of it is of no use.

        Raises:
            Stopped: Also where the signal came before the block.
        """
        if self.signum is not None:
            raise Stopped(self.signum)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread at SIGINT, SIGTERM and SIGHUP inside the block."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    with _handled_by(stop):
        yield


@contextmanager
def defer_signals(announce: Callable[[int], None]) -> Iterator[StopRequest]:
    """Note the first signal inside the block instead of raising at once; see `StopRequest`.

    Args:
        announce: Called with the number of the first signal, to report that a second one ends the work at once.
    """
    request = StopRequest(announce)
    with _handled_by(request.handle):
        yield request


@contextmanager
def passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Wait for another command of ours when a signal ends the block: it stops in order, too.

    SIGTERM is passed on. A terminal sends SIGINT and SIGHUP to both already, and a second one would end it at once.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if isinstance(error, Stopped) and error.signum == signal.SIGTERM:
            process.terminate()
        process.wait()
        raise


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Install a handler inside the block. Other threads than the main one cannot, and need not.

    Raises:
        Stopped: Also where native code replaced the one that a signal raised in it by an error of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # What is ignored stays ignored: nohup ignores SIGHUP, and a shell ignores SIGINT for jobs in the background.
    # None is a handler that was not installed from Python, which cannot be put back.
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    ours = [each for each, current in before.items() if current not in (signal.SIG_IGN, None)]
    raised: list[int] = []

    def recording(signum: int, frame: FrameType | None) -> None:
        try:
            handler(signum, frame)
        except Stopped:
            raised.append(signum)
            raise

    for each in ours:
        signal.signal(each, recording)
    try:
        yield
    except Exception as error:
        if raised:
            raise Stopped(raised[0]) from error
        raise
    finally:
        for each in ours:
            signal.signal(each, before[each])
