"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qat_edge.evaluate import metrics
from qat_edge.evaluate.metrics import LogitComparison

RNG = np.random.default_rng(0)


def logits_of(*probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


HALVES = logits_of([0.5, 0.5, 1e-30])
QUARTERS = logits_of([0.75, 0.25, 1e-30])
KL = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # of HALVES and QUARTERS


def test_log_softmax_is_a_distribution_and_does_not_overflow() -> None:
    rows = np.array([[1e4, 1e4, -1e4], [0.0, math.log(3), -np.inf]], np.float32)
    np.testing.assert_allclose(np.exp(metrics.log_softmax(rows)), [[0.5, 0.5, 0], [0.25, 0.75, 0]], atol=1e-7)
    shifted = metrics.log_softmax(rows[1:] + 5)
    np.testing.assert_allclose(np.exp(shifted), [[0.25, 0.75, 0]], atol=1e-7)


def compare(reference: np.ndarray, candidate: np.ndarray) -> metrics.LogitMetrics:
    return metrics.compare(reference, candidate, np.zeros(len(reference), int))


def test_kl_divergence() -> None:
    assert compare(HALVES, QUARTERS).kl_nats == pytest.approx(KL, rel=1e-6)
    assert compare(QUARTERS, HALVES).kl_nats != pytest.approx(KL, rel=1e-2)  # reference first
    assert compare(HALVES, HALVES + 7).kl_nats == pytest.approx(0, abs=1e-6)
    # Small Gaussian disturbance e of uniform logits: KL is var(e) / 2 to second order.
    noise = RNG.normal(0, 0.01, (50, 2000))
    assert compare(np.zeros((50, 2000)), noise).kl_nats == pytest.approx(0.01**2 / 2, rel=0.02)


def test_perplexity() -> None:
    uniform = np.zeros((5, 7))
    assert metrics.compare(uniform, uniform, np.arange(5)).perplexity == pytest.approx(7)
    logits, targets = logits_of([0.5, 0.25, 0.25], [0.2, 0.6, 0.2]), np.array([1, 2])
    found = metrics.compare(logits, logits, targets)
    assert found.perplexity == found.perplexity_reference == pytest.approx(20**0.5)


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    comparison = LogitComparison()
    logits = np.array([[0.0, 2000.0]], np.float32)
    comparison.add(logits, logits, np.array([0]))
    assert comparison.result().perplexity == math.inf


def test_sqnr_db() -> None:
    signal = np.ones((2, 50))
    assert compare(signal, signal * 0.9).sqnr_db == pytest.approx(20)
    assert compare(signal, signal).sqnr_db == math.inf
    assert compare(signal * 0, signal).sqnr_db == -math.inf


def test_top1_agreement() -> None:
    reference = np.eye(4)
    assert compare(reference, reference[[0, 1, 3, 2]]).top1_agreement == 0.5


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2, 3], [1, 4, 3], 1), ([1, 2], [1, 2, 3], 2), ([5], [], 0)],
)
def test_first_divergence(one: list[int], other: list[int], index: int | None) -> None:
    assert metrics.first_divergence(one, other) == index
    assert metrics.first_divergence(other, one) == index


def test_metrics_over_blocks_equal_those_over_everything_at_once() -> None:
    tokens, vocabulary = 2 * metrics.ROWS + 9, 11
    reference = RNG.normal(0, 3, (tokens, vocabulary)).astype(np.float32)
    candidate = reference + RNG.normal(0, 1, reference.shape).astype(np.float32)
    targets = RNG.integers(0, vocabulary, tokens)
    comparison = LogitComparison()
    for part in np.split(np.arange(tokens), [1, 40, 40, 130]):
        comparison.add(reference[part], candidate[part], targets[part])
    found = comparison.result()
    assert found.tokens == tokens
    # The definitions, over everything at once.
    log_p, log_q = metrics.log_softmax(reference), metrics.log_softmax(candidate)
    rows = np.arange(tokens)
    assert found.kl_nats == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(1).mean())
    assert found.top1_agreement == pytest.approx((reference.argmax(1) == candidate.argmax(1)).mean())
    assert found.perplexity == pytest.approx(math.exp(-log_q[rows, targets].mean()))
    assert found.perplexity_reference == pytest.approx(math.exp(-log_p[rows, targets].mean()))
    noise = ((reference - candidate).astype(np.float64) ** 2).sum()
    assert found.sqnr_db == pytest.approx(10 * math.log10((reference.astype(np.float64) ** 2).sum() / noise))
    assert found.kl_nats > 0
    assert 0 < found.top1_agreement < 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "model"])
def test_logits_that_are_not_finite_have_no_figures_and_are_located(value: float, side: str) -> None:
    good = RNG.normal(0, 1, (9, 5)).astype(np.float32)
    bad = good.copy()
    bad[4, 2] = value
    comparison, targets = LogitComparison(), np.zeros(9, int)
    comparison.add(good, good, targets)
    comparison.add(*((bad, good) if side == "reference" else (good, bad)), targets, "sequence 1")
    comparison.add(good, good, targets)
    found = comparison.result()
    assert found.not_finite == f"the {side}'s logits are not finite, first at compared token 4 of sequence 1"
    assert found.tokens == 27
    # Equal rows of nan have equal largest tokens, which must not count as agreement.
    for figure in (found.kl_nats, found.top1_agreement, found.perplexity, found.perplexity_reference, found.sqnr_db):
        assert math.isnan(figure)
    assert compare(good, good).not_finite == ""


def test_a_comparison_needs_tokens_and_matching_shapes() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        LogitComparison().result()
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(3, 6\)"):
        LogitComparison().add(np.zeros((3, 5)), np.zeros((3, 6)), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"targets \(2,\)"):
        LogitComparison().add(np.zeros((3, 5)), np.zeros((3, 5)), np.zeros(2, int))


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ('{"b": 2, "a": [1, null]}\n', ' {"a":[1,null],"b":2}', True),
        ('{"a": 1}', '{"a": 2}', False),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": 1} and more', '{"a": 1}', False),
        ("", '{"a": 1}', False),
        ("[" * 100_000, '{"a": 1}', False),
        ("[1.0]", "[1]", False),
        ("Paris ", "Paris", True),
        ("Paris.", "Paris", False),
        ("07", "7", False),
        ('<tool_call>\n{"b": 1, "a":2}\n</tool_call>', '<tool_call>{"a": 2, "b": 1}</tool_call>', True),
        ('<tool_call>\n{"b": 1, "a":3}\n</tool_call>', '<tool_call>{"a": 2, "b": 1}</tool_call>', False),
        ('Let me see. {"a": 1}', '{"a": 1}', False),
        ('{"a": 1} {"a": 2}', '{"a": 2} {"a": 1}', False),
        ('[CALLS] [{"a": 1}]', '[CALLS][{"a":1}]', True),
        ("a [b] c", "a [b]  c", False),
    ],
)
def test_outputs_match(output: str, expected: str, same: bool) -> None:
    assert metrics.outputs_match(output, expected) is same
