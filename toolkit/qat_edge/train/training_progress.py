"""Progress bar of a training, and its curve of losses."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qat_edge.peak_memory import own_peak_bytes
from qat_edge.progress import Bar
from qat_edge.train.trainer import TwoPhases


class ShowProgress(TrainerCallback):
    """Update the progress bar at every step with phase, loss, tokens per second and memory.

    Attributes:
        bar: The progress bar.
        phases: Tells the phase.
        phase_1_name: Name of phase 1 in the bar.
    """

    def __init__(self, bar: Bar, phases: TwoPhases, phase_1_name: str) -> None:
        self.bar, self.phases, self.phase_1_name = bar, phases, phase_1_name
        self.began, self.began_tokens, self.eval_note = 0.0, 0, ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock. A resumed run begins at its step."""
        self.began, self.began_tokens = time.monotonic(), state.num_input_tokens_seen
        self.bar.start_at(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Update the bar after a training step; keep the loss of an evaluation for the next ones."""
        if logs and "eval_loss" in logs:
            self.eval_note = f", eval {logs['eval_loss']:.3f}"
        if not logs or "loss" not in logs:
            return

        phase = "QAT" if self.phases.switch.enabled else self.phase_1_name
        # The mean since the start of this process, not since the start of the run.
        speed = (state.num_input_tokens_seen - self.began_tokens) / (time.monotonic() - self.began)
        memory = f"{peak_memory_bytes() / 1e9:.1f} GB"
        note = f"{phase} loss {logs['loss']:.3f}{self.eval_note}  {speed:.0f} tok/s  {memory}"
        self.bar.update(state.global_step, note)


def peak_memory_bytes() -> int:
    """Return the peak memory so far: of the GPU if one is in use, of this process otherwise."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    return own_peak_bytes()


def curve(history: list[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """Turn the trainer's log into rows of step, phase, loss or eval_loss, and learning rate.

    Args:
        history: `TrainerState.log_history`.
        start: Last step of phase 1.
    """
    keep = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
    # The log also has rows of totals at the end of training, which have no loss of a step.
    rows = [{k: row[k] for k in keep if k in row} for row in history if "loss" in row or "eval_loss" in row]
    for row in rows:
        row["phase"] = "lora" if row["step"] <= start else "qat"
        # JSON has no NaN.
        row |= {k: None for k in ("loss", "eval_loss", "grad_norm") if not math.isfinite(row.get(k, 0.0))}
    return rows
