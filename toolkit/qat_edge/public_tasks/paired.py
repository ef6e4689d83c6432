"""Means and differences of scores with bootstrap intervals, on the same questions for both models.

    value     = sum of scores / sum of weights           a share of right answers, or nats per token
    interval  = 2.5% and 97.5% quantiles of the value over resamples of the questions, drawn with replacement

A difference is computed from the differences of each question, so that what the questions have in common (some are hard
for every model) does not widen the interval. Percentile bootstrap: Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qat_edge.errors import RunError
from qat_edge.public_tasks.answer_records import Answered

RESAMPLES = 10_000
SEED = 0
BLOCK = 500  # resamples at once
QUANTILES = (0.025, 0.975)
# With fewer questions that differ, even if all differ in one direction, a sign test has p > 0.05: 2 * 0.5^5 = 0.06.
LEAST_CHANGED = 6


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """The scores of one model minus those of another.

    Attributes:
        interval: The mean difference; for perplexity, of negative log-probabilities in nats per token.
        questions: Number of questions that both answered.
        changed: Number of those with different scores.
    """

    interval: Interval
    questions: int
    changed: int

    @property
    def is_shown(self) -> bool:
        """Return whether the questions show a difference: the interval does not contain zero."""
        outside = self.interval.low > 0 or self.interval.high < 0
        return outside and self.changed >= LEAST_CHANGED


def mean(answers: Sequence[Answered]) -> Interval:
    """Return the weighted mean score."""
    return _bootstrap(np.array([a.score for a in answers]), np.array([a.weight for a in answers]))


def difference(one: Sequence[Answered], other: Sequence[Answered]) -> PairedDifference:
    """Return the scores of `one` minus those of `other`, on the questions that both answered.

    Raises:
        RunError: They have no question in common, or a question has another number of tokens.
    """
    theirs = {(answer.id, answer.digest): answer for answer in other}
    pairs = [(answer, theirs[answer.id, answer.digest]) for answer in one if (answer.id, answer.digest) in theirs]
    if not pairs:
        raise RunError("they have no question in common")
    if any(ours.weight != their.weight for ours, their in pairs):
        raise RunError("their tokenizers split the text differently, so nats per token cannot be compared")
    changes = np.array([ours.score - their.score for ours, their in pairs])
    interval = _bootstrap(changes, np.array([ours.weight for ours, _ in pairs]))
    return PairedDifference(interval, len(pairs), int(np.count_nonzero(changes)))


def _bootstrap(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> Interval:
    """Return the sum of scores over the sum of weights, with its interval."""
    generator = np.random.default_rng(SEED)
    values = []
    for _ in range(RESAMPLES // BLOCK):
        drawn = generator.integers(len(scores), size=(BLOCK, len(scores)))
        values.append(scores[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(values), QUANTILES)
    return Interval(float(scores.sum() / weights.sum()), float(low), float(high))
