"""Check data that comes from a device: a damaged or hostile one must not stop or fill this machine.

Every function raises ValueError or TypeError, which callers turn into an error that names the device.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

MOST_JSON_BYTES = 64 * 1024**2
MOST_DIGITS = 18  # of a number; more are no size, count or time
LARGEST = 2**63 - 1
MOST_ITEMS = 10_000_000  # of a list
MOST_CHARACTERS = 200  # of a name that is shown
Record = TypeVar("Record")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of limited size.

    Raises:
        ValueError: it is too large, no JSON, nested too deep, or no object.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MOST_JSON_BYTES + 1)
    if len(data) > MOST_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MOST_JSON_BYTES} bytes")
    return parse_json(data.decode("utf-8"))


def parse_json(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is no JSON, nested too deep, or no object.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    return found


def whole_number(text: str) -> int | None:
    """Parse a count or a size; None where the text is no number of at most 18 digits."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return text without control characters, which a terminal would obey, cut to `most` characters."""
    shown = "".join(character if character.isprintable() else " " for character in text[: most + 1])
    return shown if len(shown) <= most else shown[:most] + "..."


def record(cls: type[Record], values: object) -> Record:
    """Build a dataclass from a JSON object, checking the type and the range of every field.

    Raises:
        TypeError: the fields are not those of the class, or one has another type.
        ValueError: a number is not finite, or a figure is too large.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"expected an object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    if names != set(values):
        different = sorted(map(printable, names ^ set(values)))
        raise TypeError(f"missing or unknown fields: {', '.join(different[:5])}")
    return cls(**{name: checked(values[name], hints[name], name) for name in names})


def checked(value: Any, hint: Any, name: str) -> Any:
    """Return a value of JSON as the type `hint`: text, number, flag, a tuple of one of them, or None where permitted.

    Raises:
        TypeError, ValueError: see `record`.
    """
    if isinstance(hint, types.UnionType):
        inner = [each for each in typing.get_args(hint) if each is not types.NoneType]
        return None if value is None else checked(value, inner[0], name)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or len(value) > MOST_ITEMS:
            raise TypeError(f"{name} is no list of a permitted length")
        return tuple(checked(item, typing.get_args(hint)[0], name) for item in value)
    # A flag is an integer to Python, and an integer is a permitted real number.
    permitted = (int, float) if hint is float else (hint,)
    if type(value) not in permitted:
        raise TypeError(f"{name} is {type(value).__name__}, expected {hint.__name__}")
    if isinstance(value, str):
        return printable(value)
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"{name} is not a finite number within 64 bits")
    return value
