"""What runtimes share: room is made sure of first, a lost connection is asked again, and an end is told in words."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from qat_edge_devices.device_errors import ConnectionLostError, KilledError, ProgramError, RoomError, command_line, tail
from qat_edge_devices.transport import Completed, DeviceInfo

TIMEOUT_S = 3600.0  # of one program
TRIES = 3  # of one request, where the connection ends in the middle of it
Result = TypeVar("Result")


def asked_again(ask: Callable[[], Result]) -> Result:
    """What `ask` gives; it begins anew where the connection was lost, so it must not mind what is there.

    Raises:
        ConnectionLostError: it was lost every time.
    """
    for _ in range(TRIES - 1):
        try:
            return ask()
        except ConnectionLostError:
            continue
    try:
        return ask()
    except ConnectionLostError as error:
        raise ConnectionLostError(f"{error} It was asked {TRIES} times.") from error


def require_memory(device: str, info: DeviceInfo, files: Iterable[Path]) -> None:
    """Require free memory for the least that running takes: the weights at once.

    Raises:
        RoomError: there is less. Devices that do not say how much there is are left to try.
    """
    needed = sum(path.stat().st_size for path in files if path.is_file())
    if info.free_memory_bytes is not None and needed > info.free_memory_bytes:
        raise RoomError(
            f"{device}: the artifact's weights take {needed / 1e6:.0f} MB of memory and the device has "
            f"{info.free_memory_bytes / 1e6:.0f} MB free. End other programs there. Nothing was sent."
        )


def check(device: str, argv: Sequence[str], completed: Completed) -> None:
    """Require that a program ended well.

    Raises:
        KilledError, ProgramError: it did not; the message says what to do.
    """
    code, last = completed.returncode, tail(completed.stderr)
    if code == 0:
        return
    if completed.signal is not None:
        raise KilledError(
            f"{device}: `{command_line(argv)}` was ended by {_signal_name(completed.signal)}. {_advice(completed)} "
            f"Last lines of its stderr:{last}"
        )
    raise ProgramError(
        f"{device}: `{command_line(argv)}` failed with exit code {code}. Last lines of its stderr:{last}"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _advice(completed: Completed) -> str:
    if completed.signal == signal.SIGKILL:
        return "The system does so when memory runs out: free some, or export with a shorter context."
    return "The runtime crashed: check that its version is the one the artifact was exported for."
