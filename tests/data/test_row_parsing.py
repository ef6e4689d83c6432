"""Every key of a row is used, refused by name, or counted; text files may begin with a byte-order mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from qat_edge.data.formats import Chat, Completion, Text, load_rows
from qat_edge.errors import DataError

USER = {"role": "user", "content": "Where?"}
ASSISTANT = {"role": "assistant", "content": "Oslo"}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load_one(folder: Path, record: Any) -> Any:
    """Return the row of one record in a .jsonl file."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (row,) = load_rows(str(path))
    return row


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n'),
        ("rows.json", '[{"prompt": "a", "completion": "b"}]'),
        ("rows.csv", "prompt,completion\na,b\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(BYTE_ORDER_MARK + text.encode())
    (row,) = load_rows(str(path))
    assert isinstance(row, Completion) and (row.prompt, row.completion) == ("a", "b")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(BYTE_ORDER_MARK + b"Call me\r\nIshmael.")
    assert load_rows(str(path)) == [Text("Call me\nIshmael.", str(path))]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_a_byte_order_mark_in_a_folder_of_files(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = {
        "jsonl": b'{"text": "Call me Ishmael."}\n',
        "csv": b"text\nCall me Ishmael.\n",
        "txt": b"Call me Ishmael.\n",
    }
    (folder / f"train.{suffix}").write_bytes(BYTE_ORDER_MARK + texts[suffix])
    assert [row.text.strip() for row in load_rows(str(folder)) if isinstance(row, Text)] == ["Call me Ishmael."]


def test_a_csv_row_with_more_values_than_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b, and c\n")
    with pytest.raises(DataError, match=r"rows\.csv:2: more values than the 2 columns"):
        load_rows(str(path))
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="several columns are named 'text'"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"text": 1' + "0" * 5000 + "}", "not usable JSON"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": "a", "text": "b"}', "key 'text' twice"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_hostile_json_gives_one_paragraph(tmp_path: Path, line: str, message: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load_rows(str(path))
    assert len(str(caught.value)) < 500


def test_keys_that_are_not_used_are_counted(tmp_path: Path, messages: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "id": 1, "source": "x"}, {"text": "b", "id": 2}, {"prompt": "a", "completion": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_rows(str(path))
    assert messages == [f"{path}: not used: 'id' in 2 rows, 'source' in 1 row"]
    load_rows(str(path), report=False)
    assert len(messages) == 1


# --- conversations -----------------------------------------------------------------------------------------


def test_tools_and_calls_have_one_form(tmp_path: Path) -> None:
    schema = {"name": "rain", "parameters": {"type": "object"}}
    calls = [
        CALL,
        {"name": "rain", "arguments": {"city": "Oslo"}, "id": "c1"},
        {"type": "function", "function": {"name": "rain", "arguments": '{"city": "Oslo"}'}},
        {"function": {"name": "rain"}},
    ]
    row = load_one(
        tmp_path,
        {
            "tools": [schema, {"type": "function", "function": schema}],
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}],
        },
    )
    assert row.tools == [{"type": "function", "function": schema}] * 2
    assert row.messages[1] == {
        "role": "assistant",
        "tool_calls": [
            CALL,
            {"id": "c1", **CALL},
            CALL,
            {"function": {"name": "rain", "arguments": {}}},
        ],
    }


def test_nested_columns_may_be_json_text_or_arrow_tables(tmp_path: Path) -> None:
    messages: list[Any] = [USER, {**ASSISTANT, "tool_calls": [CALL]}]
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    record = {"messages": json.dumps(messages), "tools": json.dumps(tools), "chat_template_kwargs": '{"x": 1}'}
    row = load_one(tmp_path, record)
    assert (row.messages, row.tools, row.template_arguments) == (messages, tools, {"x": 1})
    # In a table every call has the arguments of all calls, most of them null.
    other = {"type": "function", "function": {"name": "timer", "arguments": {"minutes": 3}}}
    table = datasets.Dataset.from_list(
        [{"messages": messages}, {"messages": [USER, {**ASSISTANT, "tool_calls": [other]}]}]
    )
    table.to_parquet(tmp_path / "rows.parquet")
    found = [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in _chats(tmp_path / "rows.parquet")]
    assert found == [{"city": "Oslo"}, {"minutes": 3}]


def _chats(path: Path) -> list[Chat]:
    return [row for row in load_rows(str(path)) if isinstance(row, Chat)]


def test_parts_of_text_are_joined_and_share_gpt_is_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ere?"}]
    assert load_one(tmp_path, {"messages": [{"role": "user", "content": parts}, ASSISTANT]}).messages == [
        USER,
        ASSISTANT,
    ]
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Oslo", "weight": 1}]
    assert load_one(tmp_path, {"conversations": turns}).messages == [USER, {**ASSISTANT, "weight": 1}]
    assert load_one(tmp_path, {"conversations": [USER, ASSISTANT]}).messages == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Preference rows are for DPO"),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca rows"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' next to 'prompt' and 'completion'"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "are lists of messages. Join them"),
        ({"messages": [USER, ASSISTANT], "system": "x"}, "'system' next to 'messages' would be lost"),
        ({"messages": [USER, ASSISTANT], "functions": []}, "'functions' next to 'messages' would be lost"),
        ({"messages": [USER, ASSISTANT], "tools": {"rain": 1}}, "'tools' must be a list of objects, found an object"),
        ({"messages": [USER, ASSISTANT], "tools": [{"type": "function"}]}, "tool 1 must be a JSON schema"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        ({"messages": [USER, {**ASSISTANT, "function_call": {}}]}, "message 2: 'function_call' is not supported"),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]},
            "message 1: 'tool_calls' belong to messages of the",
        ),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]}, "message 2: tool call 1 must be"),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": "x"}]},
            "'tool_calls' must be a list of calls, found a string",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "rain", "arguments": "{"}]}]},
            "message 2: tool call 1: 'arguments': not JSON",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "rain", "arguments": [1]}]}]},
            "'arguments' must be an object, found a list",
        ),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "message 2: 'weight' is 0.5"),
        ({"messages": [USER, {**ASSISTANT, "weight": True}]}, "message 2: 'weight' is True"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, "message 1: 'weight' 1 on a message of 'user'"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "has the weight 0"),
        ({"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "content": " \n"}]}, "message 4: the assistant's"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}, {**ASSISTANT, "content": ""}]}, "would learn to say nothing"),
        ({"messages": [USER, {**ASSISTANT, "content": "", "thinking": ""}, ASSISTANT]}, "message 2: the assistant's"),
        ({"messages": [{**USER, "thinking": "x"}, ASSISTANT]}, "'thinking' belongs to messages of the assistant"),
        (
            {"messages": [USER, {**ASSISTANT, "thinking": "x", "reasoning_content": "y"}]},
            "'reasoning_content' and 'thinking' are different texts",
        ),
        ({"messages": [USER, {**ASSISTANT, "reasoning": ["x"]}]}, "'reasoning' must be a string, found a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]},
            "message 1: part 1 of 'content' is of type 'image_url'",
        ),
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "'images' is not supported: only texts are trained"),
        ({"conversations": [USER, ASSISTANT], "image": "a.png"}, "'image' is not supported"),
        ({"messages": [USER, ASSISTANT], "videos": [{"path": "a.mp4"}]}, "'videos' is not supported"),
        ({"messages": [{**USER, "audio": {"path": "a.wav"}}, ASSISTANT]}, "message 1: 'audio' is not supported"),
        (
            {"messages": [{"role": "tool", "content": {"rain": True}}, ASSISTANT]},
            "'content' must be a string, found an",
        ),
        ({"messages": [{"role": "user", "content": None}, ASSISTANT]}, "'content' must be a string, found nothing"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "the assistant's message is empty"),
        ({"messages": [USER, {**ASSISTANT, "role": "Assistant"}]}, "message 2: the role 'Assistant' has no meaning"),
        ({"messages": [{**USER, "role": "User"}, ASSISTANT]}, "Write 'user'."),
        ({"messages": [{**USER, "role": " system"}, ASSISTANT]}, "Write 'system'."),
        ({"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "role": "gpt"}]}, "message 4: the role 'gpt'"),
        ({"messages": [USER, {**ASSISTANT, "train": False}, ASSISTANT]}, "message 2: 'train' is not supported"),
        ({"messages": [USER, {**ASSISTANT, "loss": False}, ASSISTANT]}, "message 2: 'loss' is not supported"),
        ({"messages": [USER, ASSISTANT], "weight": 0.5}, "'weight' is 0.5, and all rows have the same weight"),
        ({"prompt": "a", "completion": "b", "weight": "2"}, "'weight' is 2, and all rows have"),
        ({"text": "a", "sample_weight": 0}, "'sample_weight' is 0, and all rows have"),
        (
            {"messages": [USER, {**ASSISTANT, "content": [{"type": "text", "text": "a", "weight": 0}]}]},
            "message 2: part 1 of 'content': 'weight' next to 'text' would be lost",
        ),
        (
            {"conversations": [{"from": "human", "value": "a", "content": "b"}, ASSISTANT]},
            "turn 1 of 'conversations' has 'value' 'a' and 'content' 'b'",
        ),
        (
            {"conversations": [USER, {"from": "gpt", "role": "user", "value": "a"}]},
            "turn 2 of 'conversations' has 'from' 'gpt' and 'role' 'user'",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{}"}]},
            "turn 1 of 'conversations' is from 'function_call'",
        ),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_one(tmp_path, record)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ")
    assert message in str(caught.value)


def test_empty_columns_of_images_are_taken(tmp_path: Path) -> None:
    empty = {"images": [], "image": "", "video": {}, "audio": None}
    row = load_one(tmp_path, {"messages": [{**USER, "images": []}, ASSISTANT], **empty})
    assert isinstance(row, Chat)


def test_keys_that_say_the_same_twice_are_taken(tmp_path: Path) -> None:
    part = {"type": "text", "text": "Where?", "cache_control": {"type": "ephemeral"}, "annotations": []}
    rows = [
        {"conversations": [{"from": "human", "role": "human", "value": "Where?", "content": None}, ASSISTANT]},
        {"conversations": [{"from": "human", "role": "user", "value": "Where?", "content": "Where?"}, ASSISTANT]},
        {"conversations": [{"from": "human", "content": "Where?"}, ASSISTANT]},
        {"messages": [{"role": "user", "content": [part]}, ASSISTANT], "weight": 1.0},
    ]
    for row in rows:
        assert load_one(tmp_path, row).messages == [USER, ASSISTANT]


@pytest.mark.parametrize("more", [{"tool_calls": [CALL]}, {"reasoning": "hm"}, {"weight": 0}])
def test_an_answer_may_be_empty_for_a_reason(tmp_path: Path, more: dict[str, Any]) -> None:
    row = load_one(tmp_path, {"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "content": "", **more}]})
    assert row.messages[3]["content"] == ""


def test_values_of_other_types_are_named(tmp_path: Path) -> None:
    from datetime import datetime

    datasets.Dataset.from_list([{"text": datetime(2024, 1, 1)}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="'text' must be a string, found a value of type datetime"):
        load_rows(str(tmp_path / "rows.parquet"))
