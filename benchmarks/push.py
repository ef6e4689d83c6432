"""What our checks add to `adb push`: `python -m benchmarks.push adb:SERIAL` prints times and their ratio.

Both are timed in turn, several rounds, of a file that the device has never seen: random bytes, made new each time. Ours
is the whole of it: hashed here, sent, hashed there, kept in the cache and put in its place.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from qat_edge_devices.adb import AdbTransport, open_adb
from qat_edge_devices.device_errors import DeviceError
from qat_edge_devices.transport import Access


def main() -> None:
    """Time our push of a file beside plain `adb push`, and print the medians and the ratio within each round."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.push", description=main.__doc__)
    parser.add_argument("device", help="adb:SERIAL, adb:HOST:PORT, or adb for the only one")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the file, 200 by default")
    parser.add_argument("--rounds", type=int, default=7, help="of one each, 7 by default")
    given = parser.parse_args()
    way, _, serial = given.device.partition(":")
    if way != "adb":
        parser.error(f"{given.device}: plain `adb push` is what is compared with, so give adb:SERIAL")
    try:
        rounds = timed(serial, given.megabytes, given.rounds)
    except DeviceError as error:
        raise SystemExit(f"Error: {error}") from error
    plain, ours = (median(times) for times in zip(*rounds, strict=True))
    ratios = sorted(mine / theirs for theirs, mine in rounds)
    words = f"{given.megabytes} MB, medians of {given.rounds}"
    print(f"{words}: adb push {plain:.2f} s ({given.megabytes / plain:.0f} MB/s), ours {ours:.2f} s")
    print(f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), load average {os.getloadavg()[0]:.1f}")


def timed(serial: str, megabytes: int, count: int) -> list[tuple[float, float]]:
    """Seconds of each round, plain and ours; serial: empty for the only device.

    Raises:
        DeviceError: the device cannot be reached, or has no space.
    """
    rounds = []
    with contextlib.closing(open_adb(serial, Access())) as transport:
        for _ in range(count):
            with tempfile.TemporaryDirectory() as name:
                file = Path(name) / "weights.bin"
                file.write_bytes(os.urandom(megabytes * 10**6))
                plain_s = _timed_plainly(transport, file)
                began = time.perf_counter()
                transport.push({"weights.bin": file})
                rounds.append((plain_s, time.perf_counter() - began))
    return rounds


def _timed_plainly(transport: AdbTransport, file: Path) -> float:
    """Seconds that `adb push` alone takes to a place of its own, which the work folder's end removes."""
    began = time.perf_counter()
    transport.send_file(file, file.stat().st_size, f"{transport.folder}/plain.bin")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
