"""The seam between this machine and a device: files in, a program run, files out.

Names on the device (`remote`) are relative to a work folder that the transport makes for itself: programs
start there, and `close` removes it and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from qat_edge_devices.device_errors import TransportError


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
    """What a report says about the machine.

    memory_bytes: installed. bits: of its programs' addresses. free_memory_bytes, free_disk_bytes: available now, the
    disk being the one with the work folder. None where the device does not say.
    """

    machine: str
    cpu_model: str
    cores: int
    memory_bytes: int
    os: str
    bits: int | None = None
    free_memory_bytes: int | None = None
    free_disk_bytes: int | None = None


@dataclass(frozen=True)
class Access:
    """How to reach and use a device beside its address; None for the transport's own choice.

    python: the interpreter there. folder: the folder there that holds work folders and the cache of sent files.
    ssh_config: an OpenSSH configuration file in place of the user's own.
    """

    python: str | None = None
    folder: str | None = None
    ssh_config: str | None = None


class Transport(Protocol):
    """A connection to one device.

    name: the device as the user named it ("local", "ssh:pi@kitchen"), for messages.
    python: the interpreter on the device that has the runtimes.
    """

    name: str
    python: str

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Send files or folders here to names there. A transport may link: programs must not write to them.

        keep: what is sent may stay in a cache on the device, so that it need not be sent the next time.

        Raises:
            RoomError: they do not fit, found before anything is sent.
            IntegrityError: what arrived is not what was sent.
            ConnectionLostError: the connection ended, and could not be had again.
        """

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
            ConnectionLostError: the connection ended; the device kills the program once it notices. The next call
                connects again, to a new work folder with all that was pushed; what programs wrote is gone.
            TransportError: it could not be started.
        """

    def pull(self, remote: str, local: Path) -> None:
        """Bring a file or a folder to `local`, which must not exist yet."""

    def info(self) -> DeviceInfo:
        """What the machine is."""

    def cancel(self) -> None:
        """From another thread: end what runs there and what is being sent; every later call but close raises."""

    def close(self) -> None:
        """Remove the work folder. Calling it twice is harmless."""


def inside(device: str, remote: str) -> PurePosixPath:
    """`remote` as a path below the work folder.

    Raises:
        TransportError: it names a place elsewhere, or none.
    """
    path = PurePosixPath(remote)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in remote:
        raise TransportError(f"{device}: {remote!r} does not name a place in the work folder.")
    return path


def kilobytes(text: str) -> int | None:
    """Bytes in a figure such as "1024 kB", None where there is no figure."""
    digits = next((word for word in text.split() if word.isdigit()), None)
    return None if digits is None else int(digits) * 1024
