"""How far a model's outputs lie from the reference's. Pure numpy: formulas in float64, inputs as runtimes give them.

    KL(p || q) = sum_v p_v (log p_v - log q_v)     p the reference's, q the candidate's; nats, mean over tokens
    perplexity = exp(mean of -log p(target))
    SQNR       = 10 log10(sum r^2 / sum (r - c)^2) over all logits, dB

One token is one row of logits (tokens, vocabulary), its target the id that follows it in the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 64  # taken to float64 at once: 64 rows of a 152k vocabulary are 78 MB

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Comparison:
    """A candidate's logits against the reference's, over `tokens` rows."""

    kl_nats: float
    top1_agreement: float  # 0 to 1
    perplexity_reference: float
    perplexity: float
    sqnr_db: float  # infinite where equal
    tokens: int


class LogitComparison:
    """Sums over blocks of tokens, so that no more than one block of logits is ever held."""

    def __init__(self) -> None:
        self._tokens = 0
        self._agreeing = 0
        self._kl = 0.0
        self._nll_reference = 0.0
        self._nll = 0.0
        self._signal = 0.0
        self._noise = 0.0

    def add(self, reference: Logits, candidate: Logits, targets: NDArray[np.integer[Any]]) -> None:
        """Take in one block: two (tokens, vocabulary) arrays and the (tokens,) ids that came next."""
        if reference.ndim != 2 or reference.shape != candidate.shape or targets.shape != reference.shape[:1]:
            raise ValueError(
                f"logits {reference.shape} and {candidate.shape} with targets {targets.shape}: expected twice "
                "(tokens, vocabulary) and (tokens,)"
            )
        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            self._add(reference[rows].astype(np.float64), candidate[rows].astype(np.float64), targets[rows])

    def result(self) -> Comparison:
        """Means over everything added.

        Raises:
            ValueError: nothing was added.
        """
        if self._tokens == 0:
            raise ValueError("no tokens were compared")
        return Comparison(
            kl_nats=self._kl / self._tokens,
            top1_agreement=self._agreeing / self._tokens,
            perplexity_reference=math.exp(self._nll_reference / self._tokens),
            perplexity=math.exp(self._nll / self._tokens),
            sqnr_db=_decibels(self._signal, self._noise),
            tokens=self._tokens,
        )

    def _add(self, reference: Logits, candidate: Logits, targets: NDArray[np.integer[Any]]) -> None:
        log_p, log_q = log_softmax(reference), log_softmax(candidate)
        places = np.arange(len(targets)), targets
        self._tokens += len(targets)
        self._agreeing += int((reference.argmax(1) == candidate.argmax(1)).sum())
        self._kl += float(_divergence(log_p, log_q).sum())
        self._nll_reference -= float(log_p[places].sum())
        self._nll -= float(log_q[places].sum())
        self._signal += float((reference**2).sum())
        self._noise += float(((reference - candidate) ** 2).sum())


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Logarithm of the probabilities along the last axis, without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(reference: Logits, candidate: Logits, targets: NDArray[np.integer[Any]]) -> Comparison:
    """One block compared: (tokens, vocabulary) twice, and the (tokens,) ids that came next."""
    comparison = LogitComparison()
    comparison.add(reference, candidate, targets)
    return comparison.result()


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs or that only one of them has; None where they are equal."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def same_answer(answer: str, expected: str) -> bool:
    """Whether two answers say the same: as parsed JSON where the expected one is an object or a list, else as text."""
    answer, expected = answer.strip(), expected.strip()
    try:
        wanted = json.loads(expected)
        if isinstance(wanted, dict | list):
            return _canonical(json.loads(answer)) == _canonical(wanted)
    except (ValueError, RecursionError):
        pass  # one of them is no JSON: only equal text is the same
    return answer == expected


def _canonical(value: Any) -> str:
    """Text that tells 1, 1.0 and true apart, which Python's == does not; the order of keys means nothing."""
    return json.dumps(value, sort_keys=True)


def _divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) by token. A choice that p rules out adds nothing, whatever q thinks of it."""
    p = np.exp(log_p)
    terms = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=p > 0)
    return np.asarray((p * terms).sum(axis=-1))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
