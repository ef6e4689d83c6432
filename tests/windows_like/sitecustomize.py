"""Make a Linux process behave like Windows, as far as our packages can see. Python imports this file at its start.

With this folder in PYTHONPATH, it holds for a command and for every process that it starts:

- our packages find `sys.platform == "win32"` and `os.name == "nt"`, a kernel32 in Python, no module of Unix alone, and
  none of the functions of `os` that Windows lacks; so does every other package that is not in `EXEMPT`
- a file that a process has open or mapped can be neither replaced nor removed, nor can a folder with such a file
- nothing is renamed over something that exists, and links need rights that users lack
- a name in the folder QAT_EDGE_WINDOWS_LIKE that Windows would refuse cannot be created
- opening a text file without an encoding is an error in our packages

What it cannot show: the libraries' own code for Windows, and everything in native code.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import re
import shutil
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import psutil

OURS = ("qat_edge", "qat_edge_exporters", "qat_edge_devices", "agent")
ROOT = os.environ.get("QAT_EDGE_WINDOWS_LIKE", "")
MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "readline"}
FUNCTIONS = {
    "killpg", "setsid", "wait4", "sysconf", "sched_getaffinity", "sched_setaffinity", "getloadavg", "getpgid", "fork",
    "getuid", "geteuid", "mkfifo", "chown", "fchmod", "statvfs", "wait3", "setpgid", "nice",
}  # fmt: skip
# Packages, besides Python's own, that have other code for Windows than what runs here, and the reason.
EXEMPT = {
    "psutil": "has a module for each system",
    "filelock": "locks with fcntl on Linux, with msvcrt on Windows",
    "multiprocess": "forks on Linux, spawns on Windows",
    "torch": "chooses by sys.platform, which is linux for it",
    "huggingface_hub": "chooses by os.name, which is posix for it",
    "__main__": "the test's own script",
    "sitecustomize": "this file",
}  # fmt: skip
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$)(\..*)?", re.IGNORECASE)
REFUSED = re.compile(r'[<>:"|?*\\\x00-\x1f]|[ .]$')


def _caller(depth: int) -> str:
    """Return the top-level package of the code that called the function `depth` frames above; "os" for Python."""
    try:
        return str(sys._getframe(depth + 1).f_globals.get("__name__", "")).partition(".")[0]
    except ValueError:
        return "os"


def _is_exempt(package: str) -> bool:
    return package in EXEMPT or package in sys.stdlib_module_names


# --- modules and functions ---------------------------------------------------------------------------------


class _Proxy(types.ModuleType):
    """A module with other values of some attributes, and without others."""

    def __init__(self, module: types.ModuleType, values: dict[str, Any], missing: set[str]) -> None:
        super().__init__(module.__name__)
        _own(self).update(_module=module, _values=values, _missing=missing)

    def __getattribute__(self, name: str) -> Any:
        own = _own(self)
        if name in own["_missing"]:
            raise AttributeError(f"module '{own['_module'].__name__}' has no attribute '{name}' on Windows")
        return own["_values"][name] if name in own["_values"] else getattr(own["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_own(self)["_module"], name, value)


def _own(proxy: _Proxy) -> dict[str, Any]:
    found: dict[str, Any] = types.ModuleType.__getattribute__(proxy, "__dict__")
    return found


_import = builtins.__import__


def _import_as_on_windows(name: str, *arguments: Any, **keywords: Any) -> Any:
    package = _caller(1)
    if name in MODULES and not _is_exempt(package):
        raise ModuleNotFoundError(f"No module named '{name}' on Windows", name=name)
    found = _import(name, *arguments, **keywords)
    if name == "os" and not _is_exempt(package):
        return _OUR_OS if package in OURS else _OS
    if package in OURS and name in ("sys", "ctypes"):
        return _SYS if name == "sys" else _CTYPES
    return found


def _memory_of_process(process: int, reference: Any, size: int) -> int:
    reference._obj.WorkingSetSize = reference._obj.PeakWorkingSetSize = psutil.Process().memory_info().rss
    return 1


def _memory_of_machine(reference: Any) -> int:
    memory = psutil.virtual_memory()
    reference._obj.ullTotalPhys, reference._obj.ullAvailPhys = memory.total, memory.available
    return 1


def _kernel32(name: str, **_: Any) -> types.SimpleNamespace:
    """Return the functions of kernel32 that our packages call, which may be given types."""
    return types.SimpleNamespace(
        CreateJobObjectW=lambda security, name: 1,
        OpenProcess=lambda rights, inherit, pid: pid,
        AssignProcessToJobObject=lambda job, process: 1,
        TerminateJobObject=lambda job, code: 1,
        CloseHandle=lambda handle: 1,
        GetCurrentProcess=lambda: -1,
        K32GetProcessMemoryInfo=_memory_of_process,
        GlobalMemoryStatusEx=_memory_of_machine,
    )


_memory_info = psutil.Process.memory_info


def _memory_info_as_on_windows(process: psutil.Process) -> types.SimpleNamespace:
    info = _memory_info(process)
    return types.SimpleNamespace(**info._asdict(), peak_wset=info.rss)


# --- files -------------------------------------------------------------------------------------------------


def _held(path: str) -> str | None:
    """Return a file at or below `path` that this process or a child of it has open or mapped, None if there is none."""
    top = os.path.realpath(path)
    for pid in _family():
        try:
            found = [os.path.realpath(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
            lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            continue
        found += [fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6]
        for file in found:
            if (file == top or file.startswith(f"{top}/")) and not Path(file).is_dir():
                return file
    return None


def _family() -> list[int]:
    """Return this process and its children."""
    try:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    except OSError:
        children = []
    return [os.getpid(), *map(int, children)]


def _is_below_root(path: Any) -> bool:
    return bool(ROOT) and isinstance(path, str | os.PathLike) and str(Path(path).absolute()).startswith(ROOT + os.sep)


def _refuse(path: Any) -> None:
    """Refuse to move or remove what is in use."""
    if _is_below_root(path) and (held := _held(os.fspath(path))):
        raise PermissionError(13, f"the process uses the file on Windows: {held}", str(path))


_rename, _replace, _unlink = os.rename, os.replace, os.unlink


def _rename_as_on_windows(source: Any, target: Any, **keywords: Any) -> None:
    if _is_below_root(target) and os.path.lexists(target):
        raise FileExistsError(17, "exists already, on Windows", str(source), None, str(target))
    _refuse(source)
    _rename(source, target, **keywords)


def _replace_as_on_windows(source: Any, target: Any, **keywords: Any) -> None:
    if _is_below_root(target) and Path(target).is_dir():
        raise PermissionError(13, "a folder cannot be replaced on Windows", str(target))
    _refuse(source)
    _refuse(target)
    _replace(source, target, **keywords)


def _unlink_as_on_windows(path: Any, **keywords: Any) -> None:
    _refuse(path)
    _unlink(path, **keywords)


def _refuse_link(*_: Any, **__: Any) -> None:
    raise OSError(1, "A required privilege is not held by the client")


def _check_name(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse names that Windows would: an audit hook sees every file and folder that is opened or made."""
    if event not in ("open", "os.mkdir", "os.rename") or not ROOT:
        return
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(ROOT):
        return
    for part in Path(os.fspath(path)[len(ROOT) :]).parts:
        if part != os.sep and (RESERVED.fullmatch(part) or REFUSED.search(part)):
            raise OSError(22, "Windows has no such name", str(path))


# --- everything in force -----------------------------------------------------------------------------------

_OS = _Proxy(os, {}, FUNCTIONS)
_OUR_OS = _Proxy(os, {"name": "nt"}, FUNCTIONS)
_SYS = _Proxy(sys, {"platform": "win32"}, set())
_CTYPES = _Proxy(ctypes, {"WinDLL": _kernel32}, set())

psutil.Process.memory_info = _memory_info_as_on_windows  # type: ignore[method-assign, assignment]
builtins.__import__ = _import_as_on_windows
shutil._use_fd_functions = False  # type: ignore[attr-defined]
os.rename, os.replace = _rename_as_on_windows, _replace_as_on_windows
os.unlink = os.remove = _unlink_as_on_windows
os.symlink = _refuse_link
sys.addaudithook(_check_name)
warnings.filterwarnings("error", category=EncodingWarning, module=rf"({'|'.join(OURS)})\b")
