"""Measure step time and peak memory of a training scheme, in a process of its own.

`python -m benchmarks.cost CONFIG OUT RESULT` trains a few steps and writes {"step_s": ..., "peak_bytes": ...}. The
steps of the LoRA phase and the first step after it are not timed.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Trainer

from qat_edge import config, progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError
from qat_edge.logs import quiet_libraries
from qat_edge.options import FinetuneOptions
from qat_edge.storage import write_text
from qat_edge.train.training_progress import peak_memory_bytes
from qat_edge.verbs.finetune import finetune

PHASE_ONE = 2  # steps of plain LoRA: distillation needs a trained adapter as its teacher
WARM_UP = 1


def measure(options: FinetuneOptions, out: Path) -> dict[str, float]:
    """Train `options` into the run folder `out`.

    Returns:
        step_s: median seconds from the start of a step to the start of the next.
        peak_bytes: peak memory of the GPU, of the process where there is none.
    """
    # The trainer is measured as it is: its step is wrapped, and nothing else changes.
    starts: list[float] = []
    original = Trainer.training_step

    def timed(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the step before may still be running
        starts.append(time.perf_counter())
        return original(trainer, *args, **kwargs)

    Trainer.training_step = timed
    try:
        finetune(options, out, force=out.exists())
    finally:
        Trainer.training_step = original

    # From start to start, so that a step's time includes loading its batch and the optimizer.
    counted = starts[PHASE_ONE + WARM_UP :]
    steps = [later - earlier for earlier, later in pairwise(counted)]
    return {"step_s": median(steps), "peak_bytes": float(peak_bytes())}


def steps_for(timed: int) -> int:
    """Return how many optimizer steps to train so that `timed` of them are timed."""
    return PHASE_ONE + WARM_UP + timed + 1


def peak_bytes() -> int:
    """Return the peak memory of this process, or of the GPU where one is used.

    On Linux it is read from /proc: the resource usage of a new process starts with the peak of its parent.
    """
    status = Path("/proc/self/status")
    if torch.cuda.is_available() or not status.is_file():
        return peak_memory_bytes()
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"))
    return int(found[1]) * 1024 if found else peak_memory_bytes()


def main() -> None:
    """Measure the training that a configuration file describes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=main.__doc__)
    for name in ("config", "out", "result"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    quiet_libraries(verbose=False)
    try:
        options = config.load(FinetuneOptions, "finetune", given.config, {})
        write_text(given.result, json.dumps(measure(options, given.out)))
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
