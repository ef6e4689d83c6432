"""What our checks add to `adb push`: `python -m benchmarks.push adb:SERIAL [MEGABYTES]` prints times and their ratio.

Both are timed in turn, several rounds, of a file that the device has never seen: random bytes, made new each time. Ours
is the whole of it: hashed here, sent, hashed there, kept in the cache and put in its place.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from qat_edge_devices.adb import AdbTransport, open_adb
from qat_edge_devices.transport import Access

ROUNDS = 7
MEGABYTES = 200


def main(device: str, megabytes: int) -> None:
    """Print the medians over the rounds, and the ratio within each."""
    rounds = []
    with contextlib.closing(open_adb(device.partition(":")[2], Access())) as transport:
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as name:
                file = Path(name) / "weights.bin"
                file.write_bytes(os.urandom(megabytes * 10**6))
                plain_s = _timed_plainly(transport, file)
                began = time.perf_counter()
                transport.push({"weights.bin": file})
                rounds.append((plain_s, time.perf_counter() - began))
    plain, ours = (median(times) for times in zip(*rounds, strict=True))
    ratios = sorted(mine / theirs for theirs, mine in rounds)
    speed = megabytes / plain
    print(f"{megabytes} MB, medians of {ROUNDS}: adb push {plain:.2f} s ({speed:.0f} MB/s), ours {ours:.2f} s")
    print(f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), load average {os.getloadavg()[0]:.1f}")


def _timed_plainly(transport: AdbTransport, file: Path) -> float:
    """Seconds that `adb push` alone takes to a place of its own, which the work folder's end removes."""
    began = time.perf_counter()
    transport.send_file(file, file.stat().st_size, f"{transport.folder}/plain.bin")
    return time.perf_counter() - began


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else MEGABYTES)
