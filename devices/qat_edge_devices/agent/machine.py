"""Pin a process to CPUs; read its memory and the machine's clocks, heat and battery."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    from . import windows_memory  # noqa: TID252
else:
    import resource

SYS = Path("/sys")  # where Linux, and so Android, reports clocks, heat and battery
VALID_MILLIDEGREES = range(1, 150_000)  # a sensor that is not connected reports something else, such as -274000


def pin(threads: int, backend: str) -> int:
    """Restrict this process to `threads` of the CPUs it may use. Call it before a library creates threads.

    Runtimes size their thread pools in different ways, and not all of them can be configured; the kernel's limit
    applies to every one.

    Returns:
        The number of CPUs the process got.
    """
    # ExecuTorch has its own pool. The attention operator of its Python wheel also starts OpenMP threads, which spin
    # on the pool's cores between tokens: with one of them instead of two, decoding is 2.3 times as fast after 128
    # tokens on two cores.
    os.environ["OMP_NUM_THREADS"] = "1" if backend == "executorch" else str(threads)
    if not hasattr(os, "sched_setaffinity"):
        return min(threads, os.cpu_count() or 1)
    os.sched_setaffinity(0, sorted(allowed_cpus())[:threads])
    return len(allowed_cpus())


def allowed_cpus() -> set[int]:
    """Return the CPUs that this process may use; none where the system does not restrict processes (macOS, Windows)."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def forget_peak() -> bool:
    """Reset the kernel's record of peak memory to the current value; return False if that is impossible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident_bytes() -> int:
    """Return the memory resident now, or the peak so far where the system does not report it (macOS)."""
    if sys.platform == "win32":
        return windows_memory.resident_bytes()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the peak of resident memory: VmHWM, or the figure of the system's accounts."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return windows_memory.peak_bytes()
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine_state() -> dict[str, Any]:
    """Return clocks of the CPUs that this process may use, heat and battery, as far as the machine reports them.

    The keys are the attributes of `MachineState` in the module that reads the results.
    """
    cpus = [SYS / "devices" / "system" / "cpu" / f"cpu{number}" for number in sorted(allowed_cpus())]

    sensors = read_integers((SYS / "class" / "thermal").glob("thermal_zone*/temp"))
    celsius = [millidegrees / 1e3 for millidegrees in sensors if millidegrees in VALID_MILLIDEGREES]
    slowed = read_integers(cpu / "thermal_throttle" / "core_throttle_count" for cpu in cpus)
    battery = read_integers((SYS / "class" / "power_supply").glob("[bB][aA][tT]*/capacity"))

    return {
        "clocks_khz": read_integers(cpu / "cpufreq" / "scaling_cur_freq" for cpu in cpus),
        "permitted_khz": read_integers(cpu / "cpufreq" / "scaling_max_freq" for cpu in cpus),
        "times_slowed": sum(slowed) if slowed else None,
        "celsius": max(celsius, default=None),
        "battery_percent": battery[0] if battery else None,
    }


def read_integers(paths: Iterable[Path]) -> list[int]:
    """Read files of one integer each; files that are missing or unreadable are skipped."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text(encoding="ascii")))
    return found
