"""Walk through the schemas inside a JSON schema, and follow its references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from qat_edge.readers import shorten

# Keywords that hold schemas: by name, in a list, or one.
NAMED = ("properties", "patternProperties", "$defs", "definitions")
LISTED = ("anyOf", "allOf", "oneOf", "prefixItems")
IN_PLACE = ("anyOf", "allOf", "oneOf")  # those whose schemas are for the same value
SINGLE = ("items", "additionalProperties")


def parts_of(schema: Any, place: str = "$") -> Iterator[tuple[str, Any]]:
    """Yield a schema and all schemas inside it, each with its place: "$.properties.name"."""
    yield place, schema
    if not isinstance(schema, dict):
        return
    for key in NAMED:
        for name, part in schema[key].items() if isinstance(schema.get(key), dict) else ():
            yield from parts_of(part, f"{place}.{key}.{shorten(name)}")
    for key in LISTED:
        for index, part in enumerate(schema[key] if isinstance(schema.get(key), list) else ()):
            yield from parts_of(part, f"{place}.{key}[{index}]")
    for key in SINGLE:
        if key in schema:
            yield from parts_of(schema[key], f"{place}.{key}")


def resolve(schema: dict[str, Any], reference: str) -> Any:
    """Return the part of a schema that a reference such as "#/$defs/name" leads to; None where it leads nowhere."""
    if not reference.startswith("#"):
        return None
    found: Any = schema
    for key in reference[1:].split("/")[1:]:
        key = unquote(key).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isascii() and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            return None
    return found if reference == "#" or (reference.startswith("#/") and isinstance(found, dict | bool)) else None
