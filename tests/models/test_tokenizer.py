"""Tokenizer files are copied unchanged, and end tokens are collected from all three places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat_edge.errors import ModelError
from qat_edge.models.tokenizer import (
    add_end_tokens,
    copy_tokenizer_files,
    end_tokens,
    load_tokenizer,
    tokenizer_files,
)


def test_end_tokens_of_all_files_are_collected(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)  # its own ends with 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9, "model_type": "llama"}')
    assert end_tokens(tmp_path) == [7, 2, 9]


def test_a_model_without_an_end_token_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="end token"):
        end_tokens(tmp_path)


def test_files_are_copied_byte_for_byte(tokenizer: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    tokenizer.save_pretrained(source)
    copy_tokenizer_files(source, target)
    assert {p.name for p in target.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert all((source / p.name).read_bytes() == p.read_bytes() for p in target.iterdir())


def test_named_chat_templates_are_copied_too(tokenizer: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    copy_tokenizer_files(source, target)
    assert tokenizer_files(target) == tokenizer_files(source)
    assert load_tokenizer(target).chat_template == tokenizer.chat_template


def test_end_tokens_are_added_where_no_file_names_them(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    add_end_tokens(tmp_path, [2])
    assert not (tmp_path / "generation_config.json").exists(), "the tokenizer names it"
    add_end_tokens(tmp_path, [2, 7])
    assert end_tokens(tmp_path) == [2, 7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9, "top_k": 5}')
    add_end_tokens(tmp_path, [7])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [9, 2, 7], "top_k": 5}


@pytest.mark.parametrize(
    "document", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', "[]", "{", '{"eos_token_id": -1}']
)
def test_a_damaged_end_token_is_named(tokenizer: Any, tmp_path: Path, document: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(document)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        end_tokens(tmp_path)


@pytest.mark.parametrize("changes", [{"eos_token": {"a": 1}}, {"padding_side": "middle"}])
def test_settings_that_no_tokenizer_has_are_refused(tokenizer: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"model_max_length": "x"}, {"model_max_length": True}, {"padding_side": 1}, {"model_input_names": []}],
)
def test_settings_that_no_text_can_be_encoded_with_name_file_and_key(
    tokenizer: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match="tokenizer_config"):
        load_tokenizer(tmp_path)


def test_a_template_that_is_no_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": 5}))
    with pytest.raises(ModelError, match="chat_template is 5"):
        load_tokenizer(tmp_path)
