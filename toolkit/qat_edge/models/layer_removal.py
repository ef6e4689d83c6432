"""Remove decoder layers from a model, so that what remains is an ordinary model of fewer layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from qat_edge.errors import ModelError
from qat_edge.models.decoder import decoder_layers

# Lists in a configuration that contain indices of layers. All its other lists about layers have one value per layer.
INDEX_LISTS = ("mlp_only_layers",)


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Remove all other decoder layers in place: weights, configuration, and indices into the KV cache.

    Args:
        model: A causal language model.
        kept: Indices of the layers to keep, ascending.

    Raises:
        ModelError: The configuration cannot describe the remaining layers.
    """
    layers = decoder_layers(model)
    if not kept or any(b <= a for a, b in zip([-1, *kept], kept, strict=False)) or kept[-1] >= len(layers):
        raise ModelError(
            f"kept_layers: {kept} are not increasing numbers of the model's {len(layers)} layers, counted from 0. The "
            "record of the run was changed. Restore it, or train again."
        )

    keep_settings(model.config, kept)

    # A layer finds its keys and values in the cache by this index, which has to be consecutive again.
    for position, i in enumerate(kept):
        for module in layers[i].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position

    model.base_model.layers = nn.ModuleList(layers[i] for i in kept)
    _check_rebuilt(model)


def keep_settings(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Remove the settings of all other layers from a configuration, in place."""
    config = config.get_text_config(decoder=True)
    for name, value in list(vars(config).items()):
        if "layer" not in name or not isinstance(value, list | tuple):
            continue
        if name in INDEX_LISTS:
            setattr(config, name, [kept.index(i) for i in value if i in kept])
        elif len(value) == config.num_hidden_layers:
            setattr(config, name, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)


def _check_rebuilt(model: PreTrainedModel) -> None:
    """Check that the configuration alone builds a model with the same parameters, as loading the saved model does."""
    with torch.device("meta"):
        rebuilt = type(model)(copy.deepcopy(model.config))

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {name: tuple(p.shape) for name, p in rebuilt.named_parameters()}
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise ModelError(
            f"--keep-layers: the layers of {type(model).__name__} differ by their position ({wrong[0]} would be "
            f"{expected.get(wrong[0])}, not {shapes.get(wrong[0])}). Try --prune first, or keep all layers."
        )
