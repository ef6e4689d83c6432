"""Callback that makes a trainer of transformers or TRL train a prepared model in two phases, and end in a run folder.

    on_init_end      arguments of the trainer that cannot be right are refused
    on_train_begin   steps and rows are known: config.yaml is written, or compared for a training that is resumed
    on_step_begin    the transition into QAT, once (`phases`)
    on_optimizer_step  learned scales, which have an optimizer of their own here
    on_save          what a resumed training needs on top of the trainer's checkpoint
    on_train_end     RUN/adapter and training.json

The trainer's optimizer has the adapters. Their learning rate in the QAT phase, and that of the scales, follow the same
formulas as `trainer.QatTrainer`, with the trainer's own schedule.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qat_edge import previous_run, progress, run_lock
from qat_edge.data import training_examples
from qat_edge.data.formats import RowStream
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.manifest import check_files
from qat_edge.models import load, merge
from qat_edge.models.positions import max_positions
from qat_edge.models.tasks import CAUSAL_LM
from qat_edge.options import TRAINER_ROWS, FinetuneOptions
from qat_edge.quant import fake
from qat_edge.quant.ptq.method_names import CALIBRATED
from qat_edge.quant.scheme import Scheme
from qat_edge.readers import shorten
from qat_edge.run import Run
from qat_edge.train import divergence, resumable, run_inputs
from qat_edge.train.option_checks import check_combination, row_length
from qat_edge.train.phases import PhaseTransition
from qat_edge.train.recipe import describe_recipe
from qat_edge.train.setup import TrainingJob, describe_device, describe_inputs
from qat_edge.train.trainer import TwoPhases
from qat_edge.train.trainer_arguments import check_arguments, options_of
from qat_edge.train.trainer_forward import require_rounded_head, route_forward
from qat_edge.train.trainer_rows import read_rows, write_rows
from qat_edge.train.trainer_schedule import set_learning_rates
from qat_edge.train.training_log import Finetuned, write_log

CHECKPOINT_FILE = "qat_edge.pt"  # in each of the trainer's checkpoints of the QAT phase
COMPARED_TOKENS = 64  # of one row, whose log-probabilities are compared with those of the rounded head
REFERENCE_ADAPTER = "ref"  # TRL's copy of the adapters for the reference model of DPO


@dataclass(frozen=True)
class PreparedModel:
    """A base model with fake quantization, switched off, and adapters.

    Attributes:
        model: The model that the trainer gets.
        switch: Turns fake quantization on and off.
        tokenizer: The model's tokenizer.
        identity: Identity of the base model's files.
        scheme: Bits and group size of each weight.
        bits: Bits of single layers, by name.
        levels: Levels of 2-bit weights.
        rotation_seed: Seed of the rotation; None without one.
        options: Options of `prepare`; those that the trainer decides have no meaning yet.
    """

    model: PeftModel
    switch: fake.Switch
    tokenizer: PreTrainedTokenizerBase
    identity: load.ModelIdentity
    scheme: Scheme
    bits: dict[str, int]
    levels: str
    rotation_seed: int | None
    options: FinetuneOptions


class QatCallback(TrainerCallback):
    """Trains a prepared model in two phases. Pass it to the trainer: `callbacks=[prepared.callback]`.

    Attributes:
        prepared: The model.
        run: The run folder.
        resume: The folder holds a run that a checkpoint of the trainer continues.
        force: Replace a run in the folder.
        result: None until the training has ended.
        why_unfinished: Reason that there is no result, for an error.
    """

    def __init__(self, prepared: PreparedModel, run: Run, resume: bool, force: bool) -> None:
        self.prepared, self.run, self.resume, self.force = prepared, run, resume, force
        self.result: Finetuned | None = None
        self.why_unfinished = "the trainer has not trained. Call trainer.train() of a trainer that has the callback."
        self._tokenizer_before = _tokenizer_state(prepared.tokenizer)
        self._training: _Training | None = None
        self._lock = ExitStack()
        prepared.model.register_forward_pre_hook(self._require_training)

    # --- events of the trainer -----------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse arguments of the trainer at once."""
        check_arguments(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the trainer, write the beginning of the run folder, and restore the QAT phase of a resumed training."""
        check_arguments(args)
        if self.result is not None or self._training is not None:
            raise UsageError("train(): a prepared model is trained once. Call prepare() again, with another folder.")
        self._require_same(kwargs["model"], kwargs["processing_class"])
        if state.global_step and not self.resume:
            raise UsageError(
                f"resume_from_checkpoint: step {state.global_step} of an earlier training. Call prepare() with the "
                f"same arguments and resume=True, so that {self.run.path} is continued."
            )

        self._lock.enter_context(run_lock.writing(self.run.path, "prepare", create=True, resuming=True))
        try:
            self._begin(args, state, kwargs)
        except BaseException:
            self._lock.close()
            raise

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the transition before the first step of QAT."""
        self._running.begin_step(args, state, control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop at a gradient that is not finite, before weights are changed by it."""
        self._running.require_finite_gradients(state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change the learned scales in the same step as the trainer changed the adapters."""
        self._running.step_scales(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what a resumed training needs to the trainer's checkpoint."""
        self._running.save_checkpoint(_checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write RUN/adapter and training.json, unless the training was stopped before QAT."""
        training = self._running
        start, steps = training.phases.start, state.max_steps
        try:
            if state.global_step < min(start, steps) or (not training.phases.qat_started and start < steps):
                self.why_unfinished = (
                    f"training was stopped at step {state.global_step} of {steps}, before QAT began at step {start}. "
                    "Continue it with trainer.train(resume_from_checkpoint=True) after prepare(..., resume=True), or "
                    "prepare again with an earlier qat_start."
                )
                progress.warn(f"{self.run.path} is not finished: {self.why_unfinished}")
                return
            if state.global_step < steps:
                progress.warn(f"Training was stopped at step {state.global_step} of {steps}, in the QAT phase")
            self.result = training.finish(args, state)
        finally:
            self._training = None
            self._lock.close()

    # --- steps they share ----------------------------------------------------------------------------------

    @property
    def _running(self) -> _Training:
        assert self._training is not None  # made by on_train_begin, which comes first
        return self._training

    def _require_training(self, model: nn.Module, args: Any) -> None:
        """Refuse a step of a trainer without this callback: it would train plain LoRA to the end."""
        if model.training and torch.is_grad_enabled() and self._training is None:
            raise UsageError(
                "The trainer has a prepared model and not its callback, so QAT would never begin. Construct it with "
                "callbacks=[prepared.callback]."
            )

    def _require_same(self, model: nn.Module, tokenizer: Any) -> None:
        """Refuse a trainer with another model, further adapters or another tokenizer than the prepared ones.

        Raises:
            UsageError: Says what differs.
        """
        prepared, adapters = self.prepared, tuple(self.prepared.model.peft_config)
        if model is not prepared.model:
            raise UsageError(
                f"The trainer trains a {type(model).__name__} that is not the prepared model. Give it "
                "model=prepared.model, and no model_init."
            )
        # TRL's copy of the adapters is the base model, because they add nothing yet: so is a pass without adapters.
        if REFERENCE_ADAPTER in adapters:
            delete: Any = prepared.model.delete_adapter
            delete(REFERENCE_ADAPTER)
        others = sorted({*adapters} - {fake.ADAPTER, REFERENCE_ADAPTER})
        if others:
            raise UsageError(
                f"The model has a further adapter, {shorten(others[0])}, which QAT would leave out. Train one adapter."
            )
        after = _tokenizer_state(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
        changed = [name for name, value in self._tokenizer_before.items() if after.get(name) != value]
        if changed:
            raise UsageError(
                f"The trainer's tokenizer is not the model's ({changed[0]} differs), and artifacts ship the model's. "
                "Give processing_class=prepared.tokenizer, and no eos_token or chat_template_path; or save model and "
                "tokenizer in a folder first, and prepare that."
            )

    def _begin(self, args: TrainingArguments, state: TrainerState, kwargs: Mapping[str, Any]) -> None:
        """Read the rows, write config.yaml, and set the phases up."""
        prepared, data = self.prepared, self.prepared.options.data
        named = data != TRAINER_ROWS
        rows = self._read_rows(kwargs["train_dataloader"].dataset, args)
        longest = max(len(row["input_ids"]) for row in rows.rows)
        options = options_of(
            prepared.options, args, state.max_steps, data if named else str(self.run.rows.absolute()), longest
        )
        check_combination(options)
        job = _job(prepared, options, rows)
        training = _Training(prepared, self.run, job, options, kwargs["optimizer"], kwargs["lr_scheduler"], args)

        # As in `prepare`, because time has passed: by the options of the run to resume, or by those that were given.
        run_inputs.check_folder(options if self.resume else prepared.options, self.run, self.resume, self.force)
        run_inputs.begin(self.run, options, job, self.resume, trainer=type(args).__name__)
        if not named:
            write_rows(rows.rows, prepared.tokenizer, self.run.rows)
        rotated = prepared.rotation_seed is not None
        progress.info(describe_recipe(options, options.qat_start_step, prepared.scheme.summary(), rotated))

        training.begin(args, state)
        self._training = training
        self.why_unfinished = (
            "its training has not ended: it is still running, was interrupted or failed. Continue it with prepare(..., "
            "resume=True) and trainer.train(resume_from_checkpoint=True), or prepare again with force=True."
        )

    def _read_rows(self, dataset: Any, args: TrainingArguments) -> TokenizedRows:
        """Return rows to calibrate on: those that the user named, or the trainer's."""
        prepared, options = self.prepared, self.prepared.options
        if options.data != TRAINER_ROWS:
            model, length = prepared.model, row_length(options, prepared.model.config)
            return training_examples.tokenize_for_task(
                CAUSAL_LM, RowStream(options.data, "train"), fake.base_of(model), prepared.tokenizer, length
            )
        longest = getattr(args, "max_length", None)
        return read_rows(dataset, prepared.tokenizer, options.calibration_tokens, longest, options.seed)


class _Training:
    """A training in progress: its phases, and the learning rates and scales of QAT."""

    def __init__(
        self,
        prepared: PreparedModel,
        run: Run,
        job: TrainingJob,
        options: FinetuneOptions,
        optimizer: Any,
        schedule: Any,
        args: TrainingArguments,
    ) -> None:
        self.prepared, self.run, self.job, self.options = prepared, run, job, options
        self.began = time.monotonic()
        self.model = prepared.model
        self.transition = PhaseTransition(
            model=self.model, switch=prepared.switch, scheme=prepared.scheme, rows=job.rows, tokenizer=job.tokenizer,
            options=options, run=run, device=job.device, precision=job.precision, rotation_seed=job.rotation_seed,
            given_start=None, save_reference=self._save_reference, set_teacher=lambda teacher: None,
            reset_optimizer=getattr(optimizer, "optimizer", optimizer).state.clear,
        )  # fmt: skip
        self._require_no_scales(optimizer)
        self.phases = TwoPhases(prepared.switch, options.qat_start_step, self.transition)
        self._scale_factor = set_learning_rates(schedule, optimizer, options, args)
        self._scales: torch.optim.AdamW | None = None  # made at the start of QAT
        self._has_fused_head = False

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Restore the QAT phase of a resumed training, and route the forward pass.

        Raises:
            RunError: The checkpoint or the run folder does not have what the QAT phase needs.
        """
        changes_base = self.options.ptq_init in CALIBRATED
        base = fake.base_of(self.model)
        self._has_fused_head = "forward" in vars(base)  # TRL replaces it in the object
        route_forward(base, self.prepared.switch, self._load_base if changes_base else None)
        if state.global_step <= self.phases.start:
            return
        check_files(self.run.reference)
        self.phases.on_train_begin(args, state, TrainerControl())
        self._start_scales()
        self._load_checkpoint(_checkpoint(args, state))
        self.prepared.switch.enabled = True  # an evaluation may come before the first step
        self._require_rounded_head()

    def begin_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Make the transition before the first step of QAT, and turn fake quantization on."""
        in_qat = self.phases.qat_started
        self.phases.on_step_begin(args, state, control)
        if self.phases.qat_started and not in_qat:
            self._start_scales()
            self._require_rounded_head()

    def require_finite_gradients(self, state: TrainerState) -> None:
        """Refuse a step with a gradient that is not finite.

        Raises:
            ModelError: Names the tensor.
        """
        gradients = [(f"the gradient of {n}", p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        # One number first: each check waits for the device.
        if bool(torch.isfinite(torch.nn.utils.get_total_norm([grad for _, grad in gradients]))):
            return
        found = divergence.first_not_finite(gradients) or "the sum of the squares of all gradients overflows"
        phase = "QAT" if self.phases.qat_started else "LoRA"
        raise ModelError(
            f"Training diverged at step {state.global_step + 1} ({phase}): {found}. "
            f"{self.run.path} is not finished. Train again with a lower learning_rate, or of QAT qat_learning_rate and "
            "scale_learning_rate, or with more warmup_steps; if it is the first step, check model and data."
        )

    def step_scales(self, step: int) -> None:
        """Change the learned scales. step: the step, counted from 0."""
        if self._scales is None:
            return
        self._scales.param_groups[0]["lr"] = self.options.scale_learning_rate * self._scale_factor(step)
        self._scales.step()

    def save_checkpoint(self, folder: Path) -> None:
        """Add the averages of the scales' gradients, and which initialization they belong to, to a checkpoint."""
        if self.phases.qat_started and folder.is_dir():
            state = {"start": self.transition.init_sha256, "scales": self._scales and self._scales.state_dict()}
            torch.save(state, folder / CHECKPOINT_FILE)

    def finish(self, args: TrainingArguments, state: TrainerState) -> Finetuned:
        """Write RUN/adapter and training.json; the model computes what the adapter stands for from now on."""
        if not self.phases.qat_started:
            self.transition.finish_without_qat()
        self.prepared.switch.enabled = True
        divergence.require_finite(self.model.named_parameters(), "at the end of training")
        metadata = self.job.metadata | self.transition.metadata | {"qat_guard": None}
        merge.save_weights(self.model, self.run.adapter, "adapter", metadata)

        wall_s, start = time.monotonic() - self.began, self.phases.start
        entries = {
            "device": describe_device(self.job.device),
            "truncated_rows": None,  # known to the trainer alone
            "qat_guard": None,
            "trainer": {"arguments": type(args).__name__, **args.to_sanitized_dict()},
        }
        result = write_log(self.run.path, state.global_step, start, wall_s, state.log_history, entries)
        previous_run.discard(self.run.path)
        return result

    def _save_reference(self) -> None:
        merge.save_weights(self.model, self.run.reference, "reference", self.job.metadata, scales=False)

    def _load_base(self) -> PreTrainedModel:
        """Load the base model as it was before QAT."""
        progress.info("The reference model of this trainer is loaded, because QAT has changed the weights of the base")
        options = self.options
        return load.load_model(options.model, options.trust_remote_code, revision=self.prepared.identity.revision).model

    def _require_no_scales(self, optimizer: Any) -> None:
        """Refuse an optimizer that would change the learned scales as well.

        Raises:
            UsageError: It has them.
        """
        scales = {id(factor) for factor in self._scale_factors()}
        if any(id(parameter) in scales for group in optimizer.param_groups for parameter in group["params"]):
            raise UsageError(
                "The trainer's optimizer has the learned scales, which the callback trains. Make it of the parameters "
                "with requires_grad alone."
            )

    def _scale_factors(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if fake.SCALE_FACTOR in name]

    def _start_scales(self) -> None:
        """Make the optimizer of the learned scales, which are trained from now on."""
        factors = self._scale_factors()
        if factors:
            for factor in factors:
                factor.requires_grad_(True)
            # The rate is set at each step; scales are factors and do not decay towards 0.
            self._scales = torch.optim.AdamW(factors, lr=0.0, weight_decay=0.0)

    def _require_rounded_head(self) -> None:
        """Compare the log-probabilities that the trainer will take with those of the head, on one row."""
        if self._has_fused_head:
            ids = self.job.rows.rows[0]["input_ids"][:COMPARED_TOKENS]
            require_rounded_head(fake.base_of(self.model), torch.tensor([ids], device=self.model.device))

    def _load_checkpoint(self, folder: Path) -> None:
        """Read what `save_checkpoint` added.

        Raises:
            RunError: It is missing, or of another training.
        """
        path = folder / CHECKPOINT_FILE
        if not path.is_file():
            raise RunError(
                f"{path}: missing. The QAT phase of a prepared model is resumed from a checkpoint in the trainer's "
                "output_dir that its own callback completed. Resume from one, or prepare again."
            )
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            start, scales = saved["start"], saved["scales"]
            if self._scales is not None and start == self.transition.init_sha256:
                self._scales.load_state_dict(scales)
        except resumable.UNREADABLE as error:
            raise RunError(f"{path}: damaged, or not of this training. Resume from an earlier checkpoint.") from error
        if start != self.transition.init_sha256:
            raise RunError(
                f"{folder} is of another training than {self.run.path}: its adapters belong to other weights than "
                f"those in {self.run.start}. Give prepare() the run folder of that training."
            )


# --- what a run records ------------------------------------------------------------------------------------


def _job(prepared: PreparedModel, options: FinetuneOptions, rows: TokenizedRows) -> TrainingJob:
    """Return the training as `finetune` would have set it up."""
    metadata = describe_inputs(options, CAUSAL_LM, prepared.identity, rows, None)
    metadata |= {"device": options.device, "precision": options.precision}
    metadata |= {"bits": prepared.bits, "weight_levels": prepared.levels, "kept_layers": None, "frozen_base": None}
    metadata["max_position_embeddings"] = max_positions(prepared.model.config)
    return TrainingJob(
        CAUSAL_LM, prepared.model.get_base_model(), prepared.tokenizer, prepared.scheme, rows, rows.rows, None,
        options.device, options.precision, prepared.rotation_seed, None, None, metadata,
    )  # fmt: skip


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what decides the token ids of a prompt and where an answer ends."""
    return {
        "the number of tokens": len(tokenizer),
        "chat_template": tokenizer.chat_template,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
    }


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
