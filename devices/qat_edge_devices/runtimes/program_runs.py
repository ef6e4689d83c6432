"""Shared by all runtimes: check free memory, retry after a dropped connection, explain exit codes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from qat_edge_devices.device_errors import (
    CapacityError,
    ConnectionLostError,
    KilledError,
    ProgramError,
    command_line,
    tail,
)
from qat_edge_devices.transport import CompletedProgram, DeviceInfo

TIMEOUT_S = 3600.0  # of one program
ATTEMPTS = 3  # for one request, if the connection ends during it
SIGKILL = 9  # on a device, from a machine that may not have it
Result = TypeVar("Result")


def retry(call: Callable[[], Result]) -> Result:
    """Call `call`, and call it again if the connection was lost.

    Args:
        call: called without arguments; it starts from the beginning each time, so it must be safe to repeat.

    Raises:
        ConnectionLostError: it was lost at every attempt.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return call()
        except ConnectionLostError:
            continue
    # The last attempt, outside the loop, so that its error can be completed.
    try:
        return call()
    except ConnectionLostError as error:
        raise ConnectionLostError(f"{error} It was tried {ATTEMPTS} times.") from error


def require_memory(device: str, info: DeviceInfo, files: Iterable[Path]) -> None:
    """Require free memory for the weights, the least that a run needs.

    Raises:
        CapacityError: there is less. A device that does not report its free memory is accepted.
    """
    needed = sum(path.stat().st_size for path in files if path.is_file())
    if info.free_memory_bytes is not None and needed > info.free_memory_bytes:
        raise CapacityError(
            f"{device}: the artifact's weights take {needed / 1e6:.0f} MB of memory and the device has "
            f"{info.free_memory_bytes / 1e6:.0f} MB free. End other programs there. Nothing was sent."
        )


def require_success(device: str, argv: Sequence[str], completed: CompletedProgram) -> None:
    """Require exit code 0.

    Raises:
        KilledError, ProgramError: the program failed; the message gives a likely reason.
    """
    # A signal is reported apart from an exit code: its usual reasons can be named.
    code, last_lines = completed.returncode, tail(completed.stderr)
    if code == 0:
        return
    if completed.signal is not None:
        raise KilledError(
            f"{device}: `{command_line(argv)}` was ended by {_signal_name(completed.signal)}. {_advice(completed)} "
            f"Last lines of its stderr:{last_lines}"
        )
    raise ProgramError(
        f"{device}: `{command_line(argv)}` failed with exit code {code}. Last lines of its stderr:{last_lines}"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a signal that this system does not have
        return f"signal {number}"


def _advice(completed: CompletedProgram) -> str:
    if completed.signal == SIGKILL:
        return "The system does this when memory runs out: free some, or export with a shorter context."
    return "The runtime crashed: check that its version is the one the artifact was exported for."
