"""End tokens inside of answers are named by finetune, validate and eval, with the file that they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import short_training
from data.chat_templates import CHATML, tokenizer_for
from models.tiny_gguf import write_gguf
from qat_edge.data import tokenization
from qat_edge.data.early_ends import early_end
from qat_edge.data.rows import Chat, Completion, Row, Text
from qat_edge.evaluate.prompts import describe_early_ends, eval_prompts
from qat_edge.models.tokenizer import end_token_origins, stored_end_token_origins
from qat_edge.train import setup

END, NEWLINE, STOP = 2, 201, 16  # <|im_end|>, "\n" and "." of the tests' tokenizer
ANSWERS = ("one\ntwo", "three", "four\n")


def rows() -> list[dict[str, Any]]:
    question = {"role": "user", "content": "Which?\nSay it."}
    return [{"messages": [question, {"role": "assistant", "content": text}]} for text in ANSWERS]


def chats() -> list[Row]:
    return [Chat(row["messages"], f"rows:{i}") for i, row in enumerate(rows(), 1)]


def name_end_tokens(folder: Path, *ids: int) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(ids)}))


def test_the_ids_are_those_of_the_tokenizer() -> None:
    tokenizer = tokenizer_for(CHATML)
    assert tokenizer.encode("\n", add_special_tokens=False) == [NEWLINE]
    assert tokenizer.encode(".", add_special_tokens=False) == [STOP]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one\ntwo<|im_end|>", NEWLINE),
        ("one two.<|im_end|>", STOP),  # the full stop would be missing
        ("one two\n<|im_end|>", None),  # white space at the end is no difference
        ("one two<|im_end|>\n", None),
        ("one<|im_end|> two", END),
        ("one two", None),
        ("", None),
    ],
)
def test_the_first_end_token_with_text_after_it_is_found(text: str, found: int | None) -> None:
    tokenizer = tokenizer_for(CHATML)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert early_end(ids, {END, NEWLINE, STOP}, tokenizer) == found


def test_only_answers_count_and_each_counts_once() -> None:
    tokenizer = tokenizer_for(CHATML)
    dialogue = Chat([m for row in rows() for m in row["messages"]], "rows:1")
    data: list[Row] = [dialogue, Completion("a\nb ", "c\nd\ne", "rows:2"), Text("f\ng", "rows:3")]
    early = tokenization.tokenize(data, tokenizer, 512, {END, NEWLINE}).early_ends
    assert (early.answers, early.found) == (4, {NEWLINE: 2})
    assert tokenization.tokenize(data, tokenizer, 512, {END}).early_ends.describe({}, tokenizer) == ""


@pytest.mark.parametrize("is_gguf", [False, True])
def test_finetune_names_the_token_and_its_file(
    model_copy: Path, tmp_path: Path, messages: list[str], is_gguf: bool
) -> None:
    model, origin = model_copy, "generation_config.json"
    if is_gguf:
        model = write_gguf(model_copy, tmp_path / "tiny.gguf", lambda writer: writer.add_eot_token_id(NEWLINE))
        origin = "tokenizer.ggml of tiny.gguf"
    else:
        name_end_tokens(model_copy, END, NEWLINE)
    setup.prepare_training(short_training(model, tmp_path, rows(), device="cpu"))
    assert [line for line in messages if "end token, at which" in line] == [
        "train: 1 of 3 answers contain an end token, at which a generation stops, and cannot be given in full: "
        f"'\\n' (id 201, from {origin}) in 1. Remove it from the model's end tokens (eos_token_id), or from the "
        "answers, and train again."
    ]


def test_finetune_reports_nothing_of_answers_that_end_where_they_should(
    model_copy: Path, tmp_path: Path, messages: list[str]
) -> None:
    setup.prepare_training(short_training(model_copy, tmp_path, rows(), device="cpu"))
    assert not [line for line in messages if "end token" in line]


def test_expected_answers_that_stop_early_are_described(model_copy: Path) -> None:
    tokenizer = tokenizer_for(CHATML)
    prompts = list(eval_prompts(chats(), tokenizer))
    assert describe_early_ends(prompts, stored_end_token_origins(model_copy), tokenizer) == ""
    name_end_tokens(model_copy, END, NEWLINE)
    origins = stored_end_token_origins(model_copy)
    assert origins == {END: "config.json", NEWLINE: "generation_config.json"}
    found = describe_early_ends(prompts, origins, tokenizer)
    assert (
        found.startswith("1 of 3 answers contain an end token, ") and "(id 201, from generation_config.json)" in found
    )


def test_the_first_file_that_names_an_end_token_is_its_origin(tiny_model_folder: Path) -> None:
    from qat_edge.models.load import load_model

    model, tokenizer, _ = load_model(str(tiny_model_folder))
    model.generation_config.eos_token_id = [END, NEWLINE]
    tokenizer.eos_token = "<|endoftext|>"
    assert end_token_origins(model, tokenizer) == {
        END: "config.json", NEWLINE: "generation_config.json", 0: "the tokenizer"
    }  # fmt: skip
