"""How fast this machine reads memory: `python -m benchmarks.bandwidth THREADS` prints bytes per second.

Decoding reads every weight once a token, so no engine is faster than this divided by the bytes of its weights. The
buffer is about as large as those, and is read over and over as they are: a cache that would hold them holds it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

THREADS = (2, 1)  # of every measurement
BUFFER_BYTES = 128 * 1024**2
PASSES = 24


def measured(threads: int) -> float:
    """Bytes read per second by `threads` threads, in a process of its own: the fastest of several passes."""
    command = [sys.executable, "-m", "benchmarks.bandwidth", str(threads)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with pinned(threads):
        answer = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return float(answer.stdout)


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Processes started within the block may use the first `threads` of this process's CPUs."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def read_rate(threads: int, buffer_bytes: int = BUFFER_BYTES, passes: int = PASSES) -> float:
    """Bytes per second of the fastest pass of a dot product of the buffer with itself."""
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
