"""Errors of the device layer. The toolkit catches the root, `DeviceLayerError`, in one place per command.

DeviceLayerError               the message names the device
├── UnknownNameError           a transport or runtime that is in no table
├── TransportError             the device cannot be reached, or a file cannot be sent or brought back
│   ├── ConnectionLostError    ... the connection ended midway; retried before it is reported
│   ├── CapacityError          ... the device's disk or memory is too small for the files
│   └── IntegrityError         ... a file on the device differs from the one that was sent
├── UnsupportedDeviceError     no runtime is built for the device's processor or system
├── DeviceTimeoutError         a program exceeded its time limit and was stopped
├── CancelledError             the work was cancelled, as Ctrl-C does
├── ProgramError               a program on the device failed: exit code, last lines of its stderr
│   ├── KilledError            ... it was ended by a signal, for example when memory ran out
│   ├── MissingPackageError    ... a Python package is missing; the message has its name on PyPI
│   └── RequestRejectedError   ... the runtime cannot run this artifact or this request
└── ResultError                a program succeeded but its results cannot be read
"""

from __future__ import annotations

from collections.abc import Sequence

from qat_edge_devices.device_data import printable

TAIL_LINES = 8  # of a program's stderr, quoted in a message
TAIL_CHARACTERS = 1000  # of each line


class DeviceLayerError(Exception):
    """Base of all errors of this package; the message is written for the user."""


class UnknownNameError(DeviceLayerError):
    """There is no transport or runtime of that name."""


class TransportError(DeviceLayerError):
    """The device, a file on it or a program on it cannot be reached."""


class ConnectionLostError(TransportError):
    """The connection ended while something was in progress."""


class CapacityError(TransportError):
    """The device's disk or memory is too small for the files to be sent."""


class IntegrityError(TransportError):
    """A file on the device differs from the one that was sent."""


class UnsupportedDeviceError(DeviceLayerError):
    """The device's processor or system cannot run the requested program."""


class CancelledError(DeviceLayerError):
    """The work was cancelled from outside."""


class DeviceTimeoutError(DeviceLayerError):
    """A program was stopped because it exceeded its time limit."""


class ProgramError(DeviceLayerError):
    """A program on the device failed."""


class KilledError(ProgramError):
    """A program on the device was ended by a signal."""


class MissingPackageError(ProgramError):
    """The device's Python lacks a package."""


class RequestRejectedError(ProgramError):
    """The runtime on the device cannot run this artifact or this request."""


class ResultError(DeviceLayerError):
    """Results are missing or cannot be read."""


def command_line(argv: Sequence[str]) -> str:
    """Join `argv` for a message. Nothing is quoted: this is for people, not for a shell."""
    return " ".join(argv)


def tail(stderr: str) -> str:
    """Return the last lines of `stderr`, indented, to end an error message with."""
    lines = [printable(line, TAIL_CHARACTERS) for line in stderr.splitlines() if line.strip()][-TAIL_LINES:]
    return "".join(f"\n  {line}" for line in lines) if lines else " It wrote nothing to stderr."
