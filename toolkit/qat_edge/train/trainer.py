"""What qat-edge adds to the Hugging Face trainer: two phases, their learning rates, a teacher, the bar, the curve."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qat_edge.config import FinetuneOptions
from qat_edge.progress import Bar
from qat_edge.quant.fake import SCALE_FACTOR, Switch
from qat_edge.quant.ptq import methods
from qat_edge.train.distill import Batch, Teacher
from qat_edge.train.objectives import Objective

# Of the peak learning rate, in phase 2. Perplexity of SmolLM2 on held-out text after 48 + 12 steps, 15.86 where phase 2
# began: 15.71 with 0.3 and a schedule of its own, 15.73 with 0.6, 15.84 at the end of one schedule over both.
QAT_RATIO = 0.3
# Where weights make up for each other's rounding already, less is to be learned than lost: nats above FP32's loss after
# 32 + 4 steps, mean of three runs of two tasks: 0.0118 where phase 2 began, 0.0125 with 0.3, 0.0114 with 0.1.
COMPENSATED_RATIO = 0.1


class Border(Protocol):
    """What is done once between plain LoRA and fake quantization."""

    def cross(self) -> None:
        """Leave phase 1 for phase 2."""

    def restore(self) -> None:
        """Bring a resumed training to where `cross` left it."""


class TwoPhases(TrainerCallback):
    """Plain LoRA up to `start`, then fake quantization; the border between is crossed once.

    Works across a resume: which phase it is depends on the step alone.
    """

    def __init__(self, switch: Switch, start: int, border: Border) -> None:
        self.switch, self.start, self.border = switch, start, border
        self.crossed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > self.start:
            self.border.restore()
            self.crossed = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in (self.start, state.max_steps) and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here and not at the border's end: the evaluation between belongs to the phase that it ends.
        if state.global_step >= self.start and not self.crossed:
            self.border.cross()
            self.crossed = True
        self.switch.enabled = self.crossed


class QatTrainer(Trainer):
    """The trainer with a learning rate for each phase and for the scales, and with a teacher in phase 2.

    teacher: set when phase 2 begins, where `options` ask for one.
    """

    teacher: Teacher | None = None
    objective: Objective | None = None

    def learn(self, objective: Objective | None) -> None:
        """What an encoder is to get right, in place of the next token, where it is set."""
        self.objective = objective
        # The trainer then counts the rows that a step is made of, and leaves the division to the objective.
        if objective is not None:
            self.model_accepts_loss_kwargs = True

    def learn_from(self, teacher: Teacher) -> None:
        """Add the teacher's divergence to the loss from now on."""
        self.teacher = teacher

    def forget_averages(self) -> None:
        """Let the optimizer begin anew: what it has averaged belongs to weights that no longer mean the same."""
        assert self.optimizer is not None  # `configure` made it
        self.optimizer.state.clear()

    def configure(self, options: FinetuneOptions, start: int) -> None:
        """Make optimizer and schedule; phase 2 begins at step `start`."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        weights = [p for n, p in named if SCALE_FACTOR not in n]
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": options.learning_rate, "weight_decay": options.weight_decay}
        ]
        factors = [learning_rate_factor(options, start)]
        scales = [p for n, p in named if SCALE_FACTOR in n]
        if scales:
            groups.append({"params": scales, "lr": options.scale_learning_rate, "weight_decay": 0.0})
            factors.append(learning_rate_factor(options, start, of_scales=True))
        self.optimizer = torch.optim.AdamW(groups)
        self.lr_scheduler = LambdaLR(self.optimizer, factors)
        self.distill_weight = options.distill_weight
        self.distill_temperature = options.distill_temperature

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The task's loss, and in phase 2 what a teacher adds to it."""
        if self.objective is not None:
            rows = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
            loss = self.objective(model, inputs) / rows
            return (loss, {}) if return_outputs else loss
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch: Batch = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        tokens = (batch["labels"][:, 1:] >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        divergence = self.teacher.divergence(batch, outputs.logits) / tokens
        loss = (1 - self.distill_weight) * loss + self.distill_weight * self.distill_temperature**2 * divergence
        return (loss, outputs) if return_outputs else loss


def learning_rate_factor(options: FinetuneOptions, start: int, of_scales: bool = False) -> Callable[[int], float]:
    """What a step's learning rate is of its group's peak. `start`: first step of phase 2."""
    ratio = 1.0 if of_scales or options.learning_rate == 0 else qat_learning_rate(options) / options.learning_rate

    def factor(step: int) -> float:
        if step < start:  # as if there were no second phase: a schedule cut short would learn less
            return scheduled(step, options.steps, options)
        begun = start if options.lr_restart else 0
        return scheduled(step - begun, options.steps - begun, options) * ratio

    return factor


def qat_learning_rate(options: FinetuneOptions) -> float:
    """Peak learning rate of phase 2: as given, or what goes with the start and the schedule."""
    if options.qat_learning_rate is not None:
        return options.qat_learning_rate
    compensated = options.ptq_init in methods.COMPENSATED
    return options.learning_rate * ((COMPENSATED_RATIO if compensated else QAT_RATIO) if options.lr_restart else 1.0)


def scheduled(step: int, steps: int, options: FinetuneOptions) -> float:
    """Share of the peak learning rate at `step` of `steps`: linear warm-up, then the schedule, 0 at the end."""
    warmup = min(options.warmup_steps, steps // 5)  # a short phase has no time for more
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if options.lr_schedule == "constant":
        return 1.0
    return 1 - done if options.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


class ShowProgress(TrainerCallback):
    """Feeds the bar: phase, loss, tokens per second, memory. plainly: what the first phase is called."""

    def __init__(self, bar: Bar, phases: TwoPhases, plainly: str) -> None:
        self.bar, self.phases, self.plainly = bar, phases, plainly
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
        phase = "QAT" if self.phases.switch.enabled else self.plainly
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
