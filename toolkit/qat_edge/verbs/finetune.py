"""Train LoRA adapters, or all weights: plain fine-tuning first, then QAT.

    setup    `train.setup`: device, model, data, quantization scheme, adapters
    phase 1  ordinary fine-tuning; its end is saved as RUN/reference, the FP32 fine-tune that all else is compared with
    start    `train.phases`: rotation and PTQ initialization of weights and scales, the teacher of distillation
    phase 2  the same training with fake quantization (`quant.fake`) in the forward pass; ends in RUN/adapter

`train.trainer` is the Hugging Face Trainer with these phases.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from qat_edge import config, progress, readers
from qat_edge.data import training_examples
from qat_edge.errors import RunError, UsageError
from qat_edge.models import merge
from qat_edge.options import FinetuneOptions
from qat_edge.quant import fake
from qat_edge.run import Run
from qat_edge.storage import disk_errors, write_text
from qat_edge.train import objectives
from qat_edge.train.option_checks import check_combination
from qat_edge.train.phases import PhaseTransition
from qat_edge.train.setup import TrainingJob, describe_device, make_trainable, prepare_training
from qat_edge.train.trainer import QatTrainer, ShowProgress, TwoPhases, curve, peak_memory_bytes

TRAINING_LOG = "training.json"
INPUTS_FILE = "inputs.json"  # next to the checkpoints
INPUTS = ("model", "data", "eval_data", "kept_layers")  # what it identifies, by the keys of the job's metadata


@dataclass(frozen=True)
class Finetuned:
    """Result of a fine-tune.

    Attributes:
        run: the run folder.
        steps: optimizer steps of both phases.
        qat_start_step: last step of phase 1.
        loss: of the last step, nats per token.
        wall_s: time of this process.
        peak_memory_bytes: of this process, or of the GPU.
    """

    run: Path
    steps: int
    qat_start_step: int
    loss: float
    wall_s: float
    peak_memory_bytes: int


def finetune(options: FinetuneOptions, out: Path, resume: bool = False, force: bool = False) -> Finetuned:
    """Train into the run folder `out`.

    Args:
        options: what to train, and how.
        out: run folder to write.
        resume: continue from its last checkpoint.
        force: replace a run folder that exists.

    Raises:
        RunError: `out` exists (without `force` or `resume`), or cannot be resumed.
        UsageError: an impossible combination of options.
        ModelError: the model cannot be loaded or trained.
        DataError: the rows cannot be used.
    """
    # Check the options and set everything up; nothing is written yet.
    run = _check_folder(options, out, resume, force)
    check_combination(options)
    began = time.monotonic()
    job = prepare_training(options, _recorded_inputs(run).get("kept_layers") if resume else None)
    adapted, switch = make_trainable(job, options)

    # All options are validated by now, so an earlier run is never deleted for a bad flag.
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
        config.save(run.config, "finetune", options)
    _same_inputs(run, job.metadata, resume)

    # The Trainer calls back at the end of phase 1, where the transition into QAT happens.
    start = qat_start_step(options)
    trainer = _trainer(adapted, job, options, run)
    trainer.configure_optimizer(options, start)
    transition = _phase_transition(adapted, switch, job, options, run, trainer)
    phases = TwoPhases(switch, start, transition)
    trainer.add_callback(phases)
    phase_1 = "LoRA" if options.method == "lora" else "full fine-tuning"
    progress.info(f"{start} steps of {phase_1}, then {options.steps - start} of QAT")

    with progress.bar("training", options.steps) as shown, disk_errors(run.path):
        trainer.add_callback(ShowProgress(shown, phases, phase_1))
        trainer.train(resume_from_checkpoint=resume or None)

    # With no step of QAT, the start of QAT comes after the last step.
    if not phases.qat_started:
        transition.finish_without_qat()
    merge.save_weights(adapted, run.adapter, "adapter", job.metadata | transition.metadata)
    return _log(run, job, trainer, start, time.monotonic() - began)


def _log(run: Run, job: TrainingJob, trainer: QatTrainer, start: int, wall_s: float) -> Finetuned:
    """Write RUN/training.json and return the result; `start` is the last step of phase 1."""
    steps = curve(trainer.state.log_history, start)
    result = Finetuned(
        run=run.path,
        steps=trainer.state.max_steps,
        qat_start_step=start,
        loss=[row["loss"] for row in steps if "loss" in row][-1],
        wall_s=wall_s,
        peak_memory_bytes=peak_memory_bytes(),
    )
    log = dataclasses.asdict(result) | {"device": describe_device(job.device), "truncated_rows": job.rows.truncated}
    write_text(run.path / TRAINING_LOG, json.dumps({**log, "curve": steps}, indent=1, default=str))
    return result


def _phase_transition(
    adapted: PreTrainedModel | PeftModel,
    switch: fake.Switch,
    job: TrainingJob,
    options: FinetuneOptions,
    run: Run,
    trainer: QatTrainer,
) -> PhaseTransition:
    """Return the start of QAT as a callback of the Trainer."""
    return PhaseTransition(
        model=adapted, switch=switch, scheme=job.scheme, rows=job.rows, tokenizer=job.tokenizer, options=options,
        run=run, device=job.device, precision=job.precision, rotation_seed=job.rotation_seed,
        save_reference=lambda: merge.save_weights(adapted, run.reference, "reference", job.metadata, scales=False),
        set_teacher=trainer.set_teacher, reset_optimizer=trainer.reset_optimizer,
    )  # fmt: skip


def _trainer(adapted: PreTrainedModel | PeftModel, job: TrainingJob, options: FinetuneOptions, run: Run) -> QatTrainer:
    """Return the Trainer with the rows, the loss and the options."""
    trainer = QatTrainer(
        model=adapted,
        args=_arguments(options, run, job),
        data_collator=training_examples.make_collator(job.task, job.tokenizer),
        train_dataset=job.rows.rows,
        eval_dataset=None if job.eval_rows is None else job.eval_rows.rows[: options.eval_rows],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.set_objective(objectives.objective_for_task(job.task))
    return trainer


def qat_start_step(options: FinetuneOptions) -> int:
    """Return the last step of phase 1: below 1, `qat_start` is a fraction of the steps; from 1 on, a step."""
    start = options.qat_start * options.steps if options.qat_start < 1 else options.qat_start
    return min(round(start), options.steps)


def _check_folder(options: FinetuneOptions, out: Path, resume: bool, force: bool) -> Run:
    """Return the run folder to train into.

    Raises:
        RunError: it exists without `force` or `resume`, or cannot be resumed.
        UsageError: the options differ from those of the run to resume, or an input would be deleted by `force`.
    """
    run = Run(out)
    if resume:
        _check_resumable(options, run)
        return run
    if not out.exists():
        return run

    if not force:
        raise RunError(f"{out} exists already. Give --force to replace it, or --resume to continue it.")
    Run.open(out)  # --force replaces a run folder, never a folder that is something else
    for name in ("model", "data", "eval_data"):
        if Path(str(getattr(options, name))).resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"{config.flag_name(name)} {getattr(options, name)} is inside {out}, which --force would "
                "remove. Move it, or choose another --out."
            )
    return run


def _check_resumable(options: FinetuneOptions, run: Run) -> None:
    """Require a checkpoint, and the very options that the run began with.

    Raises:
        RunError: there is nothing to resume.
        UsageError: options differ; the message names their flags.
    """
    if not run.config.is_file():
        raise RunError(
            f"--resume: {run.path} has no config.yaml, so there is nothing to resume. Train without --resume."
        )
    if not any(run.checkpoints.glob("checkpoint-*")):
        raise RunError(f"--resume: {run.checkpoints} has no checkpoint. Train with --force instead of --resume.")

    saved = config.load(FinetuneOptions, "finetune", run.config, {})
    changed = [k for k, v in dataclasses.asdict(saved).items() if getattr(options, k) != v]
    if changed:
        raise UsageError(
            f"--resume: {', '.join(config.flag_name(k) for k in changed)} differ from {run.config}. "
            "A resumed run continues exactly as it began: give the same options, or none."
        )


def _same_inputs(run: Run, facts: dict[str, Any], resume: bool) -> None:
    """Save the identity of model and data next to the checkpoints; refuse to resume with others.

    Raises:
        RunError: model or data changed since the run began.
    """
    current = json.loads(json.dumps({k: facts[k] for k in INPUTS}, default=str))
    if not resume:
        write_text(run.checkpoints / INPUTS_FILE, json.dumps(current, indent=1))
        return
    saved = _recorded_inputs(run)
    changed = [k for k in current if current[k] != saved.get(k)]
    if changed:
        raise RunError(f"--resume: {', '.join(changed)} changed since {run.path} began. Train again with --force.")


def _recorded_inputs(run: Run) -> dict[str, Any]:
    return readers.read_object(run.checkpoints / INPUTS_FILE, RunError)


def _arguments(options: FinetuneOptions, run: Run, job: TrainingJob) -> TrainingArguments:
    """Translate the options into those of the Hugging Face Trainer."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "logs")
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        seed=options.seed,
        # TwoPhases requests the evaluation at the end of each phase; "steps" makes the Trainer able to evaluate.
        eval_strategy="no" if job.eval_rows is None else "steps",
        eval_steps=options.eval_every or options.steps + 1,
        prediction_loss_only=True,
        label_names=["labels"] if job.task.is_encoder else None,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=1,
        include_num_input_tokens_seen="all",
        report_to=list(options.track),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
