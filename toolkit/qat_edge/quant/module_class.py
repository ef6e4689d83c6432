"""Change the class of a module that is part of a model, in place.

The module object stays where it is, with its parameters, buffers, hooks and its name in the model. Only the methods
change, so that tied parameters stay tied and nothing has to be copied.
"""

from __future__ import annotations

from torch import nn


def insert_base(
    original: type[nn.Module], base: type[nn.Module], ours: type[nn.Module], prefix: str
) -> type[nn.Module]:
    """Return the class of a module whose `base` class is replaced by `ours`.

    A module of exactly the class `base` becomes one of class `ours`. A subclass, such as a scaled embedding, keeps its
    own forward, whose `super()` now reaches `ours`; its new name is `prefix` and the old one.
    """
    return ours if original is base else type(f"{prefix}{original.__name__}", (original, ours), {})


def wrap_class(original: type[nn.Module], ours: type[nn.Module], prefix: str) -> type[nn.Module]:
    """Return a class whose methods are those of `ours`, whose `super()` reaches `original`."""
    return type(f"{prefix}{original.__name__}", (ours, original), {})
