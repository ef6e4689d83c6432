"""Record of what the guard of the QAT phase has seen and done, as each checkpoint keeps it in trainer_state.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat_edge.errors import RunError
from qat_edge.readers import read_object
from qat_edge.train import checkpoints

NAME = "QatGuard"  # of the record in trainer_state.json
# Loss above that of the start which counts as divergence: noise of a few rows is well below it. Relative, and in nats.
MARGIN, LEAST_MARGIN = 0.05, 0.02
# Share of the best gain over the start with which the last step is the result. Differences below are noise of a few
# rows, and the last step has seen the most training rows, at the lowest learning rate.
ENOUGH_GAIN = 0.5


@dataclass
class GuardRecord:
    """Measurements and actions of the guard.

    Attributes:
        began: Step after which phase 2 began, or began again; None before it.
        evaluations: "step" and "loss" of each evaluation, in order; the first is the start.
        best_step: Step of the best evaluation.
        above: Evaluations in a row whose loss is above the margin.
        restarts: "step" and "reason" of each restart.
        stopped: "step" and "reason" of the end before the last step; None without one.
        files: sha256 of the file of each step that is needed again.
        is_on: The guard evaluates; off where the start could not be measured.
    """

    began: int | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    above: int = 0
    restarts: list[dict[str, Any]] = field(default_factory=list)
    stopped: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    is_on: bool = True

    @property
    def start(self) -> dict[str, Any]:
        """Return the evaluation at the start of phase 2."""
        return self.evaluations[0]

    @property
    def best(self) -> dict[str, Any]:
        """Return the best evaluation."""
        return next(each for each in self.evaluations if each["step"] == self.best_step)

    def result(self, last_step: int) -> dict[str, Any]:
        """Return the evaluation of the parameters that are the result. last_step: of the whole training."""
        start, best, last = self.start, self.best, self.evaluations[-1]
        # False for a loss that is not a number.
        enough = start["loss"] - last["loss"] >= ENOUGH_GAIN * (start["loss"] - best["loss"])
        return last if last["step"] == last_step and self.stopped is None and enough else best

    @property
    def limit(self) -> float:
        """Return the loss above which an evaluation counts as divergence."""
        loss: float = self.start["loss"]
        return loss + max(MARGIN * loss, LEAST_MARGIN)


def recorded(callbacks: object, where: Path) -> GuardRecord | None:
    """Return the record in the callbacks' part of a trainer_state.json, None where there is none.

    Args:
        callbacks: That part.
        where: The checkpoint, for messages.

    Raises:
        RunError: The record is damaged.
    """
    saved = callbacks.get(NAME) if isinstance(callbacks, dict) else None
    if saved is None:
        return None
    values = saved.get("attributes") if isinstance(saved, dict) else None
    known = {each.name for each in dataclasses.fields(GuardRecord)}
    if isinstance(values, dict) and values.keys() == known and _is_record(GuardRecord(**values)):
        return GuardRecord(**values)
    raise RunError(f"{where}: the record of QatGuard in trainer_state.json is damaged. Train again with --force.")


def _is_record(found: GuardRecord) -> bool:
    """Return whether the entries of a record are as the guard writes them."""
    evaluations, restarts = found.evaluations, found.restarts
    stops = [*restarts, *([found.stopped] if found.stopped else [])] if isinstance(restarts, list) else [None]
    return (
        (found.began is None or _is_step(found.began))
        and isinstance(evaluations, list)
        and all(isinstance(each, dict) and _is_step(each.get("step")) for each in evaluations)
        and all(type(each.get("loss")) is float for each in evaluations)
        and (found.began is not None) == bool(evaluations)
        and (not evaluations or found.best_step in [each["step"] for each in evaluations])
        and all(isinstance(each, dict) and _is_step(each.get("step")) and "reason" in each for each in stops)
        and type(found.above) is int
        and isinstance(found.files, dict)
        and type(found.is_on) is bool
    )


def _is_step(value: object) -> bool:
    return type(value) is int and value >= 0


def ended_early(checkpoint: Path) -> bool:
    """Return whether the guard ended the training at a checkpoint, so that its steps are done.

    Raises:
        RunError: The record is damaged.
    """
    saved = read_object(checkpoint / checkpoints.STATE, RunError, allow_nan=True)
    record = recorded(saved.get("stateful_callbacks"), checkpoint)
    return record is not None and record.stopped is not None
