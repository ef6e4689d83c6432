"""Import a function when it is needed, by its name as "module:function"."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(entry: str) -> Any:
    """Return the object that `entry` names, such as "package.module:function"."""
    module, _, attribute = entry.partition(":")
    return getattr(import_module(module), attribute)
