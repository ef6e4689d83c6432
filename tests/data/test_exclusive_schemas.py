"""Alternatives of "oneOf" that no value fits two of are found, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from qat_edge.data.exclusive_schemas import are_exclusive

CAT = {"type": "object", "required": ["kind", "age"], "properties": {"kind": {"const": "cat"}, "age": {}}}
DOG = {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": ["dog", "puppy"]}}}
ROOT = {"$defs": {"cat": CAT, "dog": DOG, "again": {"$ref": "#/$defs/cat"}}}


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "string"}, {"type": ["null", "integer"]}, {"type": "array"}],
        [{"const": 1}, {"const": True}, {"enum": ["a", None]}],
        [{"enum": [1, 2]}, {"type": "string"}],
        [CAT, DOG],
        [{"$ref": "#/$defs/again"}, {"$ref": "#/$defs/dog"}, {"type": "null"}],
        [False, {}],
        [{}],
    ],
)
def test_exclusive(parts: list[Any]) -> None:
    assert are_exclusive(ROOT, parts)


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [{"enum": [1, [2]]}, {"enum": [[2], 3]}],
        [{"type": "string"}, {}],
        [CAT, {**DOG, "type": ["object", "null"]}, {"type": "null"}],
        [CAT, {**DOG, "required": []}],
        [{**CAT, "type": ["object", "array"]}, {**DOG, "type": ["object", "array"]}],
        [True, {"type": "null"}],
        [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/again"}],
    ],
)
def test_not_exclusive(parts: list[Any]) -> None:
    assert not are_exclusive(ROOT, parts)


def test_endless_objects_are_compared_to_a_depth() -> None:
    node = {"type": "object", "required": ["next"], "properties": {"next": {"$ref": "#/$defs/node"}}}
    assert not are_exclusive({"$defs": {"node": node}}, [node, {**node}])
