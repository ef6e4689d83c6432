"""First steps of a worker process. Nothing here imports torch, which reads the environment when it is imported."""

from __future__ import annotations

import os

from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.logs import quiet_libraries


def initialize() -> None:
    """Silence the libraries, and give this process and the commands it starts one thread each."""
    quiet_libraries(verbose=False)
    progress.use(ConsoleReporter())
    os.environ["OMP_NUM_THREADS"] = "1"
