"""RUN/training.json: result and loss curve of a training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.storage import write_text
from qat_edge.train.training_progress import curve, peak_memory_bytes

TRAINING_LOG = "training.json"


@dataclass(frozen=True)
class Finetuned:
    """Result of a fine-tune.

    Attributes:
        run: the run folder.
        steps: optimizer steps of both phases.
        qat_start_step: last step of phase 1.
        loss: of the last step, nats per token, or as the trainer of `prepare` logs it; None without steps.
        wall_s: time of this process.
        peak_memory_bytes: of this process, or of the GPU.
    """

    run: Path
    steps: int
    qat_start_step: int
    loss: float | None
    wall_s: float
    peak_memory_bytes: int


def write_log(
    run: Path, steps: int, start: int, wall_s: float, history: Sequence[dict[str, Any]], entries: Mapping[str, Any]
) -> Finetuned:
    """Write RUN/training.json and return the result.

    Args:
        run: The run folder.
        steps: Optimizer steps of both phases.
        start: Last step of phase 1.
        wall_s: Time of this process.
        history: `TrainerState.log_history`.
        entries: Further entries of the file.
    """
    rows = curve(list(history), start)
    result = Finetuned(
        run=run,
        steps=steps,
        qat_start_step=start,
        loss=next((row["loss"] for row in reversed(rows) if row.get("loss") is not None), None),
        wall_s=wall_s,
        peak_memory_bytes=peak_memory_bytes(),
    )
    log = {**dataclasses.asdict(result), **entries, "curve": rows}
    write_text(run / TRAINING_LOG, json.dumps(log, indent=1, default=str))
    return result
