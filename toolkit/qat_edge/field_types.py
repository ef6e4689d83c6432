"""Check that values read from a file have the types that their dataclasses declare."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

Check = Callable[[Any, str, str], None]  # value, name of its field, path of the field


def check_types(value: Any, hint: Any, name: str, check_value: Check) -> None:
    """Check a value and everything in it.

    Args:
        value: A dataclass, a list, a dictionary or a plain value.
        hint: Its declared type.
        name: Its path, for error messages.
        check_value: Called with each field of a dataclass whose type is right.

    Raises:
        TypeError: names the field.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and types.NoneType in inner):
        return
    if isinstance(hint, types.UnionType):
        check_types(value, next(each for each in inner if each is not types.NoneType), name, check_value)
        return
    # A flag is an integer to Python, and an integer is a permitted real number.
    permitted = (int, float) if hint is float else (list, tuple) if origin in (list, tuple) else (origin or hint,)
    if not isinstance(value, permitted) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{name} is {type(value).__name__}, expected {getattr(origin or hint, '__name__', hint)}")
    if dataclasses.is_dataclass(value):
        for field_name, field_hint in typing.get_type_hints(type(value)).items():
            check_types(getattr(value, field_name), field_hint, f"{name}.{field_name}", check_value)
            check_value(getattr(value, field_name), field_name, f"{name}.{field_name}")
    elif isinstance(value, list | tuple) and inner:
        for index, item in enumerate(value):
            check_types(item, inner[0], f"{name}[{index}]", check_value)
    elif isinstance(value, dict) and inner:
        for key, item in value.items():
            check_types(item, inner[1], f"{name}[{key!r}]", check_value)
