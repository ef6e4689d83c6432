"""What the bench makes of answers. The measurements themselves are in test_line.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat_edge.config import ValidateOptions
from qat_edge.evaluate.evaluator import Bench, Material

TUNED = [[5, 6, 7], [5, 6], [8], [1, 2, 3, 4]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Material([], [], [0], 0, None), ValidateOptions(), tmp_path)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (TUNED, (1.0, None)),
        ([[5, 6, 7], [5, 6, 9], [8], [1, 2, 3, 4]], (0.75, 2)),  # goes on where the fine-tune ends
        ([[5, 6, 7], [5], [], [1, 2, 0, 4]], (0.25, 1)),
        ([], (None, None)),  # no prompts
    ],
)
def test_answers_against_those_of_the_fine_tune(
    bench: Bench, answers: list[list[int]], expected: tuple[float | None, float | None]
) -> None:
    bench.fp32_answers.write_text(json.dumps(TUNED if answers else []))
    assert bench.against_fp32(answers) == expected


def test_answers_have_nothing_to_be_held_against_where_the_fine_tune_was_not_asked(bench: Bench) -> None:
    assert bench.against_fp32(TUNED) == (None, None)
