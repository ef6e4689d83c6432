"""Prompts whose expected answers are too long for --max-new-tokens or for an artifact's context."""

from __future__ import annotations

import pytest

from data.chat_templates import CHATML, THINKING, tokenizer_for
from qat_edge.data import tokenization
from qat_edge.data.conversation import ChatFormat
from qat_edge.data.rows import Chat, Completion, Row, Text
from qat_edge.errors import UsageError
from qat_edge.evaluate.evaluator import EvalSet
from qat_edge.evaluate.prompts import (
    Context,
    EvalPrompt,
    describe_cut_answers,
    describe_lack_of_room,
    eval_prompts,
    fitting_prompts,
)

QUESTION = {"role": "user", "content": "Where?"}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
ROWS: list[Row] = [
    Chat([QUESTION, {"role": "assistant", "content": "Oslo"}, QUESTION, {"role": "assistant", "content": "Rome"}], "1"),
    Chat([QUESTION, {"role": "assistant", "content": "Oslo", "reasoning_content": "It is in the north."}], "2"),
    Chat([QUESTION, {"role": "assistant", "tool_calls": [CALL]}], "3"),
    Completion("in the ", "then\n", "4"),
    Text("then", "5"),
]


def prompt(tokens: int, answer_tokens: int = 1) -> EvalPrompt:
    return EvalPrompt([1] * tokens, "x", answer_tokens, f"rows.jsonl:{tokens}")


def test_prompts_and_answers_are_those_of_the_rows() -> None:
    tokenizer = tokenizer_for(THINKING, added=("<think>", "</think>"))
    found = list(eval_prompts(ROWS, tokenizer))
    assert [(each.ids, each.expected) for each in found] == [
        (p.ids, p.expected) for p in tokenization.prompts(ROWS, tokenizer)
    ]
    assert [each.where for each in found] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("<|im_end|>", "<|stop|>"), THINKING])
def test_an_answer_cut_to_its_tokens_matches_and_to_fewer_does_not(template: str) -> None:
    """The tokens of reasoning before the answer count: the model writes them first."""
    tokenizer = tokenizer_for(template, added=("<|stop|>", "<think>", "</think>"))
    message = {"role": "assistant", "content": "Oslo"}
    if template == THINKING:
        message["reasoning_content"] = "It is in the north."
    row = Chat([QUESTION, message], "row")
    (turn,) = ChatFormat(tokenizer).turns(row)
    (one,) = eval_prompts([row], tokenizer)
    eval_set = EvalSet([], [one], [0], 0, tokenizer)
    assert eval_set.exact_match([turn.ids[: one.answer_tokens]]) == 1.0
    assert eval_set.exact_match([turn.ids[: one.answer_tokens - 1]]) == 0.0


def test_white_space_after_a_completion_is_not_counted() -> None:
    tokenizer = tokenizer_for(None)
    one, other = eval_prompts([Completion("in the ", text, "row") for text in ("then", "then\n ")], tokenizer)
    assert one.answer_tokens == other.answer_tokens > 0


def test_an_empty_prompt_is_left_out_and_named(messages: list[str]) -> None:
    rows = [Completion(text, "then", f"rows:{i}") for i, text in enumerate(("", "in the ", ""), 1)]
    assert [each.where for each in eval_prompts(rows, tokenizer_for(None))] == ["rows:2"]
    assert messages == ["rows:1: the prompt is empty. Such rows are left out of the prompts"]
    assert len(list(eval_prompts(rows, tokenizer_for(None, adds_bos=True)))) == 3


def test_an_answer_that_the_template_changes_is_expected_as_trained_and_named_once(messages: list[str]) -> None:
    tokenizer = tokenizer_for(CHATML.replace("message['content']", "message['content'] | upper"))
    rows = [Chat([QUESTION, {"role": "assistant", "content": text}], f"rows:{text}") for text in ("yo man", "yes")]
    found = list(eval_prompts(rows, tokenizer))
    assert [each.expected for each in found] == ["YO MAN", "YES"]
    eval_set = EvalSet([], found, [0], 0, tokenizer)
    trained = [turn.ids for row in rows for turn in ChatFormat(tokenizer).turns(row)]
    assert eval_set.exact_match(trained) == 1.0
    assert len(messages) == 1
    assert "rows:yo man: the chat template changes the text of the answer" in messages[0] and "'YO MAN'" in messages[0]


def test_answers_longer_than_the_limit_are_counted() -> None:
    assert describe_cut_answers([1, 3, 3], 3) == "" == describe_cut_answers([], 3)
    assert describe_cut_answers([1, 4, 6, 5], 3) == (
        "3 of 4 expected answers are longer than --max-new-tokens 3 and cannot match: give --max-new-tokens 6"
    )


def test_answers_past_the_context_are_counted() -> None:
    context = Context(16, "exports/onnx")
    assert describe_lack_of_room([prompt(10, 6)], context) == "" == describe_lack_of_room([prompt(90)], None)
    assert describe_lack_of_room([prompt(10, 6), prompt(10, 7)], context) == (
        "1 of 2 expected answers go past the 16 tokens that exports/onnx holds with their prompts and cannot match: "
        "export with --context-length 17"
    )


def test_prompts_without_room_for_an_answer_are_replaced_and_counted(messages: list[str]) -> None:
    prompts = [prompt(15), prompt(16), prompt(40), prompt(3), prompt(50)]
    assert fitting_prompts(prompts, 2, Context(16, "exports/onnx")) == [prompts[0], prompts[3]]
    assert messages == [
        "Left out 2 prompts that leave no room for an answer: the first is rows.jsonl:16 with 16 tokens, and "
        "exports/onnx holds 16 together with an answer. Export with a longer --context-length to ask them"
    ]
    assert fitting_prompts(prompts, 2, None) == prompts[:2]
    assert fitting_prompts(prompts, 1, Context(16, "exports/onnx")) == prompts[:1]
    assert fitting_prompts([prompt(40)], 0, Context(16, "exports/onnx")) == []
    assert len(messages) == 1


def test_rows_without_a_prompt_that_fits_are_refused() -> None:
    with pytest.raises(UsageError, match=r"None of 2 prompts leaves room for an answer: the first is rows.jsonl:16 "):
        fitting_prompts([prompt(16), prompt(17)], 4, Context(16, "exports/onnx"))
