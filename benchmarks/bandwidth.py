"""Memory bandwidth of this machine: `python -m benchmarks.bandwidth THREADS` prints bytes per second.

Decoding reads every weight once per token, so no engine can decode faster than this bandwidth divided by the bytes of
its weights. The buffer is about as large as the weights and is read repeatedly, as they are, so a CPU cache helps both
alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qat_edge_devices.agent.machine import allowed_cpus

THREADS = (2, 1)  # numbers of threads that are measured
BUFFER_BYTES = 128 * 1024**2
PASSES = 24


def measure(threads: int) -> float:
    """Return bytes read per second by `threads` threads of a new process: the fastest of several passes."""
    command = [sys.executable, "-m", "benchmarks.bandwidth", str(threads)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with pinned(threads):
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Restrict processes started within the block to the first `threads` CPUs of this process."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = allowed_cpus()
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def read_rate(threads: int, buffer_bytes: int = BUFFER_BYTES, passes: int = PASSES) -> float:
    """Return bytes per second of the fastest pass: a dot product of a buffer with itself."""
    import torch

    torch.set_num_threads(threads)
    buffer = torch.ones(buffer_bytes // 4)
    torch.dot(buffer, buffer)  # starts the threads

    times = []
    for _ in range(passes):
        began = time.perf_counter()
        torch.dot(buffer, buffer)
        times.append(time.perf_counter() - began)
    return buffer_bytes / min(times)


if __name__ == "__main__":
    print(read_rate(int(sys.argv[1])))
