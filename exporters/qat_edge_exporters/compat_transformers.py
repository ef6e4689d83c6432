"""Private names of transformers, and functions of it that are replaced while a model is traced.

Read in transformers 5.23.0, and tested with 5.24.0. Importing this loads neither ExecuTorch nor ONNX Runtime.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, AttentionInterface

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RotateHalf = Callable[[Tensor], Tensor]


@contextmanager
def replace_attention(name: str, function: Callable[..., Any], config: PretrainedConfig) -> Iterator[None]:
    """Inside the block, models of `config` compute attention by `function`, registered as `name`.

    `AttentionInterface.register` is public. Selecting the function for a model that is already built, and removing it
    afterwards, are not.
    """
    before = config._attn_implementation
    AttentionInterface.register(name, function)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        del AttentionInterface._global_mapping[name]


def has_replaceable_attention(config: PretrainedConfig) -> bool:
    """Return whether models of `config` compute attention through `AttentionInterface`."""
    body: Any = MODEL_MAPPING.get(type(config), None)
    return bool(getattr(body, "_supports_attention_backend", False))


@contextmanager
def replace_rotate_half(model: nn.Module, make: Callable[[RotateHalf], RotateHalf]) -> Iterator[None]:
    """Inside the block, `rotate_half` of the model's own source file is what `make` returns for it.

    Each file of an architecture has its own copy of that function, and calls it by its global name. Models without
    one are left alone.
    """
    file: Any = sys.modules[type(model).__module__]
    original = getattr(file, "rotate_half", None)
    if original is None:
        yield
        return
    file.rotate_half = make(original)
    try:
        yield
    finally:
        file.rotate_half = original
