"""Build a model without its weights, from its configuration alone, to look at its modules."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from qat_edge import remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_without_weights(config: PretrainedConfig, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """Build a model on the meta device.

    Args:
        config: Configuration of the model; it is left as it is.
        auto_class: Class of transformers that knows the model's class.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: transformers cannot build it from this configuration, for one
            because it needs code of its own and the command does not permit it.
    """
    config = copy.deepcopy(config)
    # No weights are read, and a quantization of them would need its library to be initialized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config, trust_remote_code=remote_code.permitted())
    return model
