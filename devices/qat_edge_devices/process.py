"""Start programs on this machine so that they, and all their children, end when they should."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qat_edge_devices.device_errors import (
    CancelledError,
    DeviceTimeoutError,
    ResultError,
    TransportError,
    command_line,
    tail,
)
from qat_edge_devices.process_group import NEW_GROUP, ProcessGroup
from qat_edge_devices.transport import CompletedProgram

Feed = Callable[[IO[bytes]], None]  # writes to the stdin of a program
Drain = Callable[[IO[bytes]], None]  # reads the stdout of a program
MOST_OUTPUT_BYTES = 32 * 1024**2  # of one program, on stdout and on stderr
FEEDER_ENDS_S = 5.0  # once its reader is gone, a feeder fails with a broken pipe at its next write


@dataclass(frozen=True)
class _Start:
    """Everything that `subprocess.Popen` needs to start one program.

    Attributes:
        argv: program and arguments.
        stderr: file descriptor, or subprocess.PIPE.
        has_stdin: whether its stdin is a pipe; empty otherwise.
        env: variables added to this process's environment.
        cwd: folder it starts in; None for the current one.
    """

    argv: Sequence[str]
    stderr: int
    has_stdin: bool
    env: Mapping[str, str] | None = None
    cwd: Path | None = None


class Launcher:
    """Starts the programs of one device. `cancel`, from any thread, ends them and prevents further starts."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._running: set[ProcessGroup] = set()

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
    ) -> CompletedProgram:
        """Run `argv` in its own process group, which is killed on timeout and on any exception.

        Args:
            argv: program and arguments.
            timeout_s: time limit in seconds.
            env: variables added to its environment.
            cwd: folder it starts in.
            on_line: called with each line of stdout.
            feed: writes to stdin from another thread, and closes it if the program is to see the end; without one,
                stdin is empty.
            drain: reads stdout, which is then missing from the result.
            shown: command line for messages, if not `argv`.

        Raises:
            DeviceTimeoutError: it exceeded `timeout_s` seconds.
            CancelledError: `cancel` was called.
            TransportError: there is no such program, or it cannot be started.
        """
        expired = threading.Event()
        # A file, not a pipe: nobody has to read stderr while stdout is being read.
        with tempfile.TemporaryFile("w+b") as stderr:
            start = _Start(argv, stderr.fileno(), feed is not None, env, cwd)
            with self._started(start) as group, _supervised(group, timeout_s, expired, feed):
                process = group.process
                output = _read_output(self.device, process, on_line, drain)
                process.wait()
            # The end of a long text has the reason of a failure, and the marker of a script.
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - MOST_OUTPUT_BYTES))
            errors = stderr.read().decode(errors="replace")

        # A killed program looks like a failed one, so the reasons of this side come first.
        self._raise_if_stopped(shown or argv, timeout_s, expired, errors)
        return CompletedProgram(process.returncode, output, errors)

    def hold(self, argv: Sequence[str], first: bytes) -> subprocess.Popen[bytes]:
        """Start `argv`, write `first` to its stdin, and leave it running.

        The program should exit when its stdin closes, which happens even if this process is killed.
        """
        self._raise_if_cancelled()
        process = _popen(self.device, _Start(argv, subprocess.PIPE, has_stdin=True))
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.write(first)
                process.stdin.flush()
        return process

    def cancel(self) -> None:
        """Kill running programs; callers that wait for one get a CancelledError."""
        # Set first: a program that is starting now sees it, or is in the set below.
        self._cancelled.set()
        with self._lock:
            for group in self._running:
                group.kill()

    def pause(self, seconds: float) -> None:
        """Wait for `seconds`, or until `cancel` is called.

        Raises:
            CancelledError: `cancel` was called.
        """
        self._cancelled.wait(seconds)
        self._raise_if_cancelled()

    @contextmanager
    def _started(self, start: _Start) -> Iterator[ProcessGroup]:
        """Start a program that `cancel` can kill; close its pipes and wait for it at the end."""
        # Under the lock, so that a cancel between the check and the registration is not missed.
        with self._lock:
            self._raise_if_cancelled()
            process = _popen(self.device, start)
            group = ProcessGroup(process)
            self._running.add(group)
        try:
            yield group
        finally:
            with self._lock:
                self._running.discard(group)
                group.close()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            process.wait()

    def _raise_if_stopped(self, argv: Sequence[str], timeout_s: float, expired: threading.Event, errors: str) -> None:
        self._raise_if_cancelled()
        if expired.is_set():
            raise DeviceTimeoutError(
                f"{self.device}: `{command_line(argv)}` ran past {timeout_s:g} s and was stopped. Request less, or "
                f"allow more time. Last lines of its stderr:{tail(errors)}"
            )

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError(f"{self.device}: cancelled.")


def _popen(device: str, start: _Start) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            start.argv,
            stdin=subprocess.PIPE if start.has_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=start.stderr,
            cwd=start.cwd,
            env={**os.environ, **(start.env or {})},
            # Its own session: Ctrl-C reaches only this process, and one killpg reaches every child.
            start_new_session=True,
            creationflags=NEW_GROUP,
        )
    except OSError as error:
        raise TransportError(
            f"{device}: `{command_line(start.argv)}` cannot be started ({error.strerror}). Check that "
            f"{start.argv[0]} exists there and is executable."
        ) from error


def _read_output(
    device: str, process: subprocess.Popen[bytes], on_line: Callable[[str], None] | None, drain: Drain | None
) -> str:
    """Read stdout to its end; return it, or "" if `drain` read it.

    Raises:
        ResultError: it is longer than any program's output can be.
    """
    if process.stdout is None:
        return ""
    if drain is not None:
        drain(process.stdout)
        return ""
    lines: list[str] = []
    size = 0
    while raw := process.stdout.readline(MOST_OUTPUT_BYTES):
        size += len(raw)
        if size > MOST_OUTPUT_BYTES:
            raise ResultError(f"{device}: the program wrote more than {MOST_OUTPUT_BYTES} bytes, so it was stopped.")
        line = raw.decode(errors="replace")
        lines.append(line)
        if on_line is not None:
            on_line(line.rstrip("\n"))
    return "".join(lines)


def _feed(process: subprocess.Popen[bytes], feed: Feed | None) -> None:
    """Run `feed` on the stdin of a program: the body of the feeder thread."""
    if feed is None or process.stdin is None:
        return
    try:
        feed(process.stdin)
    except (OSError, ValueError):
        # The program ended first, or a file cannot be read. Closed, so that the program sees the end and reports it.
        with suppress(OSError, ValueError):
            process.stdin.close()


@contextmanager
def _supervised(group: ProcessGroup, timeout_s: float, expired: threading.Event, feed: Feed | None) -> Iterator[None]:
    """Feed a program, and kill its group after `timeout_s` or when the block is left."""
    timer = threading.Timer(timeout_s, _expire, (group, expired))
    feeder = threading.Thread(target=_feed, args=(group.process, feed), daemon=True)
    timer.start()
    # In a thread, because a program may fill its stdout before it has read all of its stdin.
    feeder.start()
    try:
        yield
    finally:
        timer.cancel()
        # Also after a normal exit: a child left behind would keep using its CPU, and files in the work folder.
        group.kill()
        feeder.join(FEEDER_ENDS_S)


def _expire(group: ProcessGroup, expired: threading.Event) -> None:
    expired.set()
    group.kill()
