"""Backends are literal tables, `name -> "module:attribute"`; this resolves one entry when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from qat_edge.errors import UsageError


def resolve(table: Mapping[str, str], name: str, what: str) -> Any:
    """The object that `table` names.

    Raises:
        UsageError: no such name; the known ones are listed.
    """
    if name not in table:
        raise UsageError(f"{what} '{name}' is not known. Known: {', '.join(sorted(table))}.")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
