"""Write files and folders whole or not at all, and name the file and the cause where that fails."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qat_edge.errors import RunError

OLD = ".old"  # suffix of the hidden folder that keeps what is being replaced


@contextmanager
def replace_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder next to `target` that takes its name when the block ends without an error.

    Whatever goes wrong, `target` is either the whole new folder or the old one, unchanged.

    Raises:
        RunError: `target` exists and `force` is not set, or the disk is full.
    """
    with disk_errors(target), work_folder(target.parent, target.name) as work:
        if target.exists() and not force:
            raise RunError(f"{target} exists already. Give --force to replace it.")
        yield work
        work.chmod(0o755)
        if target.exists():
            old = _hidden_folder(target.parent, f"{target.name}{OLD}")
            target.rename(old / target.name)
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)


@contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty hidden folder in `parent`, removed at the end (or by the next call, if this process is killed)."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    work = _hidden_folder(parent, name)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _hidden_folder(parent: Path, name: str) -> Path:
    """Make a hidden folder whose name holds the machine and process that it belongs to."""
    return Path(tempfile.mkdtemp(prefix=f".{name}.{platform.node()}-{os.getpid()}-", dir=parent))


def _sweep(parent: Path) -> None:
    """Remove the work folders of killed processes; a folder that one of them was replacing gets its name back."""
    ours = re.compile(rf"\.(.+?)({re.escape(OLD)})?\.{re.escape(platform.node())}-(\d{{1,9}})-[a-z0-9_]{{8}}")
    for folder in list(parent.glob(".*")):
        found = ours.fullmatch(folder.name)
        if found is None or _is_running(int(found[3])):
            continue
        name = found[1]
        if found[2] and (folder / name).exists() and not (parent / name).exists():
            (folder / name).rename(parent / name)
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, under another user
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of writing to disk into a RunError that names the file and the cause.

    Raises:
        RunError: no space, no permission, a read-only file system.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _storage_reason(error)
        if reason is None:
            raise
        raise RunError(
            f"{target}: cannot be written ({reason}). Make room or choose another place, then repeat."
        ) from error


def _storage_reason(error: Exception) -> str | None:
    """Return why writing failed, or None where the error is about something else."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno is not None else None
    found = re.search(r"os error (\d+)", str(error))  # safetensors, written in Rust
    if found:
        return os.strerror(int(found[1]))
    return "the write failed" if "file write failed" in str(error) else None  # torch.save
