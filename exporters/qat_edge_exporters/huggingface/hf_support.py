"""Tell from a model's configuration, before it is frozen, whether compressed-tensors computes it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat_edge.models import tasks
from qat_edge.models.meta_model import model_without_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENS = 3
# What a pass without values raises at the latest where an operator needs them.
FAILURES = (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError, NotImplementedError)
TOKEN_DIMENSIONS = 3  # (batch, tokens, features): compressed-tensors takes the first two for those of the tokens


def missing(config: PretrainedConfig) -> str:
    """Return what compressed-tensors lacks for a model, as a sentence; empty where nothing is known."""
    if tasks.is_encoder_config(config):
        return f"{config.model_type} is an encoder, and this target is for models that generate text."
    if getattr(config, "auto_map", None):
        return f"{config.model_type} needs code of its own, which a folder for plain transformers does not have."
    name = _flattened_layer(config)
    if name:
        return (
            f"{name} of {config.model_type} gets its tokens in another shape than (batch, tokens, features), and "
            "compressed-tensors would round them all with one scale."
        )
    return ""


def _flattened_layer(config: PretrainedConfig) -> str:
    """Return a linear layer whose input has not three dimensions; empty if none is found.

    The model is built without weights and run on the meta device, as far as that goes: an export compares logits as
    well.
    """
    try:
        model: Any = model_without_weights(config)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""  # reported by whoever builds the model itself
    found: list[str] = []

    def note(name: str) -> Any:
        return lambda _, args: found.append(name) if args[0].dim() != TOKEN_DIMENSIONS else None

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta")
    # Most models take a finished mask, and look at the values of any other; some take none.
    for inputs in ({"attention_mask": mask}, {}):
        with torch.no_grad(), suppress(*FAILURES):
            model.eval()(input_ids=ids, use_cache=False, **inputs)
    return found[0] if found else ""
