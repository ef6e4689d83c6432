"""Train LoRA adapters, or all weights: plain fine-tuning first, then QAT.

    setup    `train.setup`: device, model, data, quantization scheme, adapters
    phase 1  ordinary fine-tuning; its end is saved as RUN/reference, the FP32 fine-tune that all else is compared with
    start    `train.phases`: rotation and PTQ initialization of weights and scales, the teacher of distillation
    phase 2  the same training with fake quantization (`quant.fake`) in the forward pass; ends in RUN/adapter

`train.trainer` is the Hugging Face Trainer with these phases; `train.qat_guard` keeps the best state of phase 2. A
training may be killed at any moment: every part of the run folder is whole or missing, and `--resume` goes on from the
newest whole checkpoint (`train.checkpoints`) to the same result, bit for bit.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from qat_edge import environment, launched, option_paths, previous_run, progress, run_lock, stop_signals
from qat_edge.data import training_examples
from qat_edge.errors import DataError, ModelError, RunError, UsageError
from qat_edge.manifest import MANIFEST, check_files, file_faults, read_manifest
from qat_edge.models import merge
from qat_edge.options import FinetuneOptions
from qat_edge.peak_memory import is_out_of_memory
from qat_edge.quant import fake
from qat_edge.readers import counted, read_json, shorten
from qat_edge.run import Run
from qat_edge.storage import disk_errors
from qat_edge.train import (
    checkpoints,
    distributed,
    divergence,
    guard_record,
    objectives,
    qat_guard,
    resumable,
    run_inputs,
)
from qat_edge.train.arguments import training_arguments
from qat_edge.train.distributed_trainer import DistributedTrainer
from qat_edge.train.option_checks import check_combination
from qat_edge.train.phases import PhaseTransition, require_same_tensors
from qat_edge.train.qat_guard import QatGuard
from qat_edge.train.recipe import describe_recipe
from qat_edge.train.setup import TrainingJob, choose_device, describe_device, make_trainable, prepare_training
from qat_edge.train.trainer import QatTrainer, StopInOrder, TwoPhases
from qat_edge.train.training_log import TRAINING_LOG, Finetuned, write_log
from qat_edge.train.training_progress import ShowProgress
from qat_edge.verbs import memory_advice


def finetune(
    options: FinetuneOptions,
    out: Path,
    resume: bool = False,
    force: bool = False,
    context_length: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Finetuned:
    """Train into the run folder `out`.

    Args:
        options: what to train, and how.
        out: run folder to write.
        resume: continue from its last checkpoint, or from the beginning where there is none. Of a finished run, write
            what is missing.
        force: replace a run folder that exists. The old run is kept until the new one is finished.
        context_length: of the export to come, if it is known: one that the model has no positions for is refused
            before training.
        callbacks: of the Trainer, called after our own.

    Raises:
        RunError: `out` exists (without `force` or `resume`), cannot be resumed, or another process writes into it.
        UsageError: an impossible combination of options.
        ModelError: the model cannot be loaded or trained, the training diverged, or the memory was not enough: the
            message has what needs it, and options that need less.
        DataError: the rows cannot be used.
        ExportError: the model has fewer positions than `context_length`.
        Stopped: a signal ended it; the message has the command that continues.
    """
    run = Run.to_resume(out) if resume else Run(out)
    options = option_paths.absolute(options)
    _join(options)
    with ExitStack() as held:
        if not distributed.is_first():
            held.enter_context(progress.report_to(progress.SilentReporter()))
        lock = run_lock.writing(out, "finetune", create=not resume, resuming=resume or force)
        distributed.on_first(lambda: held.enter_context(lock))
        try:
            distributed.require_shared(out / run_lock.HOLDER)
            result = _finetune(options, run, resume, force, context_length, callbacks)
            distributed.leave()  # before the lock is released: nobody reads the folder any more
            return result
        except KeyboardInterrupt as error:
            raise _stopped(run, error) from None
        except (MemoryError, RuntimeError) as error:
            if distributed.is_lost_process(error):
                raise RunError(_lost_process(run, error)) from error
            if not is_out_of_memory(error):
                raise
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # Outside of the handler, so that the tensors of the training are not held by its traceback.
    raise ModelError(memory_advice.explain(options, found))


def _join(options: FinetuneOptions) -> None:
    """Connect the processes of a launcher, after the checks that need none of the others.

    Raises:
        UsageError: the training cannot be shared between them.
    """
    environment.require_launch()
    if launched.count() == 1:
        if options.shard_base:
            raise UsageError(
                "--shard-base: shares the frozen weights between several processes, and there is one. Start it with "
                "torchrun or `accelerate launch`, or give --no-shard-base."
            )
        return
    if not options.steps:
        raise UsageError(
            f"--steps 0 trains nothing, and a launcher started {launched.count()} processes. Start it without torchrun "
            "or accelerate."
        )
    distributed.require_divisible(options.batch_size)
    distributed.join(choose_device(options.device))


def _finetune(
    options: FinetuneOptions,
    run: Run,
    resume: bool,
    force: bool,
    context_length: int | None,
    callbacks: Sequence[TrainerCallback],
) -> Finetuned:
    """Train into a run folder whose lock is held."""
    # Check the options and set everything up; nothing is written yet.
    run_inputs.check_folder(options, run, resume, force)
    check_combination(options)
    finished = _finished(run, options) if resume else None
    if resume:
        run_inputs.require_own_trainer(run)
        run_inputs.require_record(run, finished is not None)
    began = time.monotonic()
    kept_layers = run_inputs.recorded_inputs(run).get("kept_layers") if resume else None
    job = prepare_training(options, kept_layers, context_length)
    adapted, switch = make_trainable(job.model, job.scheme, job.task, options)
    start = options.qat_start_step
    progress.info(describe_recipe(options, start, job.scheme.summary(), job.rotation_seed is not None))

    # All options are validated by now, so an earlier run is never touched for a bad flag.
    distributed.require_same(
        json.dumps(job.metadata, default=str), "The inputs",
        "Every process reads the model and the data itself: give all machines the same files.",
    )  # fmt: skip
    distributed.on_first(lambda: run_inputs.begin(run, options, job, resume))
    if finished is not None:
        steps = "its one step is" if finished.steps == 1 else f"all {finished.steps} steps are"
        progress.info(f"{run.path} is finished: {steps} done and its adapter is written")
        return finished
    if resume:
        _require_reference(run, start)

    try:
        trainer, guard = _train(run, options, job, adapted, switch, resume, callbacks)
        result = distributed.on_first(lambda: _log(run, job, trainer, guard, start, time.monotonic() - began))
    except BaseException as error:
        if distributed.is_first():
            _report_unfinished(run, error)
        raise
    distributed.on_first(lambda: previous_run.discard(run.path))
    return result


def _train(
    run: Run,
    options: FinetuneOptions,
    job: TrainingJob,
    adapted: PreTrainedModel | PeftModel,
    switch: fake.Switch,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> tuple[QatTrainer, QatGuard | None]:
    """Train, or load the result of a training whose steps are all done, and write RUN/adapter.

    Raises:
        Stopped: a signal ended the training after a step, whose checkpoint is saved.
    """
    checkpoint = _newest_checkpoint(run) if resume else None
    if resume and checkpoint is None:
        progress.info(f"--resume: {run.path} has no checkpoint yet, so training starts from the beginning")

    # The Trainer calls back at the end of phase 1, where the transition into QAT happens.
    start = options.qat_start_step
    trainer = _trainer(adapted, job, options, run)
    trainer.configure_optimizer(options, start)
    if checkpoint is not None:
        resumable.require_resumable(checkpoint, trainer, options.steps)
        trainer.resume_stream(checkpoint)
    transition = _phase_transition(adapted, switch, job, options, run, trainer)

    with stop_signals.defer_signals(_announce_stop) as request, disk_errors(run.path):
        phases = TwoPhases(switch, start, transition, request.at_once, trainer.whole_base)
        guard = _guard(trainer, phases, options, job, run)
        if checkpoint is not None and _is_done(checkpoint, options):
            _load_finished(trainer, phases, guard, options, checkpoint)
        elif options.steps:
            _run_steps(trainer, phases, guard, options, checkpoint, request, callbacks)

        # With no step of QAT, the start of QAT comes after the last step.
        if not phases.qat_started:
            with request.at_once():
                transition.finish_without_qat()
        if guard is not None:
            guard.finish()

    divergence.require_finite(adapted.named_parameters(), "at the end of training")
    require_same_tensors(((n, p) for n, p in adapted.named_parameters() if p.requires_grad), "The trained weights")
    guarded = {"qat_guard": guard and guard.summary()}
    metadata = job.metadata | transition.metadata | guarded
    distributed.on_first(lambda: merge.save_weights(adapted, run.adapter, "adapter", metadata))
    return trainer, guard


def _newest_checkpoint(run: Run) -> Path | None:
    return distributed.on_first(lambda: checkpoints.newest_whole(run.checkpoints))


def _guard(
    trainer: QatTrainer, phases: TwoPhases, options: FinetuneOptions, job: TrainingJob, run: Run
) -> QatGuard | None:
    """Return the guard of phase 2; None without a phase 2, and without rows to evaluate on."""
    rows = None if job.eval_rows is None else job.eval_rows.rows
    return qat_guard.make_guard(trainer, phases, options, job.scheme, rows, run.checkpoints)


def _load_finished(
    trainer: QatTrainer, phases: TwoPhases, guard: QatGuard | None, options: FinetuneOptions, checkpoint: Path
) -> None:
    """Bring model, phases and guard to where a training whose steps are all done left them."""
    progress.info(f"All steps are done in {checkpoint.name}; writing what is missing")
    trainer.load_finished(checkpoint)
    if phases.start < options.steps:
        phases.transition.restore()
        phases.qat_started = True
    if guard is not None:
        guard.resume(trainer.state)


def _is_done(checkpoint: Path, options: FinetuneOptions) -> bool:
    """Return whether a checkpoint is the end of a training: its last step, or where the guard ended it."""
    return checkpoints.step_of(checkpoint) >= options.steps or guard_record.ended_early(checkpoint)


def _run_steps(
    trainer: QatTrainer,
    phases: TwoPhases,
    guard: QatGuard | None,
    options: FinetuneOptions,
    checkpoint: Path | None,
    request: stop_signals.StopRequest,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Do the steps that are left.

    Raises:
        Stopped: a signal came; the step in progress is done and its checkpoint saved.
    """
    trainer.add_callback(phases)
    trainer.add_callback(StopInOrder(request))
    if guard is not None:
        trainer.add_callback(guard)
    for callback in callbacks:
        trainer.add_callback(callback)
    progress.info(
        f"{phases.start} steps of {trainer.phase_1}, then {options.steps - phases.start} of QAT: "
        f"{_amount(trainer, options)}"
    )
    with progress.bar("training", options.steps) as shown:
        trainer.add_callback(ShowProgress(shown, phases, trainer.phase_1))
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except DataError:
            # A row of a stream cannot be used: training goes on from this very step once it is mended.
            if trainer.state.global_step > (0 if checkpoint is None else checkpoints.step_of(checkpoint)):
                trainer.save_checkpoint()
            raise
    trainer.gather_base()
    if trainer.stream is not None:
        progress.info(f"train: {trainer.stream.summary()}")
    if request.signum is not None and trainer.state.global_step < options.steps:
        raise stop_signals.Stopped(request.signum)


def _amount(trainer: QatTrainer, options: FinetuneOptions) -> str:
    """Return how much data the steps take, for a message."""
    seen, unit = options.steps * trainer.step_sequences, "sequence" if options.packing else "row"
    if trainer.stream is not None:
        return f"{counted(seen, unit)} of a stream"
    count = len(trainer.train_dataset)
    return f"{seen / count:.2g} passes over {counted(count, unit)}"


def _announce_stop(signum: int) -> None:
    name = signal.Signals(signum).name
    progress.info(f"{name}: stopping after this step, with a checkpoint. Once more ends the training at once.")


def _log(
    run: Run, job: TrainingJob, trainer: QatTrainer, guard: QatGuard | None, start: int, wall_s: float
) -> Finetuned:
    """Write RUN/training.json and return the result; `start` is the last step of phase 1."""
    truncated = job.rows.truncated if trainer.stream is None else trainer.stream.position.counts.truncated
    entries = {
        "device": describe_device(job.device),
        "truncated_rows": truncated,
        "qat_guard": guard and guard.log(wall_s),
    }
    return write_log(run.path, trainer.args.max_steps, start, wall_s, trainer.state.log_history, entries)


def _finished(run: Run, options: FinetuneOptions) -> Finetuned | None:
    """Return the result of a finished run, with no time spent in this process; None where something is missing."""
    try:
        for folder in (run.adapter, run.reference):
            if faults := file_faults(folder, read_manifest(folder)):
                progress.warn(f"{folder} is not as it was written: {faults[0]}")
                return None
        log = read_json(run.path / TRAINING_LOG, RunError)
        if log["steps"] != options.steps:
            return None
        return Finetuned(run.path, log["steps"], log["qat_start_step"], log["loss"], 0.0, log["peak_memory_bytes"])
    except (RunError, KeyError, TypeError):
        return None


def _require_reference(run: Run, start: int) -> None:
    """Require RUN/reference, if training goes on from a step after the one that writes it. start: that step.

    Raises:
        RunError: It is missing or damaged.
    """
    checkpoint = _newest_checkpoint(run)
    if checkpoint is None or checkpoints.step_of(checkpoint) <= start:
        return
    try:
        check_files(run.reference)
    except RunError as error:
        raise RunError(
            f"--resume: {run.reference} is missing or damaged: it was written at step {start}, and "
            f"{checkpoint.name} is after that. Restore the folder, or train again with --force. ({error})"
        ) from error


# --- ends before the last step -----------------------------------------------------------------------------


def resume_command(run: Run) -> str:
    """Return the command that continues a training."""
    return f"qat-edge finetune --resume --out {shlex.quote(str(run.path))}"


def _stopped(run: Run, error: KeyboardInterrupt) -> stop_signals.Stopped:
    """Return the error of a stopped training, whose message has the command that continues it."""
    signum = error.signum if isinstance(error, stop_signals.Stopped) else signal.SIGINT
    name, kept = signal.Signals(signum).name, checkpoints.found(run.checkpoints)
    if (run.path / TRAINING_LOG).is_file() and (run.adapter / MANIFEST).is_file():
        return stop_signals.Stopped(signum, f"Stopped by {name}. {run.path} is as it was.")
    if kept:
        message = f"Stopped by {name}; {kept[0].name} is saved. To continue: {resume_command(run)}"
    elif run.config.is_file():
        message = f"Stopped by {name} before the first checkpoint. To begin again: {resume_command(run)}"
    else:
        message = f"Stopped by {name} before training began; nothing was written."
    return stop_signals.Stopped(signum, message)


def _lost_process(run: Run, error: Exception) -> str:
    """Return the message of a training in which another process has ended."""
    ended = (
        "Another process of this training has ended or cannot be reached; its own message or the launcher's says why "
        f"({shorten(str(error), 200)})"
    )
    if not previous_run.has_checkpoint(run.path):
        return f"{ended}. There is no checkpoint yet: train again."
    return f"{ended}. {checkpoints.found(run.checkpoints)[0].name} is saved. To continue: {resume_command(run)}"


def _report_unfinished(run: Run, error: BaseException) -> None:
    """Report how a training that failed can be continued, and where the run is that it was to replace."""
    can_continue = previous_run.has_checkpoint(run.path)
    # The messages of these say it themselves, or advise against it.
    if (
        can_continue
        and not isinstance(error, ModelError | KeyboardInterrupt)
        and not distributed.is_lost_process(error)
    ):
        progress.info(f"The checkpoints are kept. To continue: {resume_command(run)}")
    previous = run.path / previous_run.PREVIOUS
    if not previous.is_dir():
        return
    if can_continue:
        progress.info(
            f"The earlier run is kept in {previous} until this one is finished. It is a whole run folder: move it "
            "elsewhere to keep it."
        )
    else:
        previous_run.restore(run.path)


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
        given_start=job.start,
        save_reference=lambda: merge.save_weights(adapted, run.reference, "reference", job.metadata, scales=False),
        set_teacher=trainer.set_teacher, reset_optimizer=trainer.reset_optimizer,
    )  # fmt: skip


def _trainer(adapted: PreTrainedModel | PeftModel, job: TrainingJob, options: FinetuneOptions, run: Run) -> QatTrainer:
    """Return the Trainer with the rows, the loss and the options."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "logs")
    arguments = training_arguments(
        options, run.checkpoints, job.device, job.precision, job.task, evaluates=job.eval_rows is not None
    )
    kind = QatTrainer if distributed.count() == 1 else DistributedTrainer
    trainer = kind(
        model=adapted,
        args=arguments,
        data_collator=training_examples.make_collator(job.task, job.tokenizer),
        train_dataset=job.data,
        eval_dataset=None if job.eval_rows is None else job.eval_rows.rows[: options.eval_rows],
    )
    if options.shard_base:
        trainer.shard_base()
    trainer.remove_callback(PrinterCallback)
    trainer.set_objective(objectives.objective_for_task(job.task))
    return trainer
