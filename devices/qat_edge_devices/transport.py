"""Interface between this machine and a device: send files, run a program, bring files back.

Names on the device (`remote`) are relative to a work folder that the transport creates for itself. Programs start
in that folder, and `close` removes it and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from qat_edge_devices.device_data import whole_number
from qat_edge_devices.device_errors import TransportError
from qat_edge_devices.processor import Processor

SIGNAL_BASE = 128  # a shell reports a program that signal N ended as exit code 128 + N
MOST_EXIT_CODE = 255  # of POSIX; Windows has more of them, for crashes, and no signals


@dataclass(frozen=True)
class CompletedProgram:
    """Exit code and output of a program that has ended.

    Attributes:
        returncode: exit code; negative, or above 128, if a signal ended the program.
        stdout: decoded text; empty if the caller read the stream itself.
        stderr: decoded text.
    """

    returncode: int
    stdout: str
    stderr: str

    @property
    def signal(self) -> int | None:
        """Signal that ended the program: -N if it ran on this machine, 128 + N through a remote shell."""
        if self.returncode < 0:
            return -self.returncode
        return self.returncode - SIGNAL_BASE if SIGNAL_BASE < self.returncode <= MOST_EXIT_CODE else None


@dataclass(frozen=True)
class DeviceInfo:
    """Description of a machine for reports and checks. None where the device does not report a value.

    Attributes:
        machine: processor architecture as `uname -m` prints it.
        cpu_model: name of the processor or the system on chip.
        cores: number of CPUs.
        memory_bytes: installed memory.
        os: operating system and kernel.
        processor: its kind.
        bits: address size of its programs, 32 or 64.
        free_memory_bytes: memory available now.
        free_disk_bytes: space available now on the disk with the work folder.
    """

    machine: str
    cpu_model: str
    cores: int
    memory_bytes: int
    os: str
    processor: Processor = Processor.OTHER
    bits: int | None = None
    free_memory_bytes: int | None = None
    free_disk_bytes: int | None = None


@dataclass(frozen=True)
class Access:
    """Settings to reach and use a device, besides its address. None selects the transport's default.

    Attributes:
        python: Python interpreter on the device.
        folder: folder on the device that holds work folders and the cache of sent files.
        ssh_config: OpenSSH configuration file that replaces the user's own.
    """

    python: str | None = None
    folder: str | None = None
    ssh_config: str | None = None


class Transport(Protocol):
    """Connection to one device.

    Attributes:
        name: the device as the user named it ("local", "ssh:pi@kitchen"), for messages.
        python: the interpreter on the device that has the runtimes installed.
    """

    name: str
    python: str

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Send local files or folders to the device. A transport may link them: programs must not write to them.

        Args:
            files: name on the device -> local file or folder.
            keep: whether the files may stay in a cache on the device, so that the next run need not send them.

        Raises:
            CapacityError: they do not fit; checked before anything is sent.
            IntegrityError: the device received something else than was sent.
            ConnectionLostError: the connection ended and could not be restored.
        """

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> CompletedProgram:
        """Run a program to its end, in the work folder.

        Args:
            argv: program and arguments.
            timeout_s: time limit in seconds.
            env: variables added to the program's environment.
            on_line: called with each line of stdout as it is written.

        Raises:
            DeviceTimeoutError: it exceeded `timeout_s`; the program and its children were killed.
            ConnectionLostError: the connection ended; the device kills the program once it notices. The next call
                connects again, to a new work folder with everything that was pushed; program output is gone.
            TransportError: it could not be started.
        """

    def pull(self, remote: str, local: Path) -> None:
        """Bring a file or a folder to `local`, which must not exist yet."""

    def info(self) -> DeviceInfo:
        """Describe the machine."""

    def cancel(self) -> None:
        """End running programs and transfers, from another thread. Every later call except `close` raises."""

    def close(self) -> None:
        """Remove the work folder. Calling it twice is harmless."""


def work_path(device: str, remote: str) -> PurePosixPath:
    """Return `remote` as a path relative to the work folder.

    Raises:
        TransportError: it is empty, or points outside the work folder.
    """
    path = PurePosixPath(remote)
    leads_out = path.is_absolute() or ".." in path.parts
    if sys.platform == "win32":  # a drive or a backslash leads elsewhere there
        leads_out = leads_out or bool(PureWindowsPath(remote).drive) or "\\" in remote
    if leads_out or not path.parts or "\0" in remote:
        raise TransportError(f"{device}: {remote!r} is not a path inside the work folder.")
    return path


def parse_kilobytes(text: str) -> int | None:
    """Return the bytes in a figure such as "1024 kB", or None if there is no number."""
    numbers = (whole_number(part) for part in text.split())
    found = next((number for number in numbers if number is not None), None)
    return None if found is None else found * 1024
