"""One writer per run folder: a lock that the operating system releases when the process that holds it ends.

RUN/.lock is the lock, an empty file that stays. RUN/.lock.json names its holder, for the message that refuses a second
one; it goes when the lock is released.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from qat_edge import previous_run, storage
from qat_edge.errors import RunError

LOCK = ".lock"
HOLDER = ".lock.json"

P = ParamSpec("P")
Result = TypeVar("Result")


class _Held(NamedTuple):
    """A lock of this process: the thread that took it, and device and inode of the file."""

    thread: int
    file: tuple[int, int]


class _Folder(Protocol):
    @property
    def path(self) -> Path: ...


_Run = TypeVar("_Run", bound=_Folder)
_held: dict[Path, _Held] = {}  # by folder


def writes_run(verb: str) -> Callable[[Callable[Concatenate[_Run, P], Result]], Callable[Concatenate[_Run, P], Result]]:
    """Decorate a verb whose first argument is the run that it writes into: it holds the lock while it runs.

    Args:
        verb: Its name, for the message that refuses a second one.
    """

    def decorate(function: Callable[Concatenate[_Run, P], Result]) -> Callable[Concatenate[_Run, P], Result]:
        @functools.wraps(function)
        def locked(run: _Run, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            with writing(run.path, verb):
                return function(run, *args, **kwargs)

        return locked

    return decorate


@contextmanager
def writing(folder: Path, verb: str, create: bool = False, resuming: bool = False) -> Iterator[None]:
    """Hold the lock of a run folder inside the block. A thread that holds it already may enter again.

    On entry, whatever a killed process left half done is finished or removed.

    Args:
        folder: The run folder.
        verb: What is about to write, for the message that refuses a second one.
        create: Make the folder if it does not exist; it is removed again where the block leaves nothing in it.
        resuming: Passed on to `previous_run.recover`.

    Raises:
        RunError: Another process, or another thread of this one, is writing into the folder, or a part of it is a link.
    """
    made = _make(folder) if create else []
    key = folder.resolve()
    if key in _held and _held[key].thread == threading.get_ident():
        yield
        return

    previous_run.refuse_links(folder)
    before = _names(folder)
    with _unused_removed_on_windows(folder, made, before), _locked(folder, verb):
        _held[key] = _Held(threading.get_ident(), _identity(folder / LOCK))
        try:
            with storage.disk_errors(folder):
                for part in (folder, folder / "checkpoints", folder / "exports"):
                    storage.sweep(part)
                previous_run.recover(folder, resuming)
            yield
        finally:
            del _held[key]
            with suppress(OSError):
                (folder / HOLDER).unlink()
            if os.name != "nt":  # while it is held: a file that another process has locked since must stay
                _remove_unused(folder, made, before)


@contextmanager
def _unused_removed_on_windows(folder: Path, made: list[Path], before: set[str]) -> Iterator[None]:
    """Remove at the end what was made for the lock: Windows removes no open file, so none that is locked."""
    try:
        yield
    finally:
        if os.name == "nt":
            _remove_unused(folder, made, before)


def require_held(folder: Path) -> None:
    """Refuse to write into a run folder that was removed or replaced since this process took its lock.

    Raises:
        RunError: The lock in it is another file, or gone.
    """
    held = _held.get(folder.resolve())
    if held is None:
        return
    with suppress(OSError):
        if _identity(folder / LOCK) == held.file:
            return
    raise RunError(
        f"{folder} was removed or replaced by another process while this one wrote into it. What it held is lost; "
        "choose another run folder and begin again."
    )


def _identity(path: Path) -> tuple[int, int]:
    """Return device and inode of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


@contextmanager
def _locked(folder: Path, verb: str) -> Iterator[None]:
    """Take the lock at once or refuse.

    Raises:
        RunError: It is held, or cannot be taken in this folder.
    """
    import filelock  # here: it is slow to import, and only verbs that write need it

    for name in (LOCK, HOLDER):
        _require_file(folder / name)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    with storage.disk_errors(folder):
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(_refusal(folder)) from None
    try:
        holder = {"pid": os.getpid(), "started_s": storage.own_start_s(), "host": platform.node(), "verb": verb}
        with storage.disk_errors(folder):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            (folder / HOLDER).write_text(json.dumps(holder | {"since": since}) + "\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _require_file(path: Path) -> None:
    """Refuse a lock that is no plain file: opening a pipe waits for ever, and a link leads to a file of others.

    Raises:
        RunError: Names what it is.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # missing; or opening it reports the error
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISLNK, "link"), (stat.S_ISFIFO, "pipe"))
    kind = next((name for is_kind, name in kinds if is_kind(mode)), "special file")
    raise RunError(
        f"{path} is a {kind}; qat-edge keeps a plain file there while it writes into the run. Remove it, then repeat."
    )


def _refusal(folder: Path) -> str:
    """Return the message that refuses a second writer."""
    who = "another process"
    with suppress(RunError):
        holder = _read_holder(folder / HOLDER)
        if holder:
            who = "`qat-edge {verb}`, process {pid} on {host}, since {since},".format(**holder)
    return (
        f"{folder} is in use: {who} is writing into it. Wait until it ends or stop it, then repeat; or choose "
        "another run folder."
    )


def _read_holder(path: Path) -> dict[str, Any]:
    """Return who holds the lock; empty where that is not known."""
    from qat_edge.readers import read_json

    holder = read_json(path, RunError)
    known = isinstance(holder, dict) and {"pid", "started_s", "host", "verb", "since"} <= holder.keys()
    if not known or not isinstance(holder["pid"], int) or not isinstance(holder["started_s"], int):
        return {}
    # A killed process leaves its name; the one that has the lock now has not written its own yet.
    here = holder["host"] == platform.node()
    return holder if not here or storage.is_running(holder["pid"], holder["started_s"]) else {}


# --- a folder that is made for the lock --------------------------------------------------------------------


def is_unused(folder: Path) -> bool:
    """Return whether a folder holds no more than a training leaves that was stopped before it began."""
    ours = {LOCK, HOLDER, "checkpoints"}
    if not {path.name for path in folder.iterdir()} <= ours:
        return False
    checkpoints = folder / "checkpoints"
    return not checkpoints.exists() or {path.name for path in checkpoints.iterdir()} <= {"inputs.json"}


def _names(folder: Path) -> set[str]:
    """Return the names of everything in a folder; none where it cannot be listed."""
    with suppress(OSError):
        return {path.name for path in folder.iterdir()}
    return set()


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the ones that were missing, the innermost first.

    Raises:
        RunError: It cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with storage.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_unused(folder: Path, made: list[Path], before: set[str]) -> None:
    """Remove the lock from a folder into which nothing else came, and the folders that `_make` made for it.

    Args:
        folder: The run folder; one that is none of ours, and was refused, stays as it was.
        made: Folders that were missing, the innermost first.
        before: Names of everything in the folder before.
    """
    if LOCK in before or _names(folder) != before | {LOCK}:
        return
    with suppress(OSError):
        (folder / LOCK).unlink()
        for path in made:
            path.rmdir()
