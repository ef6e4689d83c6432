"""Hugging Face `Trainer` with two phases (LoRA, then QAT), a learning rate for each, and optional distillation.

QatTrainer     optimizer, schedules, and the loss: the task's own, and in phase 2 the teacher's divergence; stops
               where a loss or a gradient is not finite, unless `qat_guard` goes back to the start of phase 2;
               checkpoints that appear whole or not at all
TwoPhases      callback that makes the phase transition at its step and turns fake quantization on
StopInOrder    callback that ends the training with a checkpoint after a signal
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qat_edge import progress, run_lock
from qat_edge.data.streamed_rows import POSITION_FILE, StreamedRows, StreamPosition
from qat_edge.data.token_table import IGNORED
from qat_edge.errors import ModelError
from qat_edge.options import FinetuneOptions
from qat_edge.quant import fake
from qat_edge.quant.fake import SCALE_FACTOR, Switch
from qat_edge.quant.ptq.method_names import COMPENSATED
from qat_edge.stop_signals import StopRequest
from qat_edge.storage import write_text
from qat_edge.train import checkpoints, distributed, divergence, next_token_loss
from qat_edge.train.distill import Batch, Teacher
from qat_edge.train.next_token_loss import predict_targets
from qat_edge.train.objectives import Objective
from qat_edge.train.optimizers import make_optimizer, set_learning_rate

# Peak learning rate of phase 2 as a share of phase 1's. Perplexity of SmolLM2 on held-out text after 48 + 12 steps,
# 15.86 where phase 2 began: 15.71 with 0.3 and a schedule of its own, 15.73 with 0.6, 15.84 at the end of one schedule
# over both.
QAT_RATIO = 0.3
# The same after an initialization in which weights already compensate for each other's rounding, where a large step
# would lose more than it gains: nats above FP32's loss after 32 + 4 steps, mean of three runs of two tasks: 0.0118
# where phase 2 began, 0.0125 with 0.3, 0.0114 with 0.1.
COMPENSATED_RATIO = 0.1
# Both learning rates of a phase 2 that is started again after it diverged, as a share of those it diverged with.
RESTART_RATIO = 0.25


class Transition(Protocol):
    """The part of `phases.PhaseTransition` that the trainer calls."""

    def start_qat(self) -> None:
        """Make the transition from phase 1 to phase 2."""

    def restore(self) -> None:
        """Bring a resumed run to where `start_qat` left it."""


class TwoPhases(TrainerCallback):
    """Train without rounding up to a step, make the phase transition once, then train with fake quantization.

    On resume, the global step determines the phase.

    Attributes:
        switch: Turns fake quantization on and off.
        start: Last step of phase 1.
        transition: Called once.
        at_once: Context in which a signal ends the transition at once: it may take longer than the training.
        whole_base: Context in which all base weights are whole.
        qat_started: Whether training is in phase 2.
    """

    def __init__(
        self,
        switch: Switch,
        start: int,
        transition: Transition,
        at_once: Callable[[], AbstractContextManager[None]] = nullcontext,
        whole_base: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.switch, self.start, self.transition = switch, start, transition
        self.at_once, self.whole_base = at_once, whole_base
        self.qat_started = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the results of the transition for a run that is resumed in phase 2."""
        if state.global_step > self.start:
            with self.whole_base():
                self.transition.restore()
            self.qat_started = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request an evaluation at the end of each phase, and a checkpoint before the transition."""
        if state.global_step in (self.start, state.max_steps) and args.eval_strategy != "no":
            control.should_evaluate = True
        if state.global_step == self.start:
            control.should_save = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the transition before the first step of phase 2.

        Not at the end of the step before it: the evaluation and the checkpoint in between belong to phase 1.
        """
        if state.global_step >= self.start and not self.qat_started:
            with self.at_once(), self.whole_base():
                self.transition.start_qat()
            self.qat_started = True
        self.switch.enabled = self.qat_started


class StopInOrder(TrainerCallback):
    """End the training after the step in progress, with a checkpoint, once a signal has come.

    Attributes:
        request: Notes the signal.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the step."""
        self._stop(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after an evaluation: the signal came while it ran."""
        self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        # A signal may reach processes at different steps; all of them end after the same one.
        signum = distributed.largest(self.request.signum or 0)
        if signum:
            self.request.signum = signum
            control.should_save = control.should_training_stop = True


class QatTrainer(Trainer):
    """Trainer with a learning rate for each phase and for the scales, and with a teacher in phase 2.

    Attributes:
        teacher: Set at the start of phase 2 if distillation is requested.
        objective: Loss of an encoder; None for next-token prediction.
        at_targets: The loss is `next_token_loss`; False for an encoder, and for a model with another loss.
        start: Last step of phase 1.
        phase_1: Name of phase 1.
        restarted_at: Step at which phase 2 was started again; None where it was not.
        absorb: Called with the description of a step of phase 2 that is not finite; returns True if training goes on
            without that step. None stops at every such step.
    """

    teacher: Teacher | None = None
    objective: Objective | None = None
    at_targets: bool = False
    start: int = 0
    phase_1: str = "LoRA"
    restarted_at: int | None = None
    absorb: Callable[[str], bool] | None = None
    # With --clip-gradients apart: parameters that are clipped by one norm, and factors of the scales' gradients.
    _clipped_apart: Sequence[Sequence[nn.Parameter]] = ()
    _scale_shares: Sequence[tuple[nn.Parameter, float]] = ()
    _save_into: Path | None = None  # while a checkpoint is written

    @property
    def stream(self) -> StreamedRows | None:
        """The training rows, if they are streamed."""
        return self.train_dataset if isinstance(self.train_dataset, StreamedRows) else None

    @property
    def step_sequences(self) -> int:
        """Number of rows, or packed sequences, of an optimizer step."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of the training."""
        if self.stream is None:
            return super().get_train_dataloader()
        # The Trainer's own loader reads one batch ahead, and draws from the random numbers that dropout needs: a
        # resumed training would have others.
        generator = torch.Generator().manual_seed(self.args.seed)
        return DataLoader(
            self.stream, self.args.per_device_train_batch_size, collate_fn=self.data_collator, generator=generator
        )

    def resume_stream(self, checkpoint: Path) -> None:
        """Let a stream begin where the training of a checkpoint has stopped.

        Raises:
            RunError: The checkpoint does not say where.
        """
        if self.stream is not None:
            position = StreamPosition.load(checkpoint / POSITION_FILE)
            self.stream.resume(position, checkpoints.step_of(checkpoint) * self.step_sequences)

    def set_objective(self, objective: Objective | None) -> None:
        """Train on an encoder's objective; on next-token prediction where it is None."""
        self.objective = objective
        # A model that computes its loss in another way keeps it.
        self.at_targets = objective is None and next_token_loss.is_loss_of(self.model)
        if objective is not None or self.at_targets:
            # The trainer then counts the rows or tokens of a step and leaves the division by them to `compute_loss`.
            self.model_accepts_loss_kwargs = True
        else:
            progress.info(f"{type(fake.base_of(self.model)).__name__} computes a loss of its own, at all positions")

    def set_teacher(self, teacher: Teacher) -> None:
        """Add the teacher's divergence to the loss from now on.

        Raises:
            ModelError: The model computes a loss of its own, which is no mean over the tokens that the teacher sees.
        """
        if not self.at_targets:
            raise ModelError(
                f"--distill-weight: {type(fake.base_of(self.model)).__name__} computes a loss of its own, which a "
                "divergence cannot be added to. Leave the flag out."
            )
        self.teacher = teacher

    def whole_base(self) -> AbstractContextManager[None]:
        """Return a context in which all base weights are whole; see `ShardedBase`."""
        return nullcontext()

    def gather_base(self) -> None:
        """Make all base weights whole, once the steps are done."""

    def reset_optimizer(self) -> None:
        """Drop the optimizer's averages of gradients, which are of no use once weights change their meaning."""
        assert self.optimizer is not None  # `configure_optimizer` made it
        self.optimizer.state.clear()

    def configure_optimizer(self, options: FinetuneOptions, start: int) -> None:
        """Make the optimizer and the learning-rate schedule. start: the last step of phase 1."""
        self.start = start
        self.phase_1 = "LoRA" if options.method == "lora" else "full fine-tuning"

        # Group 1: adapters, or all weights.
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        weights = [p for name, p in trained if SCALE_FACTOR not in name]
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": options.learning_rate, "weight_decay": options.weight_decay}
        ]

        def restarted() -> int | None:
            return self.restarted_at  # known only once phase 2 has diverged

        factors = [learning_rate_factor(options, start, restarted=restarted)]

        # Group 2: learned scales. They are factors of the initial scales, so they have a rate of their own and do not
        # decay towards 0.
        scales = [p for name, p in trained if SCALE_FACTOR in name]
        if scales:
            groups.append({"params": scales, "lr": options.scale_learning_rate, "weight_decay": 0.0})
            factors.append(learning_rate_factor(options, start, of_scales=True, restarted=restarted))

        if options.clip_gradients == "apart":
            self._clipped_apart = [list(group["params"]) for group in groups]
            self._scale_shares = fake.scale_gradient_shares(self.model)

        self.optimizer = make_optimizer(groups, options.optimizer, self.args.device.type)
        self.lr_scheduler = LambdaLR(self.optimizer, factors)
        self.distill_weight = options.distill_weight
        self.distill_temperature = options.distill_temperature

    def restart_phase_2(self) -> None:
        """Start the optimizer and the schedule of phase 2 again at this step, at lower learning rates."""
        self.restarted_at = self.state.global_step
        self.reset_optimizer()
        # The schedule has set the rates of the next step already.
        assert self.optimizer is not None and isinstance(self.lr_scheduler, LambdaLR)
        rates = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        current = [peak * factor(self.restarted_at) for peak, factor in rates]
        for group, rate in zip(self.optimizer.param_groups, current, strict=True):
            set_learning_rate(group, rate)
        self.lr_scheduler._last_lr = current

    def mean_loss(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """Return the task's loss on rows: its mean over tokens with loss, or over the rows of an encoder.

        Training goes on after it as if it had not been called.
        """
        batches = self.batch_losses(rows)
        count = sum(weight for _, weight in batches)
        return sum(loss for loss, _ in batches) / count if count else math.nan

    def batch_losses(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
        """Return the loss of each batch of rows, summed, with the number of its tokens with loss, or of its rows."""
        assert self.model is not None and self.data_collator is not None
        losses, training = [], self.model.training
        self.model.eval()
        # Random numbers are put back as they were: dropout and shuffling depend on them.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.compute_loss_context_manager():
            for begin in range(0, len(rows), self.args.per_device_eval_batch_size):
                chosen = rows[begin : begin + self.args.per_device_eval_batch_size]
                inputs = self._prepare_inputs(self.data_collator(list(chosen)))
                # The prediction at position i is for token i + 1.
                labels = inputs["labels"] if self.objective is not None else inputs["labels"][:, 1:]
                weight = int((labels != IGNORED).sum())
                # Rows without an answer have no loss, but other processes may wait for this one.
                loss = float(self.compute_loss(self.model, inputs))
                losses.append((loss * weight if weight else 0.0, weight))
        self.model.train(training)
        return losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the task's loss, and with a teacher its weighted sum with the divergence from the teacher."""
        # Encoders: the objective is a sum over rows.
        if self.objective is not None:
            rows = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
            loss = self.objective(model, inputs) / rows
            return (loss, {}) if return_outputs else loss

        batch: Batch = dict(inputs)  # a copy: super() may change its inputs
        if self.at_targets:
            predictions = predict_targets(model, batch)
            tokens = len(predictions.targets) if num_items_in_batch is None else num_items_in_batch
            loss = next_token_loss.next_token_loss(predictions) / tokens
        else:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

        # Evaluation reports cross entropy alone, so that both phases have comparable curves.
        if self.teacher is not None and model.training and len(predictions.targets):
            divergence = self.teacher.divergence(batch, predictions.logits) / tokens
            # T^2 because gradients of soft targets scale with 1 / T^2: https://arxiv.org/abs/1503.02531, section 2.
            loss = (1 - self.distill_weight) * loss + self.distill_weight * self.distill_temperature**2 * divergence
        return (loss, {}) if return_outputs else loss

    # --- divergence ----------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients after checking them and the loss.

        Raises:
            ModelError: One is not finite, and `absorb` does not go on without the step.
        """
        # The two steps of torch's clip_grad_norm_, which accelerate calls on one device, with the check in between:
        # clipping by a norm that is not finite would spread it to all gradients, and hide where it began.
        parameters = list(model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        loss = self.step_loss()
        if not bool(torch.isfinite(norm) & torch.isfinite(loss).to(norm.device)):
            in_qat = self.state.global_step >= self.start
            with self.whole_base():
                found = divergence.describe_step(
                    self.model,
                    loss=loss.item(),
                    norm=norm.item(),
                    step=self.state.global_step + 1,
                    phase="QAT" if in_qat else self.phase_1,
                    learning_rate=self._get_learning_rate(),
                )
            if not in_qat or self.absorb is None or not self.absorb(found):
                raise divergence.diverged(found, Path(str(self.args.output_dir)))
            model.zero_grad()  # the optimizer skips parameters without a gradient
            return norm
        if self._clipped_apart:
            self._clip_apart()
        else:
            clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def step_loss(self) -> Tensor:
        """Return the loss of this step, over all its batches."""
        return self._tr_loss  # every step is logged, so there is no other in it

    def _clip_apart(self) -> None:
        """Reduce the gradients of scales as in LSQ, then clip those of weights and of scales by norms of their own."""
        for parameter, share in self._scale_shares:
            if parameter.grad is not None:
                parameter.grad.mul_(share)
        for group in self._clipped_apart:
            norm = get_total_norm([p.grad for p in group if p.grad is not None])
            clip_grads_with_norm_(group, self.args.max_grad_norm, norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures; warn about the loss of an evaluation that is not finite."""
        eval_loss = logs.get("eval_loss")
        if eval_loss is not None and not math.isfinite(eval_loss):
            progress.warn(
                f"The loss on the evaluation data is {eval_loss} at step {self.state.global_step}, although that of "
                "training is finite. Check the rows of --eval-data: is there one without an answer?"
            )
        if not math.isfinite(logs.get("loss", 0.0)):
            self._tr_loss.zero_()  # the Trainer subtracts it from itself, which leaves NaN for all later steps
        super().log(logs, start_time)

    # --- checkpoints ---------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint that appears whole or not at all.

        Raises:
            ModelError: A trained weight is not finite: the checkpoints that exist are better than this one.
            RunError: It cannot be written, or the run folder is gone.
        """
        folder = Path(str(self.args.output_dir))
        run_lock.require_held(folder.parent)
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        step = self.state.global_step
        divergence.require_finite(trained, f"after step {step}")

        def write(work: Path) -> None:
            # The Trainer writes into a folder below its output directory, and removes older ones there.
            self._save_into = work
            try:
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self._save_into = None
            written = work / f"checkpoint-{step}"
            for path in written.iterdir():
                path.rename(work / path.name)
            written.rmdir()
            if self.stream is not None:
                position = dataclasses.asdict(self.stream.position_at(step * self.step_sequences))
                write_text(work / POSITION_FILE, json.dumps(position, indent=1) + "\n")

        checkpoints.save(folder, step, write)

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the last step that is done."""
        assert self.model is not None
        self._save_checkpoint(self.model, None)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder that checkpoints are written below."""
        return str(self._save_into or self.args.output_dir)

    def load_finished(self, checkpoint: Path) -> None:
        """Load the weights and the log of a training that has done all its steps."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))


# --- learning rates ----------------------------------------------------------------------------------------


def learning_rate_factor(
    options: FinetuneOptions,
    start: int,
    of_scales: bool = False,
    restarted: Callable[[], int | None] = lambda: None,
) -> Callable[[int], float]:
    """Return the function from a step, counted from 0, to the learning rate as a share of its group's peak.

    Args:
        options: Learning rates, schedule and warm-up.
        start: Number of steps in phase 1.
        of_scales: For the group of learned scales, whose peak is the same in both phases.
        restarted: Returns the step at which phase 2 was started again, None where it was not.
    """
    ratio = 1.0 if of_scales or options.learning_rate == 0 else qat_learning_rate(options) / options.learning_rate

    def factor(step: int) -> float:
        if step < start:
            # The schedule of all steps, as if there were no phase 2: one that ended here would train less.
            return schedule_factor(step, options.steps, options)
        again = restarted()
        if again is not None and step >= again:
            return schedule_factor(step - again, options.steps - again, options) * ratio * RESTART_RATIO
        begin = start if options.lr_restart else 0
        return schedule_factor(step - begin, options.steps - begin, options) * ratio

    return factor


def qat_learning_rate(options: FinetuneOptions) -> float:
    """Return the peak learning rate of phase 2: as given, or the default for the initialization and the schedule."""
    if options.qat_learning_rate is not None:
        return options.qat_learning_rate
    if not options.lr_restart or options.frozen_base is not None:
        return options.learning_rate  # unmerged adapters move no code
    compensated = options.ptq_init in COMPENSATED
    return options.learning_rate * (COMPENSATED_RATIO if compensated else QAT_RATIO)


def schedule_factor(step: int, steps: int, options: FinetuneOptions) -> float:
    """Return the share of the peak learning rate at `step` of `steps`: linear warm-up, then the schedule down to 0."""
    warmup = min(options.warmup_steps, steps // 5)  # a short phase has no time for a longer one
    if step < warmup:
        return (step + 1) / (warmup + 1)
    # Share of the steps after warm-up that are done; the last step is not quite at 1.
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if options.lr_schedule == "constant":
        return 1.0
    if options.lr_schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2
