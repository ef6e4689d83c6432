"""Arithmetic of the error budget, on synthetic logits. The budget of real artifacts is tested in test_line.py."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose.error_budget import (
    DEVICE,
    FROZEN,
    HOST,
    TRAINED,
    TorchBudget,
    budget,
    compare,
    score_on_this_machine,
)
from qat_edge.diagnose.runtime_rounding import BLOCKS, Rounding
from qat_edge.evaluate import metrics
from qat_edge.evaluate.evaluator import EvalSet, Evaluator
from qat_edge.evaluate.reference import LogitStore
from qat_edge.evaluate.results import FaultTest, Step
from qat_edge.options import ValidateOptions
from qat_edge.run import Run
from qat_edge_devices.device_errors import KilledError

VOCABULARY = 16
SEQUENCES = [ScoredIds(list(range(begin, begin + 6)), [1, 2, 4]) for begin in range(8)]
NO_FAULT = FaultTest(False, 0.5, None, "")
PHONE = "ssh:phone"


def logits(seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(3, VOCABULARY)).astype(np.float32) for _ in SEQUENCES]


def fill(store: LogitStore, seed: int) -> None:
    for index, rows in enumerate(logits(seed)):
        store.put(index, rows)


def between(one: int, other: int) -> metrics.LogitMetrics:
    """Metrics of the logits of seed `other` compared with those of seed `one`."""
    targets = np.concatenate([sequence.targets for sequence in SEQUENCES])
    return metrics.compare(np.concatenate(logits(one)), np.concatenate(logits(other)), targets)


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    """Logits of seed 0 for the FP32 fine-tune and of seed 1 for the frozen checkpoint."""
    made = Evaluator(EvalSet(SEQUENCES, [], [0], 0, None), ValidateOptions(), tmp_path)
    fill(made.fp32_logits, 0)
    fill(made.frozen_logits, 1)
    return made


def torch_budget(**more: Any) -> TorchBudget:
    steps = [Step(name, 2.0, None, None) for name in ("FP32 base", "FP32 fine-tuned", TRAINED, FROZEN)]
    values: dict[str, Any] = {
        "prompts": [], "expected": {}, "parts": [], "floor": [], "floor_nats": [], "roundings": {}, "rounded": {},
    }  # fmt: skip
    return TorchBudget(steps=steps, frozen_divergence="", **values | more)


@pytest.mark.parametrize(
    ("measured_here", "names", "before"),
    [(True, [HOST, DEVICE], [1, 2]), (False, [DEVICE], [1])],  # this machine may have failed where the phone did not
)
def test_each_step_is_compared_with_the_previous_one(
    evaluator: Evaluator, measured_here: bool, names: list[str], before: list[int]
) -> None:
    if measured_here:
        fill(evaluator.artifact_logits("local", "executorch"), 2)
    fill(evaluator.artifact_logits(PHONE, "executorch"), 3)
    steps = budget(evaluator, torch_budget(), "executorch", PHONE, NO_FAULT).steps[4:]
    assert [step.name for step in steps] == names
    for step, earlier, now in zip(steps, before, [2, 3][-len(names) :], strict=True):
        assert step.change is not None and step.agreement is not None
        assert step.change.kl_nats == pytest.approx(between(earlier, now).kl_nats)
        assert step.agreement.kl_nats == pytest.approx(between(0, now).kl_nats)
        assert step.perplexity == pytest.approx(between(0, now).perplexity)


def test_an_artifact_that_fails_on_this_machine_is_left_out(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    def fail_after_one(self: Evaluator, *_: object) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, logits(2)[0]
        raise KilledError("local: ended by SIGKILL")

    monkeypatch.setattr(Evaluator, "score_artifact", fail_after_one)
    score_on_this_machine(Run(tmp_path), evaluator, ["executorch"])
    assert "left out of the error budget: local: ended by SIGKILL" in messages[-1]
    fill(evaluator.artifact_logits(PHONE, "executorch"), 3)
    steps = budget(evaluator, torch_budget(), "executorch", PHONE, NO_FAULT).steps[4:]
    assert [step.name for step in steps] == [DEVICE], "one sequence of eight is no step"


def test_rounding_that_only_the_runtime_does_is_a_step_of_its_own(evaluator: Evaluator, tmp_path: Path) -> None:
    rounded = LogitStore(tmp_path / "rounded")
    fill(rounded, 4)
    fill(evaluator.artifact_logits("local", "onnx"), 2)
    torch = torch_budget(roundings={"onnx": Rounding(BLOCKS)}, rounded={"onnx": rounded})
    steps = {step.name: step for step in budget(evaluator, torch, "onnx", "local", NO_FAULT).steps[4:]}
    assert list(steps) == [BLOCKS, HOST]
    assert steps[HOST].change is not None
    assert steps[HOST].change.kl_nats == pytest.approx(between(4, 2).kl_nats)
    nats = math.log(between(0, 2).perplexity / between(0, 4).perplexity)
    assert math.log(steps[HOST].perplexity / steps[BLOCKS].perplexity) == pytest.approx(nats)


def test_only_a_few_sequences_are_in_memory_at_once(evaluator: Evaluator) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def rows() -> Iterator[np.ndarray]:
        for index in range(len(SEQUENCES)):
            made = logits(5)[index].copy()
            alive.append(weakref.ref(made))
            assert sum(one() is not None for one in alive) <= 3
            yield made
            del made

    against, after = compare(evaluator, rows(), [evaluator.fp32_logits, evaluator.frozen_logits])
    assert against.kl_nats == pytest.approx(between(0, 5).kl_nats)
    assert after.kl_nats == pytest.approx(between(5, 1).kl_nats)
