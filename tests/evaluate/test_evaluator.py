"""Comparing generated outputs with the FP32 fine-tune's. The measurements themselves are tested in test_line.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat_edge.evaluate.evaluator import EvalSet, Evaluator
from qat_edge.options import ValidateOptions

TUNED = [[5, 6, 7], [5, 6], [8], [1, 2, 3, 4]]


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    return Evaluator(EvalSet([], [], [0], 0, None), ValidateOptions(), tmp_path)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (TUNED, (1.0, None)),
        ([[5, 6, 7], [5, 6, 9], [8], [1, 2, 3, 4]], (0.75, 2)),  # longer than the fine-tune's output
        ([[5, 6, 7], [5], [], [1, 2, 0, 4]], (0.25, 1)),
        ([], (None, None)),  # no prompts
    ],
)
def test_outputs_are_compared_with_those_of_the_fine_tune(
    evaluator: Evaluator, outputs: list[list[int]], expected: tuple[float | None, float | None]
) -> None:
    evaluator.fp32_outputs.write_text(json.dumps(TUNED if outputs else []))
    assert evaluator.compare_outputs(outputs) == expected


def test_outputs_are_not_compared_where_the_fine_tune_has_none(evaluator: Evaluator) -> None:
    assert evaluator.compare_outputs(TUNED) == (None, None)
