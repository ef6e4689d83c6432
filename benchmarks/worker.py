"""How a process beside others begins. Nothing here imports a library, which would read and say things before."""

from __future__ import annotations

import os

from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.logs import quiet_libraries


def begin() -> None:
    """Quietly and with one thread, as are the commands that this process starts."""
    quiet_libraries(verbose=False)
    progress.use(ConsoleReporter())
    os.environ["OMP_NUM_THREADS"] = "1"
