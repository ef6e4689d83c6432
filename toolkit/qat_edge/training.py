"""What qat-edge adds to the Hugging Face trainer: the two phases, the bar, and the loss curve it leaves."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qat_edge.console import Bar
from qat_edge.quant.fake import Switch


class TwoPhases(TrainerCallback):
    """Plain LoRA up to `start`, then fake quantization; `snapshot` keeps the adapters as they are at the border.

    Works across a resume: which phase it is depends on the step alone.
    """

    def __init__(self, switch: Switch, start: int, snapshot: Callable[[], None]) -> None:
        self.switch, self.start, self.snapshot = switch, start, snapshot

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.switch.enabled = state.global_step >= self.start
        if self.start == 0 and state.global_step == 0:
            self.snapshot()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in (self.start, state.max_steps) and args.eval_strategy != "no":
            control.should_evaluate = True
        if state.global_step == self.start:
            self.snapshot()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here and not at the border's end: the evaluation between belongs to the phase that it ends.
        self.switch.enabled = state.global_step >= self.start


class ShowProgress(TrainerCallback):
    """Feeds the bar: phase, loss, tokens per second, memory."""

    def __init__(self, bar: Bar, phases: TwoPhases) -> None:
        self.bar, self.phases = bar, phases
        self.began, self.began_tokens, self.evaluating = 0.0, 0, ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began, self.began_tokens = time.monotonic(), state.num_input_tokens_seen
        self.bar.start_at(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs and "eval_loss" in logs:
            self.evaluating = f", eval {logs['eval_loss']:.3f}"
        if not logs or "loss" not in logs:
            return
        phase = "QAT" if self.phases.switch.enabled else "LoRA"
        speed = (state.num_input_tokens_seen - self.began_tokens) / (time.monotonic() - self.began)
        note = f"{phase} loss {logs['loss']:.3f}{self.evaluating}  {speed:.0f} tok/s  {_in_gb(peak_memory_bytes())}"
        self.bar.update(state.global_step, note)


def peak_memory_bytes() -> int:
    """Highest memory so far: of the GPU where one is in use, of this process otherwise."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    return peak_rss_bytes(resource.getrusage(resource.RUSAGE_SELF))


def peak_rss_bytes(usage: resource.struct_rusage) -> int:
    """Peak resident memory of what `usage` accounts for."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB


def curve(history: list[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """The trainer's log as rows of step, phase, loss or eval_loss, learning rate."""
    keep = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")
    rows = [{k: row[k] for k in keep if k in row} for row in history if "loss" in row or "eval_loss" in row]
    for row in rows:
        row["phase"] = "lora" if row["step"] <= start else "qat"
    return rows


def _in_gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
