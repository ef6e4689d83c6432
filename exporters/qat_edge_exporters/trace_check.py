"""Checks around tracing a model of transformers into a graph, for every format that is traced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from qat_edge.errors import ExportError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

EXECUTORCH, ONNX = "executorch", "onnx"  # formats, for messages


def check_attention(model: PreTrainedModel, replaced: int, format: str) -> None:
    """Refuse a model of which only `replaced` layers compute attention in a replaceable way.

    Raises:
        ExportError: not all do.
    """
    if replaced != model.config.num_hidden_layers:
        raise ExportError(
            f"{type(model).__name__}: {replaced} of {model.config.num_hidden_layers} layers attend "
            f"through transformers' AttentionInterface; {format} export needs all of them to."
        )


@contextmanager
def tracing_errors(model: nn.Module, format: str) -> Iterator[None]:
    """Inside the block, compute no gradients, ignore warnings, and report failures as those of tracing `model`.

    Raises:
        ExportError: code in the block failed.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the operators themselves use deprecated calls of torch
        try:
            yield
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ExportError(
                f"{type(model).__name__} cannot be traced for {format}: {str(error).splitlines()[0]}"
            ) from error
