"""SWEEP/study.db: the values of each trial of a sweep, and what became of it. Optuna chooses values and stores trials.

Several processes may work on one sweep. A trial begins and ends under a lock, so no two processes begin the same one.
Whoever begins a trial first looks for those whose process is gone: they count as failed, and their values are queued to
be run again.

The sampler is made anew for each trial, from the seed and the number of trials before it: with one worker, a sweep that
was stopped goes on with the values that it would have had.

TPE: Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011
Successive halving: Li et al., https://arxiv.org/abs/1810.05934
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from qat_edge import storage
from qat_edge.errors import RunError
from qat_edge.train.search_space import SearchedOption, Space, combinations

STUDY, LOCK, NAME = "study.db", ".study.lock", "sweep"
WAIT_S = 60.0  # for another process that writes
MOST_ATTEMPTS = 3  # of values whose process is killed, or ends with an error

# Attributes of a trial, in the database.
PROCESS, OUTCOME, REASON = "process", "outcome", "reason"
SECONDS, TOKENS, CONTINUES, ATTEMPT = "seconds", "tokens", "continues", "attempt"
# Outcomes of trials that Optuna knows as failed. KILLED is in force from the beginning of a trial.
KILLED, INTERRUPTED, REPEATED, FAILED = "killed", "interrupted", "repeated", "failed"


class TrialStore:
    """Trials of a sweep.

    Attributes:
        study: Optuna's study.
        space: The options that are searched.
        seed: Of the sampler.
    """

    def __init__(self, folder: Path, space: Space, seed: int, pruner: str, eval_every: int) -> None:
        """Open the database of a sweep; it is made where it is missing.

        Raises:
            RunError: It is damaged, or of another version of Optuna.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.seed = space, seed
        self._folder = folder
        self._distributions = {option.name: _distribution(option) for option in space}
        with self.locked():
            self.study = _open(folder / STUDY, _pruner(pruner, eval_every))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from beginning and ending trials inside the block. It may be entered again.

        Raises:
            RunError: The database cannot be read or written.
        """
        try:
            with storage.disk_errors(self._folder), filelock.FileLock(self._folder / LOCK, is_singleton=True):
                yield
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"{self._folder / STUDY}: cannot be read or written ({reason}). Go on with --resume."
            ) from error

    def queue(self, values: Mapping[str, Any]) -> None:
        """Let the next trial have these values."""
        self.study.enqueue_trial(dict(values))

    def begin(self, most: int) -> Trial | None:
        """Begin a trial; return None where there are `most` of them, or no combination of values is left."""
        with self.locked():
            self._queue_interrupted()
            trials = self.trials()
            count = sum(map(counts, trials))
            if count >= most:
                return None
            seed = int(np.random.SeedSequence([self.seed, count]).generate_state(1)[0])
            self.study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = self._asked(trials, most, random.Random(seed))
            if trial is not None:
                trial.set_user_attr(OUTCOME, KILLED)
                trial.set_user_attr(PROCESS, [platform.node(), os.getpid(), storage.own_start_s()])
            return trial

    def complete(self, trial: Trial, score: float, tokens: int, seconds: float) -> None:
        """Record the score of a trial."""
        with self.locked():
            trial.set_user_attr(TOKENS, tokens)
            trial.set_user_attr(SECONDS, seconds)
            self.study.tell(trial, score)

    def end(self, trial: Trial, reason: str, seconds: float, is_pruned: bool = False) -> None:
        """Record a trial that was pruned, or that failed."""
        with self.locked():
            trial.set_user_attr(REASON, reason)
            trial.set_user_attr(SECONDS, seconds)
            if not is_pruned:
                trial.set_user_attr(OUTCOME, FAILED)
            self.study.tell(trial, state=TrialState.PRUNED if is_pruned else TrialState.FAIL)

    def interrupt(self, trial: Trial, reason: str, is_fault: bool = False) -> None:
        """Record that a trial ended too early, and let another one go on with its values.

        Args:
            trial: The trial.
            reason: Why it ended.
            is_fault: It was an error: after `MOST_ATTEMPTS` of them, the values are not run again.
        """
        attempt = trial.user_attrs.get(ATTEMPT, 1) + is_fault
        with self.locked():
            trial.set_user_attr(REASON, reason)
            trial.set_user_attr(OUTCOME, INTERRUPTED if attempt <= MOST_ATTEMPTS else FAILED)
            self.study.tell(trial, state=TrialState.FAIL)
            self._queue_again(trial.number, trial.params, attempt)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    # --- steps they share ----------------------------------------------------------------------------------

    def _queue_interrupted(self) -> None:
        """Let the values of trials whose process is gone be run again."""
        for trial in self.trials():
            if trial.state != TrialState.RUNNING or _is_alive(trial.user_attrs.get(PROCESS)):
                continue
            self.study.tell(trial.number, state=TrialState.FAIL)
            if trial.user_attrs.get(OUTCOME) == KILLED:
                self._queue_again(trial.number, trial.params, trial.user_attrs.get(ATTEMPT, 1) + 1)

    def _queue_again(self, number: int, values: Mapping[str, Any], attempt: int) -> None:
        """Queue the values of a trial. attempt: the number of this one."""
        if attempt <= MOST_ATTEMPTS:
            self.study.enqueue_trial(dict(values), user_attrs={CONTINUES: number, ATTEMPT: attempt})

    def _asked(self, trials: Sequence[FrozenTrial], most: int, generator: random.Random) -> Trial | None:
        """Return a new trial, of values that were not tried before where all of them can be listed."""
        whole = combinations(self.space)
        if whole is None:
            return self.study.ask(self._distributions)
        tried = [trial.params for trial in trials if counts(trial)]
        untried = [values for values in whole if values not in tried]
        if not untried:
            return None
        # Where every combination will be tried, there is nothing to sample.
        if len(whole) <= most and not any(trial.state == TrialState.WAITING for trial in trials):
            self.study.enqueue_trial(generator.choice(untried))
        trial = self.study.ask(self._distributions)
        if trial.params in untried:
            return trial
        trial.set_user_attr(OUTCOME, REPEATED)
        self.study.tell(trial, state=TrialState.FAIL)
        self.study.enqueue_trial(generator.choice(untried))
        return self.study.ask(self._distributions)


def outcome_of(trial: FrozenTrial) -> str:
    """Return the outcome of a trial that Optuna knows as failed: INTERRUPTED, REPEATED or FAILED."""
    found: str = trial.user_attrs.get(OUTCOME, REPEATED)  # without one, it was killed before it began
    if found != KILLED:
        return found
    return FAILED if trial.user_attrs.get(ATTEMPT, 1) >= MOST_ATTEMPTS else INTERRUPTED


def counts(trial: FrozenTrial) -> bool:
    """Return whether a trial is one of those that were requested: not if it was interrupted or repeats another."""
    if trial.state == TrialState.FAIL:
        return outcome_of(trial) == FAILED
    return trial.state != TrialState.WAITING


def folder_of(sweep: Path, number: int) -> Path:
    """Return the run folder of a trial."""
    return sweep / "trials" / f"{number:03}"


def _open(path: Path, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """Open a database.

    Raises:
        RunError: It cannot be read.
    """
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    try:
        database = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": WAIT_S}})
        return optuna.create_study(study_name=NAME, storage=database, pruner=pruner, load_if_exists=True)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise RunError(
            f"{path}: cannot be used as the trials of a sweep ({reason}). Restore the file, or begin another sweep."
        ) from error


def _distribution(option: SearchedOption) -> BaseDistribution:
    """Return the values of an option as Optuna has them."""
    if option.choices:
        return CategoricalDistribution(option.choices)
    if option.is_integer:
        return IntDistribution(int(option.low), int(option.high), log=option.log)
    return FloatDistribution(option.low, option.high, log=option.log)


def _pruner(name: str, eval_every: int) -> optuna.pruners.BasePruner:
    if name == "median":
        return optuna.pruners.MedianPruner()
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=eval_every)
    return optuna.pruners.NopPruner()


def _is_alive(process: Sequence[Any] | None) -> bool:
    """Return whether the process of a trial still runs; True for one of another machine, which cannot be looked up."""
    if process is None:
        return False
    host, pid, started_s = process
    return host != platform.node() or storage.is_running(pid, started_s)
