"""Processes of one training, as a launcher (torchrun, accelerate launch) describes them in the environment.

Every process runs the same command. The one of rank 0 prints, and writes the run folder; an error is printed by one
process, the first that fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

COUNT, RANK = "WORLD_SIZE", "RANK"
# Before the processes are connected, they fail for the same reason at about the same time. The others leave the message
# to rank 0, whose end makes the launcher end them; one that fails alone is still there after this time.
PATIENCE_S = 8.0

_claim: Callable[[], bool] | None = None


def count() -> int:
    """Return the number of processes; 1 without a launcher."""
    return max(_number(COUNT, 1), 1)


def rank() -> int:
    """Return the rank of this process."""
    return _number(RANK, 0) if count() > 1 else 0


def is_first() -> bool:
    """Return whether this process prints and writes."""
    return rank() == 0


def decide_reports_by(claim: Callable[[], bool]) -> None:
    """Decide by `claim`, which is True in the first process that calls it, once the processes are connected."""
    global _claim
    _claim = claim


def may_report() -> bool:
    """Return whether this process is the one that prints the error it ends with."""
    if count() == 1:
        return True
    if _claim is not None:
        return _claim()
    if not is_first():
        time.sleep(PATIENCE_S)
    return True


def _number(name: str, default: int) -> int:
    """Return the number in a variable; `environment` refuses anything else."""
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
