"""Find out whether no value fits two parts of a JSON schema, as the alternatives of "oneOf" need.

Only what is plain is found: other values of "enum" and "const", other types, and objects that both require a property
whose values exclude one another, such as the name of their kind.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from qat_edge.data.possible_values import TYPES
from qat_edge.data.schema_parts import resolve

MOST_LEVELS = 8  # of objects inside objects that are compared
Value = tuple[bool, Any]  # True is not 1 in JSON


def are_exclusive(schema: dict[str, Any], parts: list[Any]) -> bool:
    """Return whether every value is known to fit at most one of the parts.

    Args:
        schema: that the parts belong to, without references that lead back to themselves.
        parts: schemas of the same value.
    """
    targets = [_target(schema, part) for part in parts]
    return all(_exclude(schema, one, other, MOST_LEVELS) for one, other in combinations(targets, 2))


def _exclude(schema: dict[str, Any], one: Any, other: Any, levels: int) -> bool:
    """Return whether no value is known to fit both of two parts that are no references."""
    if one is False or other is False:
        return True
    if not isinstance(one, dict) or not isinstance(other, dict) or not levels:
        return False
    values, others = _values(one), _values(other)
    if values is not None and others is not None and not values & others:
        return True
    types = _types(one) & _types(other)
    return not types or (types == {"object"} and _exclude_by_property(schema, one, other, levels - 1))


def _exclude_by_property(schema: dict[str, Any], one: dict[str, Any], other: dict[str, Any], levels: int) -> bool:
    """Return whether two kinds of object require the same property with values that exclude one another."""
    mine, theirs = one.get("properties", {}), other.get("properties", {})
    both = set(one.get("required", ())) & set(other.get("required", ())) & set(mine) & set(theirs)
    return any(_exclude(schema, _target(schema, mine[name]), _target(schema, theirs[name]), levels) for name in both)


def _target(schema: dict[str, Any], part: Any) -> Any:
    """Follow references. What is next to them only excludes further values."""
    while isinstance(part, dict) and "$ref" in part:
        part = resolve(schema, part["$ref"])
    return part


def _values(part: dict[str, Any]) -> set[Value] | None:
    """Return the values of "const" or "enum"; None where there are none, or lists and objects among them."""
    values = [part["const"]] if "const" in part else part.get("enum")
    if values is None or any(isinstance(value, list | dict) for value in values):
        return None
    return {(isinstance(value, bool), value) for value in values}


def _types(part: dict[str, Any]) -> set[str]:
    """Return the types that a part may have."""
    values = _values(part)
    if values is not None:
        return {_type_of(value) for _, value in values}
    types = part.get("type", TYPES)
    types = {types} if isinstance(types, str) else set(types)
    # Every integer is a number, and 1.0 is an integer.
    return (types - {"integer"}) | ({"number"} if "integer" in types else set())


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return "string" if isinstance(value, str) else "number"
