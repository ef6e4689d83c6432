"""What the machine gives a process and says of itself: CPUs, memory, clocks, heat and battery."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SYS = Path("/sys")  # what Linux, and so Android, says of clocks, heat and battery


def pin(threads: int, backend: str) -> int:
    """Keep this process on `threads` of the CPUs it may use, before any library makes threads; how many it got.

    Runtimes size their pools in ways of their own, and not all can be told; the kernel can.
    """
    # ExecuTorch has a pool of its own. Its attention in the Python wheel opens OpenMP threads beside it, which spin on
    # the pool's cores between tokens: one instead of two decodes 2.3 times as fast after 128 tokens on two cores.
    os.environ["OMP_NUM_THREADS"] = "1" if backend == "executorch" else str(threads)
    if not hasattr(os, "sched_setaffinity"):
        return min(threads, os.cpu_count() or 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    return len(os.sched_getaffinity(0))


def forget_peak() -> bool:
    """Set the kernel's record of peak memory back to what is resident now; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident_bytes() -> int:
    """Memory resident now; the peak so far where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Most memory that was resident at once: VmHWM, or what getrusage says (kilobytes, bytes on macOS)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def condition() -> dict[str, Any]:
    """Clocks of the CPUs that this process may use, heat and battery, as far as the machine says; see `Condition`."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cpus = [SYS / "devices" / "system" / "cpu" / f"cpu{number}" for number in sorted(allowed)]
    heats = [n / 1e3 for n in numbers((SYS / "class" / "thermal").glob("thermal_zone*/temp")) if 0 < n < 150_000]
    slowed = numbers(cpu / "thermal_throttle" / "core_throttle_count" for cpu in cpus)
    return {
        "clocks_khz": numbers(cpu / "cpufreq" / "scaling_cur_freq" for cpu in cpus),
        "permitted_khz": numbers(cpu / "cpufreq" / "scaling_max_freq" for cpu in cpus),
        "times_slowed": sum(slowed) if slowed else None,
        "celsius": max(heats, default=None),
        "battery_percent": next(iter(numbers((SYS / "class" / "power_supply").glob("[bB][aA][tT]*/capacity"))), None),
    }


def numbers(paths: Iterable[Path]) -> list[int]:
    """What stands in files of one number each; those that are not there, or may not be read, are left out."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text(encoding="ascii")))
    return found
