"""This machine as a device: a work folder, links instead of copies, a process group per program."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from qat_edge_devices.errors import TransportError, UnknownNameError
from qat_edge_devices.process import run_process
from qat_edge_devices.transport import Completed, DeviceInfo


class LocalTransport:
    """Runs programs here, in a new folder under `root` (the system's temporary folder where not given)."""

    def __init__(self, address: str = "", *, python: str = sys.executable, root: Path | None = None) -> None:
        if address:
            raise UnknownNameError(f"local:{address}: this machine takes no address. Write `local`.")
        self.name = "local"
        self.python = python
        self.folder = Path(tempfile.mkdtemp(prefix="qat-edge-", dir=root)).resolve()

    def push(self, local: Path, remote: str) -> None:
        """Link `local` under `remote`; copied only where links are impossible."""
        try:
            _place(local, self._inside(remote))
        except OSError as error:
            raise TransportError(f"{self.name}: {local} cannot be sent to {self.folder} ({error.strerror}).") from error

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Completed:
        """Run a program in the work folder; see `Transport.run`."""
        return run_process(self.name, argv, timeout_s, env=env, cwd=self.folder, on_line=on_line)

    def pull(self, remote: str, local: Path) -> None:
        """Link what is at `remote` to `local`; copied where it lies on another file system."""
        try:
            _place(self._inside(remote), local)
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
        )

    def close(self) -> None:
        """Remove the work folder; links go, what they point at stays."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _inside(self, remote: str) -> Path:
        path = PurePosixPath(remote)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise TransportError(f"{self.name}: {remote!r} does not name a place in the work folder.")
        return self.folder / path


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
