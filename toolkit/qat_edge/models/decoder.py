"""Decoder layers of a causal language model: the list of them, and the layer that a module belongs to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from qat_edge.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """Return the decoder layers, first to last: modules whose class and attributes depend on the model.

    Raises:
        ModelError: There is no list of layers, or its length is not the one in the configuration.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.num_hidden_layers:
        raise ModelError(
            f"{type(model).__name__}: no list of {model.config.num_hidden_layers} decoder layers found; "
            "qat-edge measures layer by layer in models that have one."
        )
    return list(layers)


def layer_index(name: str) -> int | None:
    """Return the number of the decoder layer that a module belongs to, None for embedding and head."""
    found = re.search(r"\.layers\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None
