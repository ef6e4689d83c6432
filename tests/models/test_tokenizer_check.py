"""Tokenizers whose files contradict each other, draw ids at random, or make the tokenizers library panic."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from conftest import SPECIAL_TOKENS, make_tokenizer
from qat_edge.data.chat_template import encode
from qat_edge.data.rows import Chat
from qat_edge.data.tokenization import tokenize
from qat_edge.errors import DataError, ModelError
from qat_edge.models.load import load_model
from qat_edge.models.tokenizer import load_tokenizer
from qat_edge.models.tokenizer_check import PROBES, check_templates, check_tokenizer


def edit(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))


def configure(folder: Path, **settings: Any) -> None:
    edit(folder, "tokenizer_config.json", lambda config: config.update(settings))


def split_by(folder: Path, regex: str) -> None:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    edit(folder, "tokenizer.json", lambda document: document.update(pre_tokenizer=step))


def ids(path: Path, text: str) -> list[int]:
    return list(Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


def test_nothing_is_reported_of_a_tokenizer_that_is_as_its_files(model_copy: Path, messages: list[str]) -> None:
    load_model(str(model_copy))
    assert messages == []


def test_random_ids_are_switched_off_in_the_saved_tokenizer_too(
    model_copy: Path, tmp_path: Path, messages: list[str]
) -> None:
    edit(model_copy, "tokenizer.json", lambda document: document["model"].update(dropout=0.5))
    tokenizer = load_model(str(model_copy)).tokenizer
    assert [line for line in messages if "'dropout' of its model is 0.5" in line]

    text = "the other one in the man " * 5
    assert {tuple(encode(text, tokenizer)) for _ in range(20)} == {tuple(encode(text, make_tokenizer()))}
    tokenizer.save_pretrained(tmp_path / "saved")
    assert {tuple(ids(tmp_path / "saved", text)) for _ in range(20)} == {tuple(encode(text, make_tokenizer()))}


@pytest.mark.parametrize("name", ["BertTokenizer", "GemmaTokenizer", "MBart50Tokenizer"])
def test_a_class_that_makes_another_tokenizer_of_the_file_is_refused(model_copy: Path, name: str) -> None:
    configure(model_copy, tokenizer_class=name)
    with pytest.raises(ModelError, match=f"tokenizer_class '{name}'"):
        load_model(str(model_copy))


@pytest.mark.parametrize("name", ["BigBirdTokenizer", "T5Tokenizer", "RagTokenizer", "NoSuchTokenizer", 5])
def test_a_class_that_cannot_read_the_file_is_named_or_not_used(model_copy: Path, name: Any) -> None:
    configure(model_copy, tokenizer_class=name)
    if name == "NoSuchTokenizer":
        load_model(str(model_copy))
        return
    with pytest.raises(ModelError, match=f"no usable tokenizer.*tokenizer_class '?{name}"):
        load_model(str(model_copy))


@pytest.mark.parametrize("name", ["BertTokenizer", "GemmaTokenizer", "T5Tokenizer", "XLMRobertaTokenizer"])
def test_a_class_without_a_vocabulary_is_no_tokenizer(model_copy: Path, name: str) -> None:
    (model_copy / "tokenizer.json").unlink()
    configure(model_copy, tokenizer_class=name)
    with pytest.raises(ModelError, match=r"no usable tokenizer .* Put its tokenizer\.json next to the weights"):
        load_model(str(model_copy))


def test_a_difference_in_rare_texts_alone_is_reported(model_copy: Path, tmp_path: Path, messages: list[str]) -> None:
    configure(model_copy, tokenizer_class="Qwen2Tokenizer")  # composes accents, which this tokenizer.json does not
    tokenizer = load_model(str(model_copy)).tokenizer
    assert len(messages) == 1
    assert "tokenizer_class 'Qwen2Tokenizer'" in messages[0] and "Ünïcode" in messages[0]

    # The artifacts have the tokenizer of the training.
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in PROBES:
        assert encode(text, tokenizer) == ids(tmp_path / "saved", text) == encode(text, again)


@pytest.mark.parametrize("damage", ["(", "\\p{Nope}", "charsmap", "prefix", "dropout"])
def test_a_file_on_which_the_library_fails_is_named(model_copy: Path, damage: str) -> None:
    if damage == "charsmap":
        step = {"type": "Precompiled", "precompiled_charsmap": ""}
        edit(model_copy, "tokenizer.json", lambda document: document.update(normalizer=step))
    elif damage == "prefix":
        edit(model_copy, "tokenizer.json", lambda document: document["model"].update(continuing_subword_prefix="##"))
    elif damage == "dropout":
        edit(model_copy, "tokenizer.json", lambda document: document["model"].update(dropout=5))
    else:
        split_by(model_copy, damage)
    with pytest.raises(ModelError, match=r"model: the model has no usable tokenizer .*Restore tokenizer\.json"):
        load_model(str(model_copy))


def test_a_text_on_which_a_regular_expression_fails_is_quoted(model_copy: Path) -> None:
    split_by(model_copy, "(a+)+$")
    with pytest.raises(DataError, match="cannot read a text of 41 characters, 'aaaa"):
        encode("a" * 40 + "b", load_model(str(model_copy)).tokenizer)


def test_code_of_a_tokenizer_needs_the_flag(model_copy: Path) -> None:
    configure(model_copy, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (model_copy / "mine.py").write_text("class Mine: ...")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(str(model_copy))


@pytest.mark.parametrize("as_list", [False, True])
def test_one_of_two_chat_templates_is_named(model_copy: Path, messages: list[str], as_list: bool) -> None:
    same = (model_copy / "chat_template.jinja").read_text()
    configure(model_copy, chat_template=same)
    load_model(str(model_copy))
    assert messages == []

    other = "{{ messages }}"
    configure(model_copy, chat_template=[{"name": "default", "template": other}] if as_list else other)
    assert load_model(str(model_copy)).tokenizer.chat_template == same
    assert len(messages) == 1 and "chat_template.jinja is used" in messages[0]


def test_a_template_that_only_processors_read_is_named(model_copy: Path, messages: list[str]) -> None:
    path, template = model_copy / "chat_template.json", model_copy / "chat_template.jinja"
    path.write_text(json.dumps({"chat_template": template.read_text()}))
    load_model(str(model_copy))
    assert messages == [], "the template that is used"

    path.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    load_model(str(model_copy))
    assert "chat_template.json: the chat template of this file is not used: " in messages[0]
    assert "has another one, which is used" in messages[0]

    template.unlink()
    tokenizer = load_model(str(model_copy)).tokenizer
    assert "and the tokenizer has no other" in messages[1]
    chat = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "rows:1")
    with pytest.raises(
        DataError, match=r"Write the text of 'chat_template' in .*chat_template\.json into chat_template\.jinja"
    ):
        tokenize([chat], tokenizer, 64)


def test_a_template_with_a_byte_order_mark_is_refused(model_copy: Path) -> None:
    template = model_copy / "chat_template.jinja"
    template.write_text("\ufeff" + template.read_text())
    with pytest.raises(ModelError, match="the chat template begins with a byte-order mark"):
        load_model(str(model_copy))


def test_tokens_that_files_state_differently_are_reported(model_copy: Path, messages: list[str]) -> None:
    (model_copy / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    configure(model_copy, added_tokens_decoder={"2": {"content": "<|other|>", "special": True}})
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    check_tokenizer(tokenizer, model_copy)
    assert len(messages) == 3
    assert "the token '<|other|>' the id 2" in messages[0] and "eos_token '<|" in messages[1]
    assert "does not have '<|other|>' (id 267, added_tokens_decoder in tokenizer_config.json)" in messages[2]


def test_added_tokens_with_another_id_are_reported(model_copy: Path, messages: list[str]) -> None:
    path = model_copy / "added_tokens.json"
    path.write_text(json.dumps({"<|im_end|>": 2, "say": 267}))
    load_model(str(model_copy))
    assert len(messages) == 1 and "does not have 'say' (id 267, added_tokens.json). " in messages[0]
    path.write_text(json.dumps({"<|im_end|>": 2, "say": 270}))
    load_model(str(model_copy))
    assert len(messages) == 3 and "added_tokens.json gives the token 'say' the id 270, and the tok" in messages[1]
    assert "builds 267, which is used" in messages[1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"additional_special_tokens": ["<new>", "<|im_end|>"]}, "additional_special_tokens in tokenizer_config.json"),
        ({"extra_special_tokens": {"new_token": "<new>"}}, "extra_special_tokens in tokenizer_config.json"),
        ({"pad_token": "<new>"}, "pad_token in tokenizer_config.json"),
        ({"added_tokens_decoder": {"267": {"content": "<new>", "special": True}}},
         "added_tokens_decoder in tokenizer_config.json"),
    ],
)  # fmt: skip
def test_tokens_that_tokenizer_json_does_not_have_are_named(
    model_copy: Path, messages: list[str], settings: dict[str, Any], named: str
) -> None:
    configure(model_copy, **settings)
    loaded = load_model(str(model_copy))
    assert loaded.tokenizer.convert_tokens_to_ids("<new>") == 267 < loaded.model.config.vocab_size
    assert len(messages) == 1 and "LoRA does not train them" in messages[0]
    assert f"tokenizer.json does not have '<new>' (id 267, {named}). transformers" in messages[0]


def test_many_new_tokens_are_counted(model_copy: Path, messages: list[str]) -> None:
    configure(model_copy, additional_special_tokens=[f"<{i}>" for i in range(10)])
    load_model(str(model_copy))
    assert len(messages) == 1 and "'<7>' (id 274, " in messages[0] and "'<8>'" not in messages[0]
    assert " and 2 more. " in messages[0]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_an_end_token_that_tokenizer_json_does_not_have_is_refused(model_copy: Path, name: str) -> None:
    if name == "tokenizer_config.json":
        configure(model_copy, eos_token="</s>", added_tokens_decoder={"267": {"content": "</s>", "special": True}})
    else:
        edit(model_copy, "tokenizer_config.json", lambda config: config.pop("eos_token"))
        (model_copy / name).write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    with pytest.raises(
        ModelError,
        match=rf"does not have the end token '</s>', eos_token in {name}: .* the new id 267, .* Set eos_token",
    ):
        load_model(str(model_copy))
    # An encoder ends no text with it.
    check_tokenizer(AutoTokenizer.from_pretrained(model_copy), model_copy, is_encoder=True)


def test_tokens_that_both_files_have_and_tokenizers_without_the_file_are_left_alone(
    model_copy: Path, messages: list[str]
) -> None:
    decoder = {str(i): {"content": token, "special": True} for i, token in enumerate(SPECIAL_TOKENS)}
    configure(model_copy, added_tokens_decoder=decoder, additional_special_tokens=["<|im_start|>"])
    load_model(str(model_copy))
    assert messages == []

    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    (model_copy / "tokenizer.json").unlink()
    check_tokenizer(tokenizer, model_copy)
    assert messages == []


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("use", ["unk_token", "eos_token", "bos_token", "pad_token"])
def test_a_special_token_without_characters_is_refused(model_copy: Path, name: str, use: str) -> None:
    if name == "special_tokens_map.json":
        configure(model_copy, **{use: None})
    path = model_copy / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), use: ""}))
    for read in (lambda: load_model(str(model_copy)), lambda: load_tokenizer(model_copy)):
        with pytest.raises(ModelError, match=f"{use} is an empty text, which is no token"):
            read()


@pytest.mark.parametrize(
    "damage",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "\n+"}, "content": " "}},
        {"decoder": None},
        {"model": "Ġ"},
    ],
)
def test_a_tokenizer_that_loses_text_is_reported(model_copy: Path, messages: list[str], damage: dict[str, Any]) -> None:
    if "model" in damage:
        edit(model_copy, "tokenizer.json", lambda document: document["model"]["vocab"].pop(damage["model"]))
    else:
        edit(model_copy, "tokenizer.json", lambda document: document.update(damage))
    load_model(str(model_copy))
    assert len(messages) == 1 and "does not give back what it reads" in messages[0]


def test_special_tokens_that_training_would_read_as_text_are_refused(model_copy: Path) -> None:
    configure(model_copy, split_special_tokens=True)
    with pytest.raises(ModelError, match="split_special_tokens"):
        load_model(str(model_copy))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_read(model_copy: Path, name: str) -> None:
    (model_copy / name).unlink(missing_ok=True)
    os.mkfifo(model_copy / name)
    with pytest.raises(ModelError, match=rf"{name}: (cannot be read \()?not a file"):
        load_model(str(model_copy))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{{ messages }}".encode("utf-16"), r"chat_template\.jinja: not UTF-8 text"),
        ("tokenizer_config.json", b'{"chat_template": 5}', r"tokenizer_config\.json: chat_template is 5, expected a"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', r"chat_template is list of 1, expected a"),
    ],
)
def test_a_file_without_a_readable_chat_template_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check_templates(tmp_path)
