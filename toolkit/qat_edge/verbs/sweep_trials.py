"""One trial of a sweep: train into a run folder, freeze, and measure the loss of the frozen checkpoint.

The score is the loss of the function that ships: `eval --task rows_loss` on the frozen checkpoint, not the loss that
training reports, which may be that of other parameters (`train.qat_guard`) on fewer rows.

A trial is pruned by its loss in phase 1 only. From the start of QAT on, the loss is that of a rounded model, and trials
with another --qat-start are not rounded yet at the same step.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from optuna.trial import Trial
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qat_edge import progress, storage
from qat_edge.errors import ModelError, QatEdgeError
from qat_edge.manifest import read_manifest
from qat_edge.options import EvalOptions, FinetuneOptions, QuantizeOptions, SweepOptions
from qat_edge.public_tasks import answer_records
from qat_edge.public_tasks.answering import TORCH
from qat_edge.public_tasks.own_rows import LOSS
from qat_edge.run import Run
from qat_edge.train import trial_store
from qat_edge.train.search_space import describe, with_values
from qat_edge.train.trial_store import TrialStore, folder_of
from qat_edge.verbs.eval import evaluate
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize


class Score(NamedTuple):
    """Loss of a frozen checkpoint. loss: nats per token; tokens: with a loss in training."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class TrialReporter:
    """Passes warnings and progress of a trial on, with its number, and drops its other lines: a sweep has many."""

    number: int
    inner: progress.Reporter

    def info(self, text: str) -> None:
        """Drop a line."""

    def warn(self, text: str) -> None:
        """Pass on "trial 3: text"."""
        self.inner.warn(f"trial {self.number}: {text.strip()}")

    def progress(self, title: str, total: int) -> contextlib.AbstractContextManager[progress.Bar]:
        """Pass on a bar, "trial 3: title"."""
        return self.inner.progress(f"trial {self.number}: {title}", total)


class PruneByLoss(TrainerCallback):
    """Reports the loss of each evaluation in phase 1 to Optuna, and ends the training where it prunes the trial.

    Attributes:
        trial: The trial.
        start: Last step of phase 1.
    """

    def __init__(self, trial: Trial, start: int) -> None:
        self.trial, self.start = trial, start

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Report a loss.

        Raises:
            TrialPruned: The trial ends here.
        """
        if state.global_step > self.start:
            return
        loss = metrics["eval_loss"]
        self.trial.report(loss, state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"loss {loss:.4f} in phase 1, at step {state.global_step}")


def run_trial(
    store: TrialStore, trial: Trial, folder: Path, options: FinetuneOptions, sweep: SweepOptions, prunes: bool
) -> None:
    """Train and score a trial, and record what became of it.

    Args:
        store: Trials of the sweep.
        trial: The trial, which has begun.
        folder: Of the sweep.
        options: Of finetune, without the trial's values.
        sweep: Options of the sweep.
        prunes: Whether the trial may be pruned.

    Raises:
        QatEdgeError: Something is wrong with more than these values; the trial is run again once the sweep goes on.
        KeyboardInterrupt: A signal came; the same holds.
    """
    began = time.monotonic()
    progress.info(f"trial {trial.number}: {describe(trial.params)}")
    try:
        with progress.report_to(TrialReporter(trial.number, progress.current())):
            score = _train_and_measure(trial, folder, options, sweep, prunes)
        store.complete(trial, score.loss, score.tokens, time.monotonic() - began)
        progress.info(f"trial {trial.number}: loss {score.loss:.4f}, {time.monotonic() - began:.0f} s")
    except optuna.TrialPruned as pruned:
        store.end(trial, str(pruned), time.monotonic() - began, is_pruned=True)
        progress.info(f"trial {trial.number}: pruned, {pruned}")
    except KeyboardInterrupt:
        store.interrupt(trial, "stopped")
        raise
    except (QatEdgeError, MemoryError, torch.OutOfMemoryError) as error:
        reason, is_of_training = _first_sentence(error), Run(folder_of(folder, trial.number)).config.is_file()
        # Before training began, it was not these values that failed; nor is it their fault if a file cannot be written.
        if not is_of_training or (isinstance(error, QatEdgeError) and not isinstance(error, ModelError)):
            store.interrupt(trial, reason, is_fault=True)
            raise
        store.end(trial, reason, time.monotonic() - began)
        progress.warn(f"trial {trial.number} failed: {reason}")
    finally:
        _free_memory()


def _train_and_measure(
    trial: Trial, folder: Path, options: FinetuneOptions, sweep: SweepOptions, prunes: bool
) -> Score:
    """Train with the values of a trial, or continue an interrupted training, and return the loss.

    Raises:
        TrialPruned: The training was ended by its loss.
    """
    _take_over(folder, trial)
    run, own = Run(folder_of(folder, trial.number)), with_values(options, trial.params)
    callbacks = [PruneByLoss(trial, own.qat_start_step)] if prunes else []
    finetune(own, run.path, resume=run.config.is_file(), callbacks=callbacks)
    return measure(run, options, sweep)


def measure(run: Run, options: FinetuneOptions, sweep: SweepOptions) -> Score:
    """Freeze the model of a run and return its loss on the evaluation rows.

    Args:
        run: A finished training.
        options: Of finetune, without the trial's values: every trial is scored on the same tokens.
        sweep: Options of the sweep.
    """
    quantize(run, QuantizeOptions())
    positions = read_manifest(run.adapter)["max_position_embeddings"]
    length = options.max_length if positions is None else min(options.max_length, positions)
    evaluated = evaluate(run, EvalOptions(task=LOSS, limit=sweep.score_rows, context_length=max(length, 16)))
    answers = answer_records.read(evaluated.path).sources[TORCH].answers
    return Score(evaluated.scores[0].score.value, round(sum(answer.weight for answer in answers)))


def _take_over(folder: Path, trial: Trial) -> None:
    """Give a trial the folder of the interrupted one that it continues, with its checkpoints."""
    earlier = trial.user_attrs.get(trial_store.CONTINUES)
    if earlier is not None and folder_of(folder, earlier).is_dir() and not folder_of(folder, trial.number).exists():
        storage.rename(folder_of(folder, earlier), folder_of(folder, trial.number))


def _first_sentence(error: BaseException) -> str:
    """Return the reason of a failure on one line, without the advice that follows it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].removesuffix(".")


def _free_memory() -> None:
    """Free what a trial held: the next one needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
