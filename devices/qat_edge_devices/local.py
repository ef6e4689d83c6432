"""Transport of this machine: a work folder, links instead of copies, a process group per program."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qat_edge_devices.device_errors import TransportError, UnknownNameError
from qat_edge_devices.process import Launcher
from qat_edge_devices.processor import CPUINFO, proc_value, this_processor
from qat_edge_devices.transport import Access, CompletedProgram, DeviceInfo, parse_kilobytes, work_path

if sys.platform == "win32":
    from qat_edge_devices.agent import windows_memory


def open_local(address: str, access: Access) -> LocalTransport:
    """Return a transport of this machine with its work folder below `access.folder`."""
    root = None if access.folder is None else Path(access.folder)
    return LocalTransport(address, python=access.python or sys.executable, root=root)


class LocalTransport:
    """Runs programs on this machine, in a new folder below `root` (by default the system's temporary folder)."""

    def __init__(self, address: str = "", *, python: str = sys.executable, root: Path | None = None) -> None:
        # Ignoring it would measure another machine than the one that was meant.
        if address:
            raise UnknownNameError(f"local:{address}: this machine takes no address. Write `local`.")
        self.name = "local"
        self.python = python
        self._launcher = Launcher(self.name)
        # Resolved, so that programs see the same path as their current folder.
        self.folder = Path(tempfile.mkdtemp(prefix="qat-edge-", dir=root)).resolve()

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Link each file under its name, or copy it if links are impossible. There is no cache."""
        for remote, local in files.items():
            try:
                _link(local, self.folder / work_path(self.name, remote))
            except OSError as error:
                raise TransportError(
                    f"{self.name}: {local} cannot be sent to {self.folder} ({error.strerror})."
                ) from error

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> CompletedProgram:
        """Run a program in the work folder; see `Transport.run`."""
        return self._launcher.run(argv, timeout_s, env=env, cwd=self.folder, on_line=on_line)

    def pull(self, remote: str, local: Path) -> None:
        """Link `remote` to `local`, or copy it if they are on different file systems."""
        try:
            _link(self.folder / work_path(self.name, remote), local)
        except OSError as error:
            raise TransportError(
                f"{self.name}: {remote} cannot be brought back to {local} ({error.strerror})."
            ) from error

    def info(self) -> DeviceInfo:
        """Describe this machine, from /proc if it exists."""
        # macOS has no /proc: the platform module has a name of the processor there, and free memory stays unknown.
        memory_bytes, free_memory_bytes = _memory()
        return DeviceInfo(
            machine=platform.machine(),
            cpu_model=proc_value(CPUINFO, "model name") or platform.processor() or "unknown",
            cores=os.cpu_count() or 1,
            memory_bytes=memory_bytes,
            os=platform.platform(),
            processor=this_processor(),
            bits=64 if sys.maxsize > 2**32 else 32,
            free_memory_bytes=free_memory_bytes,
            free_disk_bytes=shutil.disk_usage(self.folder).free,
        )

    def cancel(self) -> None:
        """End running programs; see `Transport.cancel`."""
        self._launcher.cancel()

    def close(self) -> None:
        """Remove the work folder. Linked files keep their other names."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _memory() -> tuple[int, int | None]:
    """Return the bytes of installed memory, and of those that are free; None where the system does not report them."""
    if sys.platform == "win32":
        return windows_memory.machine_bytes()
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return installed, parse_kilobytes(proc_value(Path("/proc/meminfo"), "MemAvailable") or "")


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of `source`: folders are created, files are hard-linked."""
    source = source.resolve(strict=True)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            _link(child, target / child.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Unlinked, never overwritten: the old name may be a link to a file of the user.
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links. Not a symbolic link: onnxruntime refuses weights whose path
        # resolves to outside the model's folder.
        shutil.copyfile(source, target)
