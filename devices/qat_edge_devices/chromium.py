"""Find Chromium, start it headless with a profile of its own, measure its processes, and end them all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qat_edge_devices.device_errors import TransportError, UnsupportedDeviceError
from qat_edge_devices.process_group import kill_group
from qat_edge_devices.transport import parse_kilobytes

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
# Without its sandbox, which root and most containers cannot have: the page and its runtime are ours, and the Python
# agent has none either.
FLAGS = (
    "--headless", "--no-sandbox", "--no-first-run", "--disable-dev-shm-usage", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-breakpad",
    "--disable-background-timer-throttling", "--disable-renderer-backgrounding", "--enable-logging=stderr",
    "--remote-debugging-pipe",
)  # fmt: skip
# Chromium ends by itself when the pipe on its descriptors 3 and 4 closes, as it does when this process is killed.
HOLDING = 'exec "$@" 3<&0 4>/dev/null 0</dev/null'
PROC = Path("/proc")
ENDS_S = 10.0
VERSION_S = 60.0


def find_chromium(device: str, path: str) -> str:
    """Return the path of Chromium: `path` if it is not empty, else the first of `PROGRAMS` in PATH.

    Raises:
        TransportError: there is none.
    """
    if path:
        found = shutil.which(path)
        if found is None:
            raise TransportError(f"{device}: {path} is not a program. Give the path of Chromium, or put it into PATH.")
        return found
    for name in PROGRAMS:
        if found := shutil.which(name):
            return found
    raise TransportError(
        f"{device}: no Chromium in PATH (looked for {', '.join(PROGRAMS)}). Install it (Debian: `apt-get install "
        f"chromium`), or give its path: `--device {device}:/path/to/chromium`."
    )


def read_version(device: str, program: str) -> str:
    """Return what `program --version` prints, such as "Chromium 156.0.8078.108".

    Raises:
        TransportError: it cannot be started, or is no Chromium.
    """
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=VERSION_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TransportError(f"{device}: `{program} --version` failed ({error}). Check that it is Chromium.") from error
    text = done.stdout.decode(errors="replace").strip()
    if done.returncode != 0 or not any(name in text for name in ("Chrom", "Edge")):
        raise TransportError(f"{device}: `{program} --version` printed {text[:100]!r}. Give the path of Chromium.")
    return text.partition(" built on")[0]


@contextmanager
def started(
    device: str, program: str, url: str, folder: Path, flags: Sequence[str], stderr: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Open `url` in a new Chromium; end it, with all its processes, when the block is left.

    Args:
        device: name of the device, for messages.
        program: path of Chromium.
        url: the page.
        folder: an empty folder, for its profile and everything else that it writes.
        flags: added to `FLAGS`.
        stderr: file for its messages, those of the page among them.
    """
    argv = [program, *FLAGS, *flags, f"--user-data-dir={folder}", url]
    names = ("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    environment = os.environ | dict.fromkeys(names, str(folder))
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", HOLDING, "sh", *argv], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr,
            env=environment, cwd=folder,
            # Its own session: Ctrl-C reaches only this process, and all of Chromium's can be found and ended.
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise TransportError(f"{device}: {program} cannot be started ({error.strerror}).") from error
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill Chromium with its children, and wait until they are gone."""
    others = [each.pid for each in processes_of(process.pid)]
    kill_group(process.pid)
    if sys.platform != "win32":  # `require_proc` refuses it
        for pid in others:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    process.wait(ENDS_S)


@dataclass(frozen=True)
class BrowserProcess:
    """One process of Chromium.

    Attributes:
        pid: its number.
        type: "renderer", "gpu-process" and others; empty for the browser itself.
        cpu_s: CPU time so far, in seconds.
        resident_bytes: memory resident now.
        peak_bytes: peak of it.
    """

    pid: int
    type: str
    cpu_s: float
    resident_bytes: int
    peak_bytes: int


def require_proc(device: str) -> None:
    """Require /proc, where the memory and the CPU time of a browser are read.

    Raises:
        UnsupportedDeviceError: the system has none.
    """
    if not (PROC / "self" / "status").is_file():
        raise UnsupportedDeviceError(
            f"{device}: this system has no /proc, where the memory and the CPU time of a browser are read. Measure on "
            "Linux."
        )


def processes_of(session: int) -> list[BrowserProcess]:
    """Return the processes of a session: Chromium and its children, as long as they live."""
    found = []
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            # A process may end while it is being read.
            with suppress(OSError, ValueError, IndexError):
                process = _read_process(folder, session)
                if process is not None:
                    found.append(process)
    return found


def _read_process(folder: Path, session: int) -> BrowserProcess | None:
    # The name of the program, in brackets, may hold spaces: the other fields begin after it.
    fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if sys.platform == "win32" or int(fields[3]) != session:
        return None
    arguments = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    status = (folder / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    sizes = dict(line.split(":", 1) for line in status if line.startswith(("VmRSS:", "VmHWM:")))
    return BrowserProcess(
        pid=int(folder.name),
        type=next((each.partition("=")[2] for each in arguments if each.startswith("--type=")), ""),
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        resident_bytes=parse_kilobytes(sizes.get("VmRSS", "")) or 0,
        peak_bytes=parse_kilobytes(sizes.get("VmHWM", "")) or 0,
    )


def forget_peaks(processes: Sequence[BrowserProcess]) -> bool:
    """Reset the kernel's record of peak memory of each process; return False if that is impossible."""
    try:
        for process in processes:
            (PROC / str(process.pid) / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
