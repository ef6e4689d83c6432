"""Learning rates of both phases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qat_edge.options import FinetuneOptions
from qat_edge.train.trainer import learning_rate_factor

OPTIONS = FinetuneOptions(model="m", data="d", steps=100, warmup_steps=4, learning_rate=1e-3)


def test_one_schedule_spans_both_phases() -> None:
    factor = learning_rate_factor(replace(OPTIONS, lr_restart=False), start=50)
    assert factor(0) < factor(2) < factor(4) == 1
    assert factor(52) == pytest.approx(0.5)  # half way down the cosine of steps 4 to 100
    assert 0 < factor(99) < 0.001


def test_phase_2_has_a_schedule_of_its_own() -> None:
    factor = learning_rate_factor(replace(OPTIONS, qat_learning_rate=5e-4), start=50)
    alone = learning_rate_factor(OPTIONS, start=100)
    assert [factor(step) for step in range(50)] == [alone(step) for step in range(50)]
    assert factor(54) == pytest.approx(0.5)  # the second peak, of half the height
    assert factor(99) < 0.01


@pytest.mark.parametrize(
    ("ptq_init", "peak"), [("none", 0.3), ("hqq", 0.3), ("gptq", 0.1), ("coordinate-descent", 0.1)]
)
def test_phase_2_has_a_lower_peak_after_an_initialization_that_compensates_rounding(ptq_init: str, peak: float) -> None:
    assert learning_rate_factor(replace(OPTIONS, ptq_init=ptq_init), start=50)(54) == pytest.approx(peak)


def test_learned_scales_have_the_same_peak_in_both_phases() -> None:
    options = replace(OPTIONS, lr_schedule="constant", qat_learning_rate=2e-3)
    assert learning_rate_factor(options, 50)(60) == 2
    assert learning_rate_factor(options, 50, of_scales=True)(60) == 1
