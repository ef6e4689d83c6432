"""Import a function when it is needed, by its name as "module:function"."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from qat_edge.errors import UsageError


def load(entry: str) -> Any:
    """Return the object that `entry` names, such as "package.module:function"."""
    module, _, attribute = entry.partition(":")
    return getattr(import_module(module), attribute)


def resolve(table: Mapping[str, str], name: str, what: str) -> Any:
    """Return the object that `table` names; `what` is the flag that an error names.

    Raises:
        UsageError: no such name; the known ones are listed.
    """
    if name not in table:
        raise UsageError(f"{what} '{name}' is not known. Known: {', '.join(sorted(table))}.")
    return load(table[name])
