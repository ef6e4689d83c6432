"""This machine as a device: a work folder, links instead of copies, a process group per program."""

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
from qat_edge_devices.transport import Access, Completed, DeviceInfo, inside, kilobytes


def open_local(address: str, access: Access) -> LocalTransport:
    """This machine, its work folder below `access.folder`."""
    root = None if access.folder is None else Path(access.folder)
    return LocalTransport(address, python=access.python or sys.executable, root=root)


class LocalTransport:
    """Runs programs here, in a new folder under `root` (the system's temporary folder where not given)."""

    def __init__(self, address: str = "", *, python: str = sys.executable, root: Path | None = None) -> None:
        if address:
            raise UnknownNameError(f"local:{address}: this machine takes no address. Write `local`.")
        self.name = "local"
        self.python = python
        self._launcher = Launcher(self.name)
        self.folder = Path(tempfile.mkdtemp(prefix="qat-edge-", dir=root)).resolve()

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Link each file under its name; copied only where links are impossible. There is no cache."""
        for remote, local in files.items():
            try:
                _place(local, self.folder / inside(self.name, remote))
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
    ) -> Completed:
        """Run a program in the work folder; see `Transport.run`."""
        return self._launcher.run(argv, timeout_s, env=env, cwd=self.folder, on_line=on_line)

    def pull(self, remote: str, local: Path) -> None:
        """Link what is at `remote` to `local`; copied where it lies on another file system."""
        try:
            _place(self.folder / inside(self.name, remote), local)
        except OSError as error:
            raise TransportError(
                f"{self.name}: {remote} cannot be brought back to {local} ({error.strerror})."
            ) from error

    def info(self) -> DeviceInfo:
        """What this machine is, from /proc where there is one."""
        return DeviceInfo(
            machine=platform.machine(),
            cpu_model=_proc_value("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
            cores=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            os=platform.platform(),
            bits=64 if sys.maxsize > 2**32 else 32,
            free_memory_bytes=kilobytes(_proc_value("/proc/meminfo", "MemAvailable") or ""),
            free_disk_bytes=shutil.disk_usage(self.folder).free,
        )

    def cancel(self) -> None:
        """End what runs; see `Transport.cancel`."""
        self._launcher.cancel()

    def close(self) -> None:
        """Remove the work folder; links go, what they point at stays."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _place(source: Path, target: Path) -> None:
    """Make `target` another name of `source`, folder by folder, file by file."""
    source = source.resolve(strict=True)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            _place(child, target / child.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # never written into: it may be another name of a file that is not ours
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        # Not a symbolic link: onnxruntime refuses weights that resolve to outside the model's folder.
        shutil.copyfile(source, target)


def _proc_value(path: str, key: str) -> str | None:
    """The first value of `key` in a "key : value" file of /proc, None where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((v.strip() for k, _, v in (x.partition(":") for x in lines) if k.strip() == key), None)
