"""Comparing generated outputs with the FP32 fine-tune's. The measurements themselves are tested in test_line.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.chat_templates import CHATML, THINKING, tokenizer_for
from qat_edge.data.conversation import ChatFormat
from qat_edge.data.rows import Chat
from qat_edge.evaluate.evaluator import EvalSet, Evaluator
from qat_edge.evaluate.prompts import eval_prompts
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


@pytest.mark.parametrize("template", [CHATML, THINKING, CHATML.replace("<|im_end|>", "<|stop|>")])
def test_an_output_that_is_exactly_what_was_trained_matches(template: str) -> None:
    tokenizer = tokenizer_for(template, added=("<|stop|>", "<think>", "</think>"))
    call = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
    answers = [{"role": "assistant", "content": "Oslo"}]
    if template == THINKING:
        answers += [{**answers[0], "reasoning_content": "North."}, {"role": "assistant", "tool_calls": [call]}]
    rows = [Chat([{"role": "user", "content": "Where?"}, answer], "row") for answer in answers]
    turns = [turn for row in rows for turn in ChatFormat(tokenizer).turns(row)]
    eval_set = EvalSet([], list(eval_prompts(rows, tokenizer)), [0], 0, tokenizer)
    assert eval_set.prompt_ids == [turn.prompt_ids for turn in turns]
    # With the token that ends the turn, and without.
    assert eval_set.exact_match([turn.ids for turn in turns]) == 1.0
    assert eval_set.exact_match([turn.ids[: turn.trained - 1] for turn in turns]) == 1.0
    assert eval_set.exact_match([[*turn.ids[:-2], 5] for turn in turns]) == 0.0
