"""Compare function calls with the possible answers of the Berkeley Function-Calling Leaderboard (BFCL).

The rules are those of BFCL's comparison of syntax trees for Python (`ast_checker.py` in bfcl-eval), on calls that are
JSON already:

    - as many calls as expected, each the right function; with several calls, the order does not matter
    - every required argument is given, and none that is not in both the definition and the possible answer
    - an argument may be left out only if "" is among its possible values
    - an argument has the type of the definition, an integer serving as a float, or the type of its possible value
      (a variable, such as "user_id" where the definition has an integer)
    - text is equal without regard to case, spaces, quotation marks and , . / - _ * ^
    - objects are compared key by key, lists item by item

BFCL's own checker imports the clients of a dozen APIs. A test compares the two on all questions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qat_edge.errors import DataError
from qat_edge.evaluate.metrics import json_in_text
from qat_edge.readers import parse_json

TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict,
    "any": str,
}  # fmt: skip
LISTS = ("array", "tuple")
OPTIONAL = ""  # among the possible values of an argument that may be left out
IGNORED = re.compile(r"[ ,./\-_*^]")  # in texts
ARGUMENTS = ("arguments", "parameters")  # keys that models give them under


class Call(NamedTuple):
    """A function call: its name, and its arguments by name."""

    name: str
    arguments: dict[str, Any]


# --- calls in a text ---------------------------------------------------------------------------------------


def calls_in(text: str) -> list[Call]:
    """Return the calls that a model wrote as JSON, {"name": ..., "arguments": {...}}, alone or in lists."""
    found = []
    for value, _, _ in json_in_text(text):
        items = value if isinstance(value, list) else [value]
        found += [call for item in items if (call := _as_call(item)) is not None]
    return found


def _as_call(value: Any) -> Call | None:
    """Return a JSON value as a call, or None if it is something else."""
    # The form of the APIs has the call inside: {"type": "function", "function": {"name", "arguments"}}.
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = next((value[key] for key in ARGUMENTS if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "arguments", DataError)
        except DataError:
            return None
    return Call(value["name"], arguments) if isinstance(arguments, dict) else None


# --- comparison --------------------------------------------------------------------------------------------


def calls_match(
    calls: Sequence[Call], possible: Sequence[Mapping[str, Any]], definitions: Sequence[Mapping[str, Any]]
) -> bool:
    """Return whether calls are right.

    Args:
        calls: What the model wrote.
        possible: One object a call, {name of the function: {argument: [possible values]}}.
        definitions: The functions, {"name", "parameters": {"properties", "required"}}.
    """
    if len(calls) != len(possible):
        return False

    # As BFCL does: each expected call takes the first of the remaining calls that fits.
    remaining = list(calls)
    for answer in possible:
        (name, arguments), *_ = answer.items()
        definition = next(each for each in definitions if each["name"] == name)
        match = next((call for call in remaining if _call_matches(call, arguments, definition)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _call_matches(call: Call, possible: Mapping[str, list[Any]], definition: Mapping[str, Any]) -> bool:
    properties, required = definition["parameters"]["properties"], definition["parameters"].get("required", ())
    given = call.arguments
    if call.name != definition["name"] or not all(name in given for name in required):
        return False
    if not all(name in properties and name in possible for name in given):
        return False
    if not all(_argument_matches(value, possible[name], properties[name]) for name, value in given.items()):
        return False
    return all(name in given or OPTIONAL in values for name, values in possible.items())


def _argument_matches(value: Any, possible: list[Any], schema: Mapping[str, Any]) -> bool:
    """Return whether the value of an argument has the right type and is one of the possible values."""
    expected: Any = TYPES[schema["type"]]
    if expected is float and type(value) is int:
        value = float(value)

    # Where the possible values are of another type than the definition, they are names of variables.
    of_answer = next((type(each) for each in possible if each != OPTIONAL), None)
    is_variable = of_answer is not None and of_answer is not expected
    item_type = TYPES[schema["items"]["type"]] if schema["type"] in LISTS and "items" in schema else None
    if type(value) is not expected:
        # A value of the answer's type is compared as it is.
        return type(value) is of_answer and value in possible
    if item_type is not None and not _items_have_type(value, possible, item_type):
        return False
    if is_variable:
        return value in possible

    if expected is dict:
        return any(_object_matches(value, each) for each in possible if isinstance(each, dict))
    if expected is list and item_type is dict:
        return any(_objects_match(value, each) for each in possible if _is_list(each))
    if expected is str:
        return _plain(value) in [_plain(each) for each in possible if isinstance(each, str)]
    if expected is list:
        return _plain_items(value) in [_plain_items(each) for each in possible if _is_list(each)]
    return value in possible


def _is_list(possible: Any) -> bool:
    """Return whether a possible value is a list. Where the argument may be left out, BFCL accepts an empty one too."""
    return isinstance(possible, list) or possible == OPTIONAL


def _items_have_type(value: list[Any], possible: list[Any], item_type: type) -> bool:
    """Return whether each item of a list has the type of the definition, or of the items of one possible value."""

    def fits(item: Any, answer: list[Any]) -> bool:
        of_answer = next((type(each) for each in answer if each != OPTIONAL), None)
        return type(item) is item_type or type(item) is of_answer

    return any(not isinstance(answer, list) or all(fits(item, answer) for item in value) for answer in possible)


def _object_matches(value: Any, possible: Mapping[str, list[Any]]) -> bool:
    """Return whether each key has one of its possible values, and no other key is there."""
    if not isinstance(value, dict) or not all(key in possible for key in value):
        return False
    if not all(_plain(item) in [_plain(each) for each in possible[key]] for key, item in value.items()):
        return False
    return all(key in value or OPTIONAL in values for key, values in possible.items())


def _objects_match(value: list[Any], possible: Sequence[Any]) -> bool:
    """Return whether a list of objects matches one possible list, in order."""
    pairs = zip(value, possible, strict=False)
    return len(value) == len(possible) and all(_object_matches(*pair) for pair in pairs)


def _plain_items(values: Sequence[Any]) -> list[Any]:
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """Return text without case, punctuation and the kind of quotation marks, and any other value as it is."""
    return IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
