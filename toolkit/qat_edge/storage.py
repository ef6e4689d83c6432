"""Write files and folders whole or not at all, and name the file and the cause where that fails.

Everything is written under a hidden temporary name next to its place, flushed to the disk, then renamed. The temporary
name holds the machine and the process, so that the next writer removes what a killed process left.
"""

from __future__ import annotations

import errno
import gc
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

from qat_edge.errors import RunError

OLD = ".old"  # suffix of the hidden folder that keeps what is being replaced
CLOCK_S = 2.0  # by which the start time of one process may differ between two readings
# Where a file system cannot flush a folder, its renames are flushed with the files.
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
# On Windows, whoever has a file open prevents its renaming: a virus scanner or an indexer for a moment.
RENAME_PAUSES_S = (0.05, 0.2, 0.5, 1.0, 2.0)


@contextmanager
def replace_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder next to `target` that takes its name when the block ends without an error.

    Whatever goes wrong, `target` is either the whole new folder or the old one, unchanged. After a power cut, too: the
    new folder is on the disk before it takes the name.

    Raises:
        RunError: `target` exists and `force` is not set, or the disk is full.
    """
    with disk_errors(target), work_folder(target.parent, target.name) as work:
        if _is_taken(target) and not force:
            raise RunError(f"{target} exists already. Give --force to replace it.")
        yield work
        work.chmod(0o755)
        flush_folder(work)
        if _is_taken(target):
            _exchange(target, work)
        else:
            rename(work, target)
        _flush(target.parent)


def _exchange(target: Path, work: Path) -> None:
    """Give `work` the name of `target`, and remove what had it."""
    old = _hidden_folder(target.parent, f"{target.name}{OLD}")
    try:
        rename(target, old / target.name)
        rename(work, target)
    except BaseException:  # a signal, too, may end this between the two
        if _is_taken(old / target.name) and not _is_taken(target):
            rename(old / target.name, target)
        raise
    finally:
        if _is_taken(target):
            shutil.rmtree(old, ignore_errors=True)


def _is_taken(path: Path) -> bool:
    """Return whether a name is in use, by a link that leads nowhere as well: a link is replaced, not what it names."""
    return os.path.lexists(path)


@contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty hidden folder in `parent`, removed at the end (or by the next call, if this process is killed)."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    work = _hidden_folder(parent, name)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the name `path` when the block has written it without an error.

    Raises:
        RunError: The file cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        handle, name = tempfile.mkstemp(prefix=_hidden_prefix(path.name), dir=path.parent)
        os.close(handle)
        work = Path(name)
        try:
            yield work
            work.chmod(0o644)
            _flush(work)
            rename(work, path)
        except BaseException:
            work.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old text or the new one.

    Lines end alike on every system, because manifests have the sha256 of what is written.

    Raises:
        RunError: The file cannot be written.
    """
    with replace_file(path) as work:
        work.write_text(text, encoding="utf-8", newline="\n")


def remove_folder(folder: Path) -> None:
    """Remove a folder that others may look at: it disappears at once, not file by file."""
    hidden = _hidden_folder(folder.parent, f"{folder.name}.removed")
    rename(folder, hidden / folder.name)
    shutil.rmtree(hidden, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
    """Give `source` the name of `target`; a file of that name is replaced.

    Raises:
        OSError: it is impossible, or on Windows, another program has one of the files open.
    """
    for pause_s in RENAME_PAUSES_S if os.name == "nt" else ():
        try:
            source.replace(target)
            return
        except PermissionError:
            gc.collect()  # a model that nobody uses any more may still map its file
            time.sleep(pause_s)
    source.replace(target)


def flush_folder(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folder that holds them
        if not path.is_symlink():
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Wait until one file, or the names in one folder, are on the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder or error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(handle)


# --- temporary names ---------------------------------------------------------------------------------------


def sweep(parent: Path) -> None:
    """Remove the temporary files and folders of killed processes in `parent`.

    A folder that one of them was replacing gets its name back.
    """
    # Process ids are used again, so the name also has the time when the process started.
    ours = re.compile(
        rf"\.(.+?)({re.escape(OLD)})?\.{re.escape(platform.node())}-(\d{{1,9}})(?:\.(\d{{1,12}}))?-[a-z0-9_]{{8}}"
    )
    for path in list(parent.glob(".*")):
        found = ours.fullmatch(path.name)
        if found is None or is_running(int(found[3]), int(found[4]) if found[4] else None):
            continue
        name = found[1]
        if found[2] and (path / name).exists() and not (parent / name).exists():
            (path / name).rename(parent / name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_running(pid: int, started_s: float | None) -> bool:
    """Return whether a process of this machine still runs; True where that cannot be found out.

    Args:
        pid: Its id.
        started_s: When it started, in seconds since 1970; None if that is not known.
    """
    import psutil  # here, because most commands need no process but their own

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False  # it ended, and its parent has not noticed yet
        return started_s is None or process.create_time() <= started_s + CLOCK_S
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def own_start_s() -> int:
    """Return when this process started, in seconds since 1970."""
    return _start_s(os.getpid())


@cache
def _start_s(pid: int) -> int:
    import psutil

    return int(psutil.Process(pid).create_time())


def _hidden_prefix(name: str) -> str:
    """Return the beginning of a temporary name, which holds the machine and process that it belongs to."""
    return f".{name}.{platform.node()}-{os.getpid()}.{own_start_s()}-"


def _hidden_folder(parent: Path, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=_hidden_prefix(name), dir=parent))


# --- errors of the disk ------------------------------------------------------------------------------------

# Errors of the system that the user can do something about, and what.
REMEDIES = {
    errno.ENOSPC: "Make room on that disk, then repeat the command.",
    errno.EDQUOT: "Make room within your quota, then repeat the command.",
    errno.EACCES: "Choose another path, or change its permissions.",
    errno.EPERM: "Choose another path, or change its permissions.",
    errno.EROFS: "Choose a path on a file system that can be written to.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.ENOTDIR: "A part of that path is a file. Choose another path.",
    errno.EISDIR: "That path is a folder. Give the path of a file.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`), then repeat the command.",
    errno.ENOMEM: "Free memory, or choose smaller values, then repeat the command.",
}


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of writing to disk into a RunError that names the file and the cause.

    Raises:
        RunError: no space, no permission, a read-only file system.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _error_number(error)
        if number is None:
            raise
        reason = os.strerror(number) if number else "the write failed"
        remedy = REMEDIES.get(number, "Make room or choose another path, then repeat the command.")
        if os.name == "nt" and number == errno.EACCES:
            remedy = f"Close the programs that use it. {remedy}"
        raise RunError(f"{target}: cannot be written ({reason}). {remedy}") from error


def _error_number(error: Exception) -> int | None:
    """Return the number of a failed write's error, 0 if it is unknown; None for an error about something else."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # safetensors, written in Rust
    if found:
        return int(found[1])
    # torch.save, whose writer in C++ has no error numbers.
    return 0 if re.search("file write failed|iostream error|unexpected pos", str(error)) else None
