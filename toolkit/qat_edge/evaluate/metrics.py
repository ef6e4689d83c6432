"""Metrics of a model's logits compared with a reference's. Pure numpy, in float64.

    KL(p || q) = sum_v p_v (log p_v - log q_v)     p the reference's, q the candidate's; nats, mean over tokens
    perplexity = exp(mean of -log p(target))
    SQNR       = 10 log10(sum r^2 / sum (r - c)^2) over all logits, dB

One token is one row of logits (tokens, vocabulary); its target is the id that follows it in the text. Where a row of
either side is not finite, no figure has a meaning: all of them are nan, and `LogitMetrics.not_finite` says where.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

JSON_START = re.compile(r"[\[{]")
ROWS = 64  # converted to float64 at once: 64 rows of a 152k vocabulary are 78 MB

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LogitMetrics:
    """Metrics of a candidate's logits.

    Attributes:
        kl_nats: mean KL(reference || candidate) per token, in nats.
        top1_agreement: share of tokens for which both rank the same token first, 0 to 1.
        perplexity_reference: of the reference.
        perplexity: of the candidate.
        sqnr_db: signal-to-quantization-noise ratio in dB; infinite where the logits are equal.
        tokens: number of compared tokens.
        not_finite: which logits are not finite and where they begin, as a phrase; empty where all are finite.
    """

    kl_nats: float
    top1_agreement: float
    perplexity_reference: float
    perplexity: float
    sqnr_db: float
    tokens: int
    not_finite: str = ""


class LogitComparison:
    """Accumulates the metrics over blocks of tokens, so that only one block of logits is in memory."""

    def __init__(self) -> None:
        self._tokens = 0
        self._agreeing = 0
        self._kl = 0.0
        self._nll_reference = 0.0
        self._nll = 0.0
        self._signal = 0.0
        self._noise = 0.0
        self._not_finite = ""

    def add(
        self, reference: Logits, candidate: Logits, targets: NDArray[np.integer[Any]], name: str = "the logits"
    ) -> None:
        """Add one block.

        Args:
            reference: logits (tokens, vocabulary).
            candidate: logits of the same shape.
            targets: ids of the next tokens, (tokens,).
            name: of the block, for the position of logits that are not finite.
        """
        if reference.ndim != 2 or reference.shape != candidate.shape or targets.shape != reference.shape[:1]:
            raise ValueError(
                f"logits {reference.shape} and {candidate.shape} with targets {targets.shape}: expected twice "
                "(tokens, vocabulary) and (tokens,)"
            )
        for side, logits in (("reference", reference), ("model", candidate)):
            row = first_not_finite(logits)
            if row is not None and not self._not_finite:
                self._not_finite = f"the {side}'s logits are not finite, first at compared token {row} of {name}"
        if self._not_finite:
            self._tokens += len(targets)
            return

        for start in range(0, len(targets), ROWS):
            rows = slice(start, start + ROWS)
            self._add(reference[rows].astype(np.float64), candidate[rows].astype(np.float64), targets[rows])

    def result(self) -> LogitMetrics:
        """Return the metrics over everything added.

        Raises:
            ValueError: nothing was added.
        """
        if self._tokens == 0:
            raise ValueError("no tokens were compared")
        if self._not_finite:
            nan = math.nan
            return LogitMetrics(nan, nan, nan, nan, nan, self._tokens, self._not_finite)
        return LogitMetrics(
            kl_nats=self._kl / self._tokens,
            top1_agreement=self._agreeing / self._tokens,
            perplexity_reference=perplexity(self._nll_reference / self._tokens),
            perplexity=perplexity(self._nll / self._tokens),
            sqnr_db=_decibels(self._signal, self._noise),
            tokens=self._tokens,
        )

    def _add(self, reference: Logits, candidate: Logits, targets: NDArray[np.integer[Any]]) -> None:
        # Sums, not means, so that blocks of any length can be added.
        log_p, log_q = log_softmax(reference), log_softmax(candidate)
        at_targets = np.arange(len(targets)), targets
        self._tokens += len(targets)
        self._agreeing += int((reference.argmax(1) == candidate.argmax(1)).sum())
        self._kl += float(_kl_by_token(log_p, log_q).sum())
        self._nll_reference -= float(log_p[at_targets].sum())
        self._nll -= float(log_q[at_targets].sum())
        self._signal += float((reference**2).sum())
        self._noise += float(((reference - candidate) ** 2).sum())


def first_not_finite(logits: Logits) -> int | None:
    """Return the index of the first row with a number that is not finite, or None."""
    finite = np.isfinite(logits).all(axis=-1)
    return None if finite.all() else int(finite.argmin())


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return the log probabilities along the last axis, without overflow."""
    # exp of a positive number may overflow: the largest logit of each row becomes 0.
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(reference: Logits, candidate: Logits, targets: NDArray[np.integer[Any]]) -> LogitMetrics:
    """Return the metrics of one block; see `LogitComparison.add`."""
    comparison = LogitComparison()
    comparison.add(reference, candidate, targets)
    return comparison.result()


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the index of the first token that differs or that only one of them has; None if they are equal."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def outputs_match(output: str, expected: str) -> bool:
    """Compare a generated text with the expected one: objects and lists of JSON in it by value, the rest as text."""
    output, expected = output.strip(), expected.strip()
    if output == expected:
        return True
    # Models differ in white space and key order, which do not change the meaning of a tool call.
    wanted = _parts(expected)
    return any(is_json for is_json, _ in wanted) and _parts(output) == wanted


def _parts(text: str) -> list[tuple[bool, str]]:
    """Split a text into objects and lists of JSON, serialized, and the texts around them, stripped.

    Returns:
        Pairs of "is JSON" and the part. Texts of white space are left out.
    """
    parts, end = [], 0
    for found in json_in_text(text):
        parts += [(False, text[end : found.start].strip()), (True, _canonical(found.value))]
        end = found.end
    parts.append((False, text[end:].strip()))
    return [(is_json, part) for is_json, part in parts if part]


class JsonInText(NamedTuple):
    """An object or list of JSON between other text: its value, and where it begins and ends."""

    value: Any
    start: int
    end: int


def json_in_text(text: str) -> Iterator[JsonInText]:
    """Yield the outermost objects and lists of JSON in a text, in order."""
    decoder, position = json.JSONDecoder(), 0
    while found := JSON_START.search(text, position):
        try:
            value, position = decoder.raw_decode(text, found.start())
        except RecursionError:
            return  # no model means this
        except ValueError:
            position = found.end()  # a bracket of the text
            continue
        yield JsonInText(value, found.start(), position)


def _canonical(value: Any) -> str:
    """Serialize JSON so that key order does not matter but 1, 1.0 and true differ, which are equal for Python's ==."""
    return json.dumps(value, sort_keys=True)


def _kl_by_token(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(p || q) of each token. Where p is 0 the term is 0, whatever q is."""
    p = np.exp(log_p)
    terms = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=p > 0)
    return np.asarray((p * terms).sum(axis=-1))


def perplexity(loss_nats: float) -> float:
    """Return exp(loss), infinity where that is beyond a float: math.exp raises an error."""
    try:
        return math.exp(loss_nats)
    except OverflowError:
        return math.inf


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
