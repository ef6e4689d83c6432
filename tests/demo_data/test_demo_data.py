"""Demo data: disjoint halves, distinct and answerable rows; and the example configurations that use it."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qat_edge import config
from qat_edge.data.formats import Chat, Text, load_rows
from qat_edge.demo_data import assistant, python_reference
from qat_edge.demo_data.intents import INTENTS
from qat_edge.errors import UsageError
from qat_edge.options import ExportOptions, FinetuneOptions, ValidateOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN = list(assistant.rows("train", 4000))
EVAL = list(assistant.rows("eval", 400))


def call(row: dict[str, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(row["messages"][-1]["content"])
    return parsed


def copied(row: dict[str, Any]) -> set[tuple[str, str, str]]:
    """(tool, argument, value) of each value that is copied from the request."""
    tool_call = call(row)
    fixed = {key for intent in INTENTS if intent.tool == tool_call["tool"] for key in intent.fixed}
    return {(tool_call["tool"], k, str(v)) for k, v in tool_call["arguments"].items() if k not in fixed}


def test_at_least_fifteen_tools_occur_in_both_halves() -> None:
    tools = {intent.tool for intent in INTENTS}
    assert len(tools) >= 15
    assert {call(row)["tool"] for row in TRAIN} == {call(row)["tool"] for row in EVAL} == tools


def test_thousands_of_training_rows_are_distinct() -> None:
    assert len({row["messages"][1]["content"].lower() for row in TRAIN}) > 3500
    assert len({json.dumps(row) for row in TRAIN}) == 4000


@pytest.mark.parametrize("intent", INTENTS, ids=lambda i: f"{i.tool}{''.join(i.fixed.values())}")
def test_phrasings_and_values_are_held_out(intent: Any) -> None:
    for halves in (intent.phrasings, *intent.slots.values()):
        assert len(halves.train) > len(halves.held_out) >= 2
        assert not {str(v).lower() for v in halves.train} & {str(v).lower() for v in halves.held_out}
        assert len(set(halves.train)) == len(halves.train)
    for phrasing in (*intent.phrasings.train, *intent.phrasings.held_out):
        assert sorted(re.findall(r"{(\w+)}", phrasing)) == sorted(intent.slots)


def test_no_request_value_is_shared_between_the_files() -> None:
    train, held_out = (set().union(*map(copied, rows)) for rows in (TRAIN, EVAL))
    assert train and held_out
    assert not train & held_out


def test_no_phrasing_occurs_in_both_halves_across_intents() -> None:
    train = {p for intent in INTENTS for p in intent.phrasings.train}
    held_out = {p for intent in INTENTS for p in intent.phrasings.held_out}
    assert not train & held_out


def test_no_request_has_two_tool_calls() -> None:
    tool_calls: dict[str, set[str]] = {}
    for row in TRAIN + EVAL:
        _, user, tool_call = row["messages"]
        tool_calls.setdefault(user["content"].lower(), set()).add(tool_call["content"])
    assert all(len(found) == 1 for found in tool_calls.values())


def test_tool_calls_are_short_and_copied_from_the_request() -> None:
    for row in TRAIN + EVAL:
        system, user, tool_call = row["messages"]
        assert system == {"role": "system", "content": assistant.SYSTEM}
        assert len(tool_call["content"]) <= 130
        assert tool_call["content"] == json.dumps(call(row), ensure_ascii=False, separators=(",", ":"))
        assert list(call(row)) == ["tool", "arguments"]
        assert all(value.lower() in user["content"].lower() for _, _, value in copied(row))


def test_the_same_seed_gives_the_same_rows_and_another_gives_others() -> None:
    assert list(assistant.rows("train", 50)) == TRAIN[:50]
    assert list(islice(assistant.rows("train", 4000, seed=1), 50)) != TRAIN[:50]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="split 'test'"):
        next(assistant.rows("test", 1))


def test_written_files_are_read_back(tmp_path: Path) -> None:
    train, held_out = assistant.write(tmp_path)
    assert len(load_rows(str(train))) == 4000
    assert len(load_rows(str(held_out))) == 400
    first = load_rows(str(held_out))[0]
    assert isinstance(first, Chat) and first.messages == EVAL[0]["messages"]


# --- the Python reference ----------------------------------------------------------------------------------


def test_python_reference_holds_out_twelve_topics_without_a_shared_paragraph(tmp_path: Path) -> None:
    train, held_out = (load_rows(str(path)) for path in python_reference.write(tmp_path))
    assert len(held_out) == 12
    train_text, *_ = ["\n\n".join(row.text for row in train if isinstance(row, Text))]
    assert len(train_text) > 250_000
    train_paragraphs = {p.strip() for p in train_text.split("\n\n")}
    for row in held_out:
        assert isinstance(row, Text)
        assert len(row.text) >= python_reference.MIN_CHARACTERS
        assert not train_paragraphs & {p.strip() for p in row.text.split("\n\n") if p.strip()}
    assert python_reference.split() == python_reference.split()


# --- configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_loads(path: Path) -> None:
    sections = {
        "finetune": FinetuneOptions,
        "export": ExportOptions,
        "validate": ValidateOptions,
    }
    found = set(config.read_sections(path))
    assert "finetune" in found <= set(sections)
    for section in found:
        assert config.load(sections[section], section, path, {})
    assert path.name in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} >= {"assistant.yaml", "python-reference.yaml"}
