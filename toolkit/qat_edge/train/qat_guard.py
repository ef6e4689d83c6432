"""Guard of the QAT phase: what ships is never worse on the evaluation rows than the PTQ that the phase began from.

The loss on some of the evaluation rows, rounding included, is measured before the first step of phase 2, along it and
after its last one.

    better than before       the trained parameters are kept next to the checkpoints, as qat-STEP.safetensors
    diverged                 the parameters of the start are put back; the steps that are left are done from there, at a
                             quarter of the learning rates
    diverged again           training ends
    at the end               the parameters of the last step are the result if they have at least half of the best gain
                             over the start, otherwise the best ones, which may be those of the start

Diverged means: a loss above that of the start by a margin at two evaluations in a row, or a loss, a gradient or a
parameter that is not finite.

The record of all this is part of every checkpoint (trainer_state.json), so that a resumed training ends the same. The
guard uses no random numbers and changes no parameter unless it acts.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from qat_edge import progress
from qat_edge.errors import RunError
from qat_edge.manifest import sha256
from qat_edge.options import FinetuneOptions
from qat_edge.quant.scheme import Scheme
from qat_edge.storage import replace_file
from qat_edge.train import checkpoints, distributed, movement
from qat_edge.train.divergence import first_not_finite
from qat_edge.train.guard_record import NAME, GuardRecord, recorded
from qat_edge.train.trainer import RESTART_RATIO, QatTrainer, TwoPhases, qat_learning_rate

IN_A_ROW = 2  # evaluations above the margin
LEAST_EVALUATIONS, MOST_EVALUATIONS = 3, 8  # along a phase, its end included
STEPS_BETWEEN = 4  # at least, unless there would be too few evaluations
LEAST_STEPS_AGAIN = 3  # fewer steps are not worth another start
# Most time of the evaluations as a share of the training's steps, and the time of one batch of an evaluation and of one
# batch of phase 2 in batches of phase 1: SmolLM2 with 8 rows a batch on one thread took 2.1, 6.3 and 3.6 s.
SHARE, EVALUATION_COST, QAT_COST = 0.05, 0.6, 1.75


class QatGuard(TrainerCallback, ExportableState):
    """Evaluates along phase 2, keeps the best parameters, and starts a phase that diverged again, once.

    Attributes:
        trainer: The trainer, whose model it is.
        phases: Tells whether phase 2 has begun; called back before the guard.
        options: All options of finetune.
        scheme: Bits and group size of each weight.
        rows: Rows it evaluates on.
        folder: RUN/checkpoints.
        record: What it has seen and done.
        moved: How far phase 2 moved the weights; None before `finish`, and where the result is the start.
        wall_s: Time that it took in this process.
    """

    moved: movement.Movement | None = None

    def __init__(
        self,
        trainer: QatTrainer,
        phases: TwoPhases,
        options: FinetuneOptions,
        scheme: Scheme,
        rows: Sequence[Mapping[str, Any]],
        folder: Path,
    ) -> None:
        self.trainer, self.phases, self.options, self.scheme = trainer, phases, options, scheme
        self.rows, self.folder = rows, folder
        self.record, self.wall_s = GuardRecord(), 0.0
        self._bad_step: str | None = None
        trainer.absorb = self._absorb

    # --- callbacks of the Trainer --------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the record, for the checkpoint."""
        return {"args": {}, "attributes": dataclasses.asdict(self.record)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the record of a run that is resumed."""
        self.resume(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start of phase 2, after the transition and before its first step."""
        if not self.record.is_on or not self.phases.qat_started or self.record.began is not None:
            return
        with self._timed():
            loss = self.trainer.mean_loss(self.rows)
        if not math.isfinite(loss):
            self.record.is_on = False
            progress.warn(
                f"QAT has no guard: the loss on {self._rows()} is {loss} where it begins. Check the rows of "
                "--eval-data: is there one without an answer?"
            )
            return
        self.record.began, self.record.best_step = state.global_step, state.global_step
        self.record.evaluations.append({"step": state.global_step, "loss": loss})
        self._keep(state.global_step)
        progress.info(f"QAT begins with a loss of {loss:.4f} on {self._rows()}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate where it is time, keep the parameters if they are the best, and act if the phase diverged."""
        if not self.record.is_on or self.record.began is None or self.record.stopped is not None:
            return
        reason, self._bad_step = self._bad_step, None
        # A checkpoint of parameters that are not finite would stop the training.
        if reason is None and control.should_save:
            bad = first_not_finite(self._trained())
            reason = bad and f"after step {state.global_step}, {bad}"
        if reason is None and state.global_step in evaluation_steps(self.record.began, self.options.steps):
            reason = self._evaluate(state.global_step)
        if reason is not None:
            self._act(reason, state.global_step, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove parameters that no kept checkpoint and no later step needs."""
        if not self.record.evaluations or not distributed.is_first():
            return
        # At a checkpoint, the best parameters were those of the last file up to its step.
        oldest = checkpoints.step_of(checkpoints.found(self.folder)[-1])
        steps = sorted(_step_of(path) for path in self.folder.glob("qat-*.safetensors") if _step_of(path) >= 0)
        needed_from = max((step for step in steps if step <= oldest), default=-1)
        for step in steps:
            if step < needed_from and step != self.record.start["step"]:
                self._file(step).unlink(missing_ok=True)

    # --- the end -------------------------------------------------------------------------------------------

    def resume(self, state: TrainerState) -> None:
        """Take over the record that a checkpoint holds.

        Raises:
            RunError: Parameters that it names are missing or damaged.
        """
        saved = recorded(state.stateful_callbacks, self.folder)
        if saved is not None:
            self.record = saved
        # The Trainer updates what is there, and a checkpoint of an earlier version has nothing.
        assert isinstance(state.stateful_callbacks, dict)
        state.stateful_callbacks.setdefault(NAME, self.state())
        if self.record.began is None:
            if state.global_step > self.phases.start and self.record.is_on:
                self.record.is_on = False
                progress.warn("QAT has no guard: the run began with a version of qat-edge that had none.")
            return
        if self.record.restarts:
            self.trainer.restarted_at = self.record.restarts[-1]["step"]
        # Better now than at the end of a long training.
        is_done = state.global_step >= self.options.steps or self.record.stopped is not None
        result = {self.record.result(self.options.steps)["step"]} - {state.global_step}
        needed = {self.record.start["step"]} | (result if is_done else {self.record.best_step})
        for step in needed - {self.options.steps}:
            self._check(step)

    def finish(self) -> None:
        """Put the parameters that are the result into the model, and report what phase 2 achieved."""
        if not self.record.evaluations:
            return
        start, result, last = self.record.start, self.record.result(self.options.steps), self.record.evaluations[-1]
        if result["step"] != self.trainer.state.global_step:
            self._put_back(result["step"])
        figures = f"QAT: {start['loss']:.4f} -> {result['loss']:.4f} on {self._rows()}"
        if result is start:
            progress.warn(
                f"{figures}: no evaluation was better than the start, so the result is the start, "
                f"{_start_name(self.options)}. Try a lower {' and '.join(_peak_rates(self.options))}, or more "
                f"steps of QAT; --qat-start {self.options.steps} leaves them out."
            )
        elif result is last:
            progress.info(f"{figures}, at step {result['step']}, the last")
        else:
            at_end = f"{last['loss']:.4f} at step {last['step']}"
            progress.info(f"{figures}, best at step {result['step']}, which is the result ({at_end})")
        if result is not start:
            self._measure_movement()

    def summary(self) -> dict[str, Any] | None:
        """Return what manifest and log record; None where nothing was measured."""
        if not self.record.evaluations:
            return None
        result = self.record.result(self.options.steps)
        return {
            "rows": len(self.rows),
            "start_loss": self.record.start["loss"],
            "best_loss": self.record.best["loss"],
            "best_step": self.record.best_step,
            "result_loss": result["loss"],
            "result_step": result["step"],
            # JSON has no NaN.
            "evaluations": [
                each | {"loss": each["loss"] if math.isfinite(each["loss"]) else None}
                for each in self.record.evaluations
            ],
            "restarts": self.record.restarts,
            "stopped": self.record.stopped,
            "moved": self.moved and dataclasses.asdict(self.moved),
        }

    def log(self, wall_s: float) -> dict[str, Any] | None:
        """Report the time that the guard took, and return its entry in training.json.

        Args:
            wall_s: Time of this process.
        """
        summary = self.summary()
        if summary is None:
            return None
        share = self.wall_s / wall_s
        progress.info(f"The guard of QAT took {self.wall_s:.1f} s, {share:.1%} of this training")
        return summary | {"wall_s": self.wall_s, "share": share}

    # --- steps they share ----------------------------------------------------------------------------------

    def _absorb(self, found: str) -> bool:
        """Note a training step that is not finite; `on_step_end` acts on it."""
        if not self.record.is_on or self.record.began is None:
            return False
        self._bad_step = found
        return True

    def _evaluate(self, step: int) -> str | None:
        """Evaluate after a step and keep the parameters if they are the best; return why it counts as divergence."""
        with self._timed():
            loss = self.trainer.mean_loss(self.rows)
        self.record.evaluations.append({"step": step, "loss": loss})
        if not math.isfinite(loss):
            return f"the loss on {self._rows()} is {loss} at step {step}"
        # Of equals the later one: it has seen more rows.
        if loss <= self.record.best["loss"]:
            self.record.best_step = step
            if step < self.options.steps:  # the parameters of the last step are in the model
                self._keep(step)
        self.record.above = self.record.above + 1 if loss > self.record.limit else 0
        if self.record.above < IN_A_ROW:
            return None
        before = self.record.evaluations[-2]
        return (
            f"the loss on {self._rows()} was {self.record.start['loss']:.4f} where it began, {before['loss']:.4f} at "
            f"step {before['step']} and {loss:.4f} at step {step}"
        )

    def _act(self, reason: str, step: int, control: TrainerControl) -> None:
        """Start the phase again, the first time; end the training, the second time."""
        left, event = self.options.steps - step, {"step": step, "reason": reason}
        if not self.record.restarts and left >= LEAST_STEPS_AGAIN:
            self._put_back(self.record.start["step"])
            self.record.restarts.append(event)
            self.record.began, self.record.above = step, 0
            self.trainer.restart_phase_2()
            rates = ", ".join(f"{flag} {RESTART_RATIO * peak:g}" for flag, peak in _peak_rates(self.options).items())
            progress.warn(
                f"QAT diverged: {reason}. It starts again from its beginning for the {left} steps that are left, at a "
                f"quarter of the learning rates: {rates}."
            )
            return
        self.record.stopped = event
        if left:
            control.should_training_stop = control.should_save = True
        # Parameters that are not finite cannot be saved.
        self._put_back(self.record.best_step)
        what = "QAT diverged again: " if self.record.restarts else "QAT diverged: "
        progress.warn(f"{what}{reason}. Training ends after step {step} of {self.options.steps}.")

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        assert self.trainer.model is not None
        return ((name, p.detach()) for name, p in self.trainer.model.named_parameters() if p.requires_grad)

    def _keep(self, step: int) -> None:
        """Write the trained parameters, whole or not at all."""
        with self._timed():
            self.record.files[str(step)] = distributed.on_first(lambda: self._write(step))
        kept = {str(self.record.start["step"]), str(step)}
        self.record.files = {name: digest for name, digest in self.record.files.items() if name in kept}

    def _write(self, step: int) -> str:
        """Write the trained parameters as those of a step, and return the sha256 of the file."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._trained()}
        with replace_file(self._file(step)) as work:
            save_file(tensors, work)
        return sha256(self._file(step))

    def _put_back(self, step: int) -> None:
        """Put the trained parameters of a step into the model.

        Raises:
            RunError: They are missing or damaged.
        """
        with self._timed(), torch.no_grad():
            saved = self._read(step)
            for name, tensor in self._trained():
                tensor.copy_(saved[name])

    def _measure_movement(self) -> None:
        """Measure and report how far phase 2 moved the weights."""
        assert self.trainer.model is not None
        if self.options.frozen_base is not None:
            return  # nothing moves
        with self._timed():
            start = self._read(self.record.start["step"])
            self.moved = movement.measure(self.trainer.model, self.scheme.linears, start)
        progress.info(self.moved.describe())

    def _read(self, step: int) -> dict[str, Tensor]:
        """Read the trained parameters of a step.

        Raises:
            RunError: They are missing, damaged, or those of another model.
        """
        self._check(step)
        path = self._file(step)
        try:
            saved: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path}: cannot be read ({error}). Train again with --force.") from error
        if {name: tensor.shape for name, tensor in saved.items()} != {n: t.shape for n, t in self._trained()}:
            raise RunError(f"{path}: holds parameters of another model. Train again with --force.")
        return saved

    def _check(self, step: int) -> None:
        """Require the file of a step.

        Raises:
            RunError: It is missing or damaged.
        """
        path = self._file(step)
        if not path.is_file() or sha256(path) != self.record.files.get(str(step)):
            what = "another file than was written" if path.is_file() else "missing"
            raise RunError(
                f"{path}: {what}; it holds the parameters of step {step}, which this run may still need. Restore it, "
                "or train again with --force."
            )

    def _file(self, step: int) -> Path:
        return self.folder / f"qat-{step}.safetensors"

    def _rows(self) -> str:
        return f"{len(self.rows)} evaluation rows"

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.wall_s += time.monotonic() - began


def make_guard(
    trainer: QatTrainer,
    phases: TwoPhases,
    options: FinetuneOptions,
    scheme: Scheme,
    rows: Sequence[Mapping[str, Any]] | None,
    folder: Path,
) -> QatGuard | None:
    """Return the guard of a training, None where there is nothing to guard or nothing to measure it on.

    Args:
        trainer: The trainer.
        phases: Its phases.
        options: All options of finetune.
        scheme: Bits and group size of each weight.
        rows: Rows of --eval-data; None without.
        folder: RUN/checkpoints.
    """
    if phases.start >= options.steps:
        return None
    if not rows:
        progress.warn(
            "QAT has no guard: without --eval-data nothing tells whether it ends below where it began. Held-out rows "
            "there keep the best of its states."
        )
        return None
    return QatGuard(trainer, phases, options, scheme, rows[: row_count(options, phases.start)], folder)


def evaluation_steps(begin: int, end: int) -> list[int]:
    """Return the steps after which a phase 2 of the steps `begin` + 1 to `end` is evaluated, its last one included."""
    steps = end - begin
    count = min(steps, max(LEAST_EVALUATIONS, min(MOST_EVALUATIONS, steps // STEPS_BETWEEN)))
    return [begin + round(i * steps / count) for i in range(1, count + 1)]


def row_count(options: FinetuneOptions, start: int) -> int:
    """Return the number of rows to evaluate on: whole batches in `SHARE` of the training's time, at least one batch.

    Args:
        options: Steps, batch size, and the most rows of an evaluation.
        start: Last step of phase 1.
    """
    work = (start + QAT_COST * (options.steps - start)) * options.gradient_accumulation
    evaluations = 1 + len(evaluation_steps(start, options.steps))
    batches = int(SHARE * work / EVALUATION_COST / evaluations)
    return min(options.eval_rows, max(batches, 1) * options.batch_size)


def _step_of(path: Path) -> int:
    """Return the step of a file of parameters, -1 for another file."""
    found = re.fullmatch(r"qat-(\d{1,12})\.safetensors", path.name)
    return int(found[1]) if found else -1


def _peak_rates(options: FinetuneOptions) -> dict[str, float]:
    """Return the peak learning rates of phase 2 by their flags."""
    rates = {} if options.has_fixed_codes else {"--qat-learning-rate": qat_learning_rate(options)}
    return rates | ({"--scale-learning-rate": options.scale_learning_rate} if options.scales == "learned" else {})


def _start_name(options: FinetuneOptions) -> str:
    return "plain rounding" if options.ptq_init == "none" else f"{options.ptq_init} alone"
