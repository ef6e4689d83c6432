"""Result of a sweep: what became of every trial, and which differences the evaluation rows show.

Every finished trial has the loss of each row in TRIAL/eval/rows_loss.json, so the best one is compared with each other
one row by row (`public_tasks.paired`). A difference whose 95% interval contains zero is not shown by these rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from qat_edge.errors import RunError
from qat_edge.public_tasks import answer_records, paired
from qat_edge.public_tasks.answering import TORCH
from qat_edge.public_tasks.own_rows import LOSS
from qat_edge.public_tasks.paired import LEAST_CHANGED, PairedDifference
from qat_edge.readers import counted
from qat_edge.run import Run
from qat_edge.train import trial_store
from qat_edge.train.trial_store import TrialStore, folder_of

COMPLETE, PRUNED, FAILED, RUNNING, INTERRUPTED = "complete", "pruned", "failed", "running", "interrupted"
WEIGHTS = ("checkpoints", "adapter", "reference", "start", "quantized")  # parts of a run folder that --keep-all keeps


@dataclass(frozen=True)
class TrialResult:
    """One trial.

    Attributes:
        number: Of the trial, and of its folder.
        state: COMPLETE, PRUNED, FAILED, RUNNING or INTERRUPTED; the values of the last are run again.
        values: The options that were searched.
        score: Loss of the frozen checkpoint, nats per token; None without one.
        seconds: Time of training and scoring; None where it has not ended.
        reason: Why it was pruned, failed or was interrupted; empty for the others.
        has_weights: Its folder still has the weights.
        difference: Losses minus those of the best trial; None for the best one, and without a score.
    """

    number: int
    state: str
    values: dict[str, Any]
    score: float | None = None
    seconds: float | None = None
    reason: str = ""
    has_weights: bool = False
    difference: PairedDifference | None = None

    @property
    def may_equal_best(self) -> bool:
        """Return whether the rows show no difference from the best trial."""
        return self.difference is not None and not self.difference.is_shown


@dataclass(frozen=True)
class SweepResult:
    """Result of the verb: content of SWEEP/sweep.json.

    Attributes:
        folder: Of the sweep.
        model: The model that is trained.
        search: The search space, as --search has it.
        requested: Number of trials.
        rows: Rows that scored each trial.
        tokens: Tokens with a loss in them.
        best: Number of the trial with the lowest loss; None where none is complete.
        as_given: Number of the trial with the values that the options have without a search; None without one.
        trials: All trials.
    """

    folder: Path
    model: str
    search: tuple[str, ...]
    requested: int
    rows: int
    tokens: int
    best: int | None
    as_given: int | None
    trials: list[TrialResult]

    def of(self, number: int) -> TrialResult:
        """Return a trial by its number."""
        return next(trial for trial in self.trials if trial.number == number)

    def count(self, *states: str) -> int:
        """Return how many trials are in one of these states."""
        return sum(trial.state in states for trial in self.trials)

    @property
    def finished(self) -> int:
        """Number of trials that need not be run again."""
        return self.count(COMPLETE, PRUNED, FAILED)

    @property
    def ranked(self) -> list[TrialResult]:
        """Complete trials, the lowest loss first."""
        complete = [trial for trial in self.trials if trial.score is not None]
        return sorted(complete, key=lambda trial: (trial.score or 0.0, trial.number))

    def accounts(self) -> str:
        """Return what became of the trials: "12 of 20 trials: 9 complete, 2 pruned, 1 failed"."""
        states = [f"{self.count(state)} {state}" for state in (COMPLETE, PRUNED, FAILED, RUNNING) if self.count(state)]
        return f"{self.finished} of {counted(self.requested, 'trial')}" + (f": {', '.join(states)}" if states else "")

    def verdict(self) -> list[str]:
        """Return sentences on the best trial, and on what the evaluation rows do not show."""
        if self.best is None:
            return ["No trial is complete, so there is no best one."]
        best, sized = self.of(self.best), f"{counted(self.rows, 'row')} ({counted(self.tokens, 'token')})"
        sentences = [f"Trial {best.number} has the lowest loss, {best.score:.4f} nats per token on {sized}."]
        if self.as_given == self.best:
            sentences.append("Its values are those that the options have without a search.")
        elif self.as_given is not None and (given := self.of(self.as_given)).difference is not None:
            sentences.append(_compared_with_given(given))
        equal = [trial for trial in self.ranked if trial.may_equal_best]
        others = [trial for trial in equal if trial.number != self.as_given]
        if others:
            sentences.append(
                f"These rows do not tell it from {_listed(others)}: the 95% interval of the difference contains zero, "
                f"or fewer than {LEAST_CHANGED} rows differ. Do not take it for the better one; more rows may tell."
            )
        elif not equal and len(self.ranked) > 1:
            sentences.append("Its difference from every other trial is above the noise of these rows.")
        if len(self.ranked) > 1:
            sentences.append(
                "The lowest of several losses on the same rows is too low on average: measure it on other rows before "
                "you quote it."
            )
        return sentences


def summarize(
    store: TrialStore,
    folder: Path,
    model: str,
    search: Sequence[str],
    requested: int,
    as_given: Mapping[str, Any] | None,
) -> SweepResult:
    """Return the present result of a sweep.

    Args:
        store: Its trials.
        folder: Of the sweep.
        model: The model that is trained.
        search: The search space as text.
        requested: Number of trials.
        as_given: Values that the options have without a search; None where the space does not contain them.
    """
    found = [trial for trial in store.trials() if trial.params and _state(trial) is not None]
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE and trial.value is not None]
    best = min(complete, key=lambda trial: (trial.value, trial.number), default=None)
    answers = {trial.number: _answers(folder, trial.number) for trial in complete}

    differences = {
        trial.number: paired.difference(answers[trial.number], answers[best.number])
        for trial in complete
        if best is not None and trial.number != best.number
    }
    # Of several, the last: an interrupted one was run again.
    given = [trial.number for trial in found if as_given is not None and trial.params == as_given]
    return SweepResult(
        folder=folder,
        model=model,
        search=tuple(search),
        requested=requested,
        rows=0 if best is None else len(answers[best.number]),
        tokens=0 if best is None else best.user_attrs[trial_store.TOKENS],
        best=None if best is None else best.number,
        as_given=given[-1] if given else None,
        trials=[_result(trial, folder, differences.get(trial.number)) for trial in found],
    )


def _result(trial: FrozenTrial, folder: Path, difference: PairedDifference | None) -> TrialResult:
    run = folder_of(folder, trial.number)
    is_complete = trial.state == TrialState.COMPLETE
    return TrialResult(
        number=trial.number,
        state=_state(trial) or "",
        values=dict(trial.params),
        score=trial.value if is_complete else None,
        seconds=trial.user_attrs.get(trial_store.SECONDS),
        reason=_reason(trial),
        has_weights=any((run / part).exists() for part in WEIGHTS),
        difference=difference,
    )


def _state(trial: FrozenTrial) -> str | None:
    """Return the state of a trial in our words; None for one that never was to be run."""
    if trial.state == TrialState.FAIL:
        outcomes = {trial_store.FAILED: FAILED, trial_store.INTERRUPTED: INTERRUPTED}
        return outcomes.get(trial_store.outcome_of(trial))
    return {TrialState.COMPLETE: COMPLETE, TrialState.PRUNED: PRUNED, TrialState.RUNNING: RUNNING}.get(trial.state)


def _reason(trial: FrozenTrial) -> str:
    """Return why a trial has no score; empty for one that has, or may get one."""
    attempts = trial.user_attrs.get(trial_store.ATTEMPT, 1)
    killed = "its process ended" + (f" {attempts} times" if _state(trial) == FAILED else "")
    reason: str = trial.user_attrs.get(trial_store.REASON, killed if trial.state == TrialState.FAIL else "")
    return reason


def _answers(folder: Path, number: int) -> list[answer_records.Answered]:
    """Return the loss of each row of a trial.

    Raises:
        RunError: They are missing or damaged.
    """
    path = Run(folder_of(folder, number)).evaluations / f"{LOSS}.json"
    try:
        return answer_records.read(path).sources[TORCH].answers
    except (RunError, KeyError) as error:
        raise RunError(f"{path}: the losses of trial {number} cannot be read ({error}) Restore the file.") from error


def _compared_with_given(trial: TrialResult) -> str:
    """Return a sentence on the difference between the best trial and the one with the options as given."""
    assert trial.difference is not None
    interval = trial.difference.interval
    figures = f"{interval.value:.4f} (95% interval {interval.low:.4f} to {interval.high:.4f})"
    name = f"trial {trial.number}, with the options as they were given"
    if trial.difference.is_shown:
        return f"It is {figures} below {name}."
    return f"These rows show no difference from {name}: {figures}."


def _listed(trials: Sequence[TrialResult], most: int = 8) -> str:
    numbers = [str(trial.number) for trial in trials[:most]]
    more = f" and {len(trials) - most} more" if len(trials) > most else ""
    return f"trial{'s' if len(trials) > 1 else ''} {', '.join(numbers)}{more}"
