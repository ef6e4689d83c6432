"""Run programs of this machine so that they, and whatever they started, end when we say so."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qat_edge_devices.device_errors import CancelledError, DeviceTimeoutError, TransportError, command_line, tail
from qat_edge_devices.transport import Completed

Feed = Callable[[IO[bytes]], None]
Drain = Callable[[IO[bytes]], None]
FEEDER_ENDS_S = 5.0  # a feeder whose reader is gone meets a broken pipe at its next write


class Launcher:
    """Starts the programs of one device. `cancel`, from any thread, ends them and lets no other start."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        on_line: Callable[[str], None] | None = None,
        feed: Feed | None = None,
        drain: Drain | None = None,
        shown: Sequence[str] | None = None,
    ) -> Completed:
        """Run `argv` in a process group of its own; the group is killed on timeout and on any exception.

        feed: writes to stdin from another thread, and closes it where the program is to see its end; without one
        stdin is empty. drain: reads stdout, which is then not in the answer; otherwise `on_line` sees its lines.
        shown: what messages call the program, where not `argv`.

        Raises:
            DeviceTimeoutError: it ran past `timeout_s` seconds.
            CancelledError: `cancel` was called.
            TransportError: there is no such program, or it cannot be started.
        """
        expired, lines = threading.Event(), list[str]()
        with tempfile.TemporaryFile("w+b") as stderr:
            started = self._started(argv, env, cwd, stderr.fileno(), feed is not None)
            with started as process, _attended(process, timeout_s, expired, feed):
                if process.stdout is not None:
                    drain(process.stdout) if drain else lines.extend(_read_lines(process.stdout, on_line))
                process.wait()
            stderr.seek(0)
            errors = stderr.read().decode(errors="replace")
        self._check(shown or argv, timeout_s, expired, errors)
        return Completed(process.returncode, "".join(lines), errors)

    def hold(self, argv: Sequence[str], first: bytes) -> subprocess.Popen[bytes]:
        """Start `argv`, give it `first` and keep its stdin open: it is to end once that closes, as when we die."""
        self._check_cancelled()
        process = _start(self.device, argv, None, None, subprocess.PIPE, feeds=True)
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.write(first)
                process.stdin.flush()
        return process

    def cancel(self) -> None:
        """End what runs; whoever waits for it gets a CancelledError."""
        self._cancelled.set()
        with self._lock:
            for process in self._running:
                _kill_group(process)

    def pause(self, seconds: float) -> None:
        """Wait, unless `cancel` is called.

        Raises:
            CancelledError: it was.
        """
        self._cancelled.wait(seconds)
        self._check_cancelled()

    @contextmanager
    def _started(
        self, argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None, stderr: int, feeds: bool
    ) -> Iterator[subprocess.Popen[bytes]]:
        with self._lock:  # between the check and the entry no cancel may pass unseen
            self._check_cancelled()
            process = _start(self.device, argv, env, cwd, stderr, feeds)
            self._running.add(process)
        try:
            yield process
        finally:
            with self._lock:
                self._running.discard(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            process.wait()

    def _check(self, argv: Sequence[str], timeout_s: float, expired: threading.Event, errors: str) -> None:
        self._check_cancelled()
        if expired.is_set():
            raise DeviceTimeoutError(
                f"{self.device}: `{command_line(argv)}` ran past {timeout_s:g} s and was stopped. Ask for less, or "
                f"allow more time. Last lines of its stderr:{tail(errors)}"
            )

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError(f"{self.device}: stopped, as was asked.")


def _start(
    device: str, argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None, stderr: int, feeds: bool
) -> subprocess.Popen[bytes]:
    try:
        # A session of its own: Ctrl-C reaches only us, and one killpg reaches every child.
        return subprocess.Popen(
            argv, stdin=subprocess.PIPE if feeds else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            cwd=cwd, env={**os.environ, **(env or {})}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise TransportError(
            f"{device}: `{command_line(argv)}` cannot be started ({error.strerror}). Check that "
            f"{argv[0]} exists there and may be executed."
        ) from error


def _read_lines(stdout: IO[bytes], on_line: Callable[[str], None] | None) -> Iterator[str]:
    for raw in stdout:
        line = raw.decode(errors="replace")
        if on_line is not None:
            on_line(line.rstrip("\n"))
        yield line


def _feed(process: subprocess.Popen[bytes], feed: Feed | None) -> None:
    if feed is not None and process.stdin is not None:
        try:
            feed(process.stdin)
        except (OSError, ValueError):  # the program ended first, or a file cannot be read: it sees the end, and says so
            with suppress(OSError, ValueError):
                process.stdin.close()


@contextmanager
def _attended(
    process: subprocess.Popen[bytes], timeout_s: float, expired: threading.Event, feed: Feed | None
) -> Iterator[None]:
    """Fed, and killed after `timeout_s` or when the block is left."""
    timer = threading.Timer(timeout_s, _expire, (process, expired))
    feeder = threading.Thread(target=_feed, args=(process, feed), daemon=True)
    timer.start()
    feeder.start()
    try:
        yield
    finally:
        timer.cancel()
        _kill_group(process)
        feeder.join(FEEDER_ENDS_S)


def _expire(process: subprocess.Popen[bytes], expired: threading.Event) -> None:
    expired.set()
    _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Also after a normal end: a child left behind would keep its CPU, and its files in the work folder.
    with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
