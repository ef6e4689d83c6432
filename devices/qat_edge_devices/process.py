"""Run a program of this machine so that it, and whatever it started, ends when we say so."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qat_edge_devices.errors import DeviceTimeoutError, TransportError, command_line, tail
from qat_edge_devices.transport import Completed


def run_process(
    device: str,
    argv: Sequence[str],
    timeout_s: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Run `argv` in a process group of its own; the group is killed on timeout and on any exception.

    Raises:
        DeviceTimeoutError: it ran past `timeout_s` seconds.
        TransportError: there is no such program, or it cannot be started.
    """
    expired = threading.Event()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        with _start(device, argv, env, cwd, stderr.fileno()) as process:
            timer = threading.Timer(timeout_s, _expire, (process, expired))
            timer.start()
            try:
                lines = _read_lines(process, on_line)
                process.wait()
            finally:
                timer.cancel()
                _kill_group(process)
        stderr.seek(0)
        errors = stderr.read()
    if expired.is_set():
        raise DeviceTimeoutError(
            f"{device}: `{command_line(argv)}` ran past {timeout_s:g} s and was stopped. Ask for less, or "
            f"allow more time. Last lines of its stderr:{tail(errors)}"
        )
    return Completed(process.returncode, "".join(lines), errors)


def _start(
    device: str, argv: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None, stderr: int
) -> subprocess.Popen[str]:
    try:
        # A session of its own: Ctrl-C reaches only us, and one killpg reaches every child.
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, cwd=cwd,
            env={**os.environ, **(env or {})}, text=True, encoding="utf-8", errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise TransportError(
            f"{device}: `{command_line(argv)}` cannot be started ({error.strerror}). Check that "
            f"{argv[0]} exists there and may be executed."
        ) from error


def _read_lines(process: subprocess.Popen[str], on_line: Callable[[str], None] | None) -> list[str]:
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if on_line is not None:
            on_line(line.rstrip("\n"))
    return lines


def _expire(process: subprocess.Popen[str], expired: threading.Event) -> None:
    expired.set()
    _kill_group(process)


def _kill_group(process: subprocess.Popen[str]) -> None:
    # Also after a normal end: a child left behind would keep its CPU, and its files in the work folder.
    with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
