"""What can go wrong between this machine and a device. Callers translate the root of the tree once.

DeviceError                  names the device
├── UnknownNameError         a transport or runtime that no table lists
├── TransportError           a device that cannot be reached, a file that cannot be sent or brought back
│   ├── ConnectionLostError  ... the connection ended in the middle; tried again before it is reported
│   ├── RoomError            ... disk or memory of the device cannot hold what was to be sent
│   └── IntegrityError       ... what lies on the device is not what was sent
├── UnsuitableError          a device that no runtime of ours was built for
├── DeviceTimeoutError       a program ran past its time and was stopped
├── CancelledError           somebody asked for the end, as Ctrl-C does
├── ProgramError             a program on the device failed: exit code, last lines it wrote
│   ├── KilledError          ... ended by a signal, as when memory ran out
│   ├── MissingPackageError  ... lacks a Python package, named as pip knows it
│   └── RefusedError         ... says that the artifact or the request cannot be run
└── ResultError              a program ended well and left results that cannot be read
"""

from __future__ import annotations

from collections.abc import Sequence

TAIL_LINES = 8


class DeviceError(Exception):
    """Base of all errors of this package; the message is written for the user."""


class UnknownNameError(DeviceError):
    """No transport or runtime of that name."""


class TransportError(DeviceError):
    """The device, a file on it or a program on it cannot be reached."""


class ConnectionLostError(TransportError):
    """The connection ended while something was under way."""


class RoomError(TransportError):
    """The device's disk or memory cannot hold what was to be sent."""


class IntegrityError(TransportError):
    """What lies on the device is not what was sent."""


class UnsuitableError(DeviceError):
    """The device's processor or system cannot run what was asked."""


class CancelledError(DeviceError):
    """The work was stopped from outside."""


class DeviceTimeoutError(DeviceError):
    """A program was stopped because it ran past the time it was given."""


class ProgramError(DeviceError):
    """A program on the device failed."""


class KilledError(ProgramError):
    """A program on the device was ended by a signal."""


class MissingPackageError(ProgramError):
    """The device's Python lacks a package."""


class RefusedError(ProgramError):
    """The runtime on the device cannot do what was asked."""


class ResultError(DeviceError):
    """Results are missing or cannot be read."""


def command_line(argv: Sequence[str]) -> str:
    """`argv` as a person would read it."""
    return " ".join(argv)


def tail(stderr: str) -> str:
    """The last lines of `stderr`, indented, for the end of a message."""
    lines = [line for line in stderr.splitlines() if line.strip()][-TAIL_LINES:]
    return "".join(f"\n  {line}" for line in lines) if lines else " It wrote nothing to stderr."
