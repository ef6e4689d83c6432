"""Function calls compared by the rules of BFCL, and by its own checker where the package is at hand."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from public_tasks import bfcl_checker
from qat_edge.manifest import sha256
from qat_edge.models.wheels import cache_folder
from qat_edge.public_tasks import function_calls
from qat_edge.public_tasks.call_checker import Call, calls_in, calls_match

PLAY = {
    "name": "spotify.play",
    "parameters": {
        "type": "dict",
        "properties": {
            "artist": {"type": "string"},
            "minutes": {"type": "integer"},
            "volume": {"type": "float"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "options": {"type": "dict"},
            "parts": {"type": "array", "items": {"type": "dict"}},
        },
        "required": ["artist"],
    },
}
POSSIBLE: dict[str, list[Any]] = {
    "artist": ["Maroon 5", "The Maroon 5"], "minutes": [20, ""], "volume": [0.5, 1, ""],
    "tags": [["pop", "Rock-1"], ""],
    "options": [{"shuffle": [True], "mode": ["a", ""]}, ""], "parts": [[{"no": [1]}, {"no": [2, 3]}], ""],
}  # fmt: skip


def matches(arguments: dict[str, Any], name: str = "spotify.play") -> bool:
    return calls_match([Call(name, arguments)], [{"spotify.play": POSSIBLE}], [PLAY])


@pytest.mark.parametrize(
    "arguments",
    [
        {"artist": "Maroon 5"},
        {"artist": "the maroon-5"},  # case, spaces and hyphens do not count
        {"artist": "Maroon 5", "minutes": 20},
        {"artist": "Maroon 5", "volume": 0.5},
        {"artist": "Maroon 5", "volume": 1},  # an integer serves as a float
        {"artist": "Maroon 5", "tags": ["Pop", "rock 1"]},
        {"artist": "Maroon 5", "tags": []},  # may be left out, so BFCL accepts an empty list
        {"artist": "Maroon 5", "options": {"shuffle": True}},
        {"artist": "Maroon 5", "parts": [{"no": 1}, {"no": 3}]},
    ],
)
def test_right_calls(arguments: dict[str, Any]) -> None:
    assert matches(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},  # a required argument is missing
        {"artist": "Maroon 6"},
        {"artist": ["Maroon 5"]},
        {"artist": "Maroon 5", "minutes": 21},
        {"artist": "Maroon 5", "minutes": "20"},
        {"artist": "Maroon 5", "minutes": 20.0},
        {"artist": "Maroon 5", "minutes": True},
        {"artist": "Maroon 5", "album": "x"},
        {"artist": "Maroon 5", "tags": ["rock 1", "pop"]},  # the order of a list counts
        {"artist": "Maroon 5", "tags": ["pop", 1]},
        {"artist": "Maroon 5", "options": {"mode": "a"}},
        {"artist": "Maroon 5", "options": {"shuffle": True, "x": 1}},
        {"artist": "Maroon 5", "options": {"shuffle": False}},
        {"artist": "Maroon 5", "parts": [{"no": 2}, {"no": 1}]},
        {"artist": "Maroon 5", "parts": [{"no": 1}]},
        {"artist": "Maroon 5", "parts": [1, 2]},
    ],
)
def test_wrong_calls(arguments: dict[str, Any]) -> None:
    assert not matches(arguments)


def test_another_function_is_wrong() -> None:
    assert not matches({"artist": "Maroon 5"}, name="spotify_play")


def test_several_calls_match_in_any_order_and_each_once() -> None:
    possible = [{"spotify.play": {"artist": [artist]}} for artist in ("a", "b")]
    one, other = Call("spotify.play", {"artist": "a"}), Call("spotify.play", {"artist": "b"})
    assert calls_match([other, one], possible, [PLAY])
    assert not calls_match([one, one], possible, [PLAY])
    assert not calls_match([one], possible, [PLAY])
    assert not calls_match([one, other, other], possible, [PLAY])


def test_a_variable_is_compared_as_it_is() -> None:
    definition = {"name": "f", "parameters": {"properties": {"count": {"type": "integer"}}, "required": ["count"]}}
    possible = [{"f": {"count": ["item_count"]}}]
    assert calls_match([Call("f", {"count": "item_count"})], possible, [definition])
    assert not calls_match([Call("f", {"count": "Item_Count"})], possible, [definition])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', [Call("f", {"a": 1})]),
        ('Sure [1]: {"name": "f", "parameters": {}} and {"name": "g"}', [Call("f", {}), Call("g", {})]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": {"name": "x"}}}', [Call("f", {"a": {"name": "x"}})]),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [Call("f", {"a": 1})]),
        ('{"name": "f", "arguments": "{"}', []),
        ('{"name": "f", "arguments": [1]}', []),
        ('{"name": 3, "arguments": {}}', []),
        ("no calls [", []),
        ("[" * 100_000, []),
    ],
)  # fmt: skip
def test_calls_are_found_in_a_text(text: str, expected: list[Call]) -> None:
    assert calls_in(text) == expected


# --- BFCL's own checker --------------------------------------------------------------------------------------


@pytest.fixture
def wheel() -> Iterator[Path]:
    path = cache_folder() / "wheels" / function_calls.WHEEL.file_name
    if not path.is_file() or sha256(path) != function_calls.WHEEL.sha256:
        pytest.skip(f"{path} is not there; `qat-edge eval --task bfcl` downloads it")
    modules = set(sys.modules)
    yield path
    for name in set(sys.modules) - modules:
        if name.startswith("bfcl_eval"):
            del sys.modules[name]


def altered(value: Any, draw: random.Random) -> Any:
    """Return a value that differs a little, in type or in content."""
    further = [None, [], {}, 1, True, "x", [value], str(value)]
    if isinstance(value, str):
        further += [value.upper(), f"{value}.", value.replace(" ", "-"), ""]
    elif isinstance(value, list):
        further += [value[::-1], value[:-1], [altered(item, draw) for item in value]]
    elif isinstance(value, dict):
        further += [{**value, "x": 1}, dict(list(value.items())[1:]), {k: altered(v, draw) for k, v in value.items()}]
    elif isinstance(value, int | float):
        further += [value + 1, float(value), -value]
    return draw.choice(further)


def candidates(right: list[Call], draw: random.Random) -> Iterator[list[Call]]:
    yield right
    yield right[::-1]
    yield right[:-1]
    for _ in range(6 if right else 0):
        changed = [Call(call.name, dict(call.arguments)) for call in right]
        arguments = draw.choice(changed).arguments
        if arguments:
            name = draw.choice(list(arguments))
            arguments[name] = altered(arguments[name], draw)
        yield changed


def test_every_question_is_judged_as_by_bfcls_own_checker(wheel: Path) -> None:
    draw, judge = random.Random(0), bfcl_checker.load(wheel)
    count = right = 0
    for name, category in function_calls.CATEGORIES.items():
        task = function_calls.load(name, cache_folder())
        assert task.train is not None
        for question in [*task.test, *task.train()]:
            solution = question.solution or {"tool_calls": []}
            expected = [Call(**call["function"]) for call in solution["tool_calls"]]
            for calls in candidates(expected, draw):
                ours = calls_match(calls, question.expected, question.definitions)
                assert ours == judge(calls, question.expected, question.definitions, category), (question.id, calls)
                count, right = count + 1, right + ours
    assert count > 10_000 and 0.2 < right / count < 0.8
