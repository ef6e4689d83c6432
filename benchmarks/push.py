"""Cost of our checks on top of `adb push`: `python -m benchmarks.push adb:SERIAL` prints times and their ratio.

Each round times both with a file of fresh random bytes, which the device cannot have cached. Our time covers all steps:
hash the file here, send it, hash it on the device, store it in the cache and place it in the work folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from qat_edge_devices.adb import AdbTransport, open_adb
from qat_edge_devices.device_errors import DeviceLayerError
from qat_edge_devices.transport import Access


class Round(NamedTuple):
    """Seconds of both pushes in one round."""

    plain_s: float
    ours_s: float


def main() -> None:
    """Time our push of a file and plain `adb push`, and print the medians and the ratio within each round."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.push", description=main.__doc__)
    parser.add_argument("device", help="adb:SERIAL, adb:HOST:PORT, or adb for the only device")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the file, 200 by default")
    parser.add_argument("--rounds", type=int, default=7, help="rounds with one push of each kind, 7 by default")
    given = parser.parse_args()
    transport, _, serial = given.device.partition(":")
    if transport != "adb":
        parser.error(f"{given.device}: the comparison is with plain `adb push`, so give adb:SERIAL")
    try:
        rounds = time_rounds(serial, given.megabytes, given.rounds)
    except DeviceLayerError as error:
        raise SystemExit(f"Error: {error}") from error
    plain, ours = (median(times) for times in zip(*rounds, strict=True))
    ratios = sorted(mine / theirs for theirs, mine in rounds)
    title = f"{given.megabytes} MB, medians of {given.rounds}"
    print(f"{title}: adb push {plain:.2f} s ({given.megabytes / plain:.0f} MB/s), ours {ours:.2f} s")
    load = psutil.getloadavg()[0]
    print(f"ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), load average {load:.1f}")


def time_rounds(serial: str, megabytes: int, count: int) -> list[Round]:
    """Time pushing a new file of random bytes in each of `count` rounds.

    Args:
        serial: of the device, empty for the only one.
        megabytes: size of the file.
        count: rounds.

    Raises:
        DeviceLayerError: the device cannot be reached, or has no space.
    """
    rounds = []
    with contextlib.closing(open_adb(serial, Access())) as transport:
        for _ in range(count):
            with tempfile.TemporaryDirectory() as name:
                # Random bytes, new in each round: neither the device's cache nor compression can help.
                file = Path(name) / "weights.bin"
                file.write_bytes(os.urandom(megabytes * 10**6))
                plain_s = _plain_push_s(transport, file)
                began = time.perf_counter()
                transport.push({"weights.bin": file})
                rounds.append(Round(plain_s, time.perf_counter() - began))
    return rounds


def _plain_push_s(transport: AdbTransport, file: Path) -> float:
    """Seconds of plain `adb push` into the work folder, which is deleted when the transport is closed."""
    began = time.perf_counter()
    transport.send_file(file, file.stat().st_size, f"{transport.folder}/plain.bin")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
