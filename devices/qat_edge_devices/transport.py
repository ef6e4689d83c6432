"""The seam between this machine and a device: files in, a program run, files out.

Names on the device (`remote`) are relative to a work folder that the transport makes for itself: programs
start there, and `close` removes it and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Completed:
    """How a program ended. returncode is negative, or above 128, where a signal ended it."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def signal(self) -> int | None:
        """The signal that ended the program: -N from this machine, 128 + N through a remote shell."""
        if self.returncode < 0:
            return -self.returncode
        return self.returncode - 128 if self.returncode > 128 else None


@dataclass(frozen=True)
class DeviceInfo:
    """What a report says about the machine. memory_bytes is what is installed, not what is free."""

    machine: str
    cpu_model: str
    cores: int
    memory_bytes: int
    os: str


class Transport(Protocol):
    """A connection to one device.

    name: the device as the user named it ("local", "ssh:pi@kitchen"), for messages.
    python: the interpreter on the device that has the runtimes.
    """

    name: str
    python: str

    def push(self, local: Path, remote: str) -> None:
        """Send a file or a folder. A transport may link instead of copying: programs must not write to it."""

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Completed:
        """Run a program to its end; `env` adds to its environment, `on_line` sees stdout as it is written.

        Raises:
            DeviceTimeoutError: it ran past `timeout_s`; it and its children were killed.
            TransportError: it could not be started.
        """

    def pull(self, remote: str, local: Path) -> None:
        """Bring a file or a folder to `local`, which must not exist yet."""

    def info(self) -> DeviceInfo:
        """What the machine is."""

    def close(self) -> None:
        """Remove the work folder. Calling it twice is harmless."""
