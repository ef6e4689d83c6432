"""Find the experts of a mixture of experts, whose weights cannot be quantized here.

transformers keeps the weights of all experts in one tensor (experts, out, in) and multiplies by the rows of those that
a router chose. They are no linear layers, so neither the rounding of training nor the exporters reach them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from qat_edge.errors import ModelError
from qat_edge.models.meta_model import model_without_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EXPERT_NAME = re.compile(r"(^|\.)experts\.\d+\.")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in configurations


def refuse_experts(model: nn.Module) -> None:
    """Refuse a mixture of experts.

    Args:
        model: May be on the meta device.

    Raises:
        ModelError: Weights are in tensors of more than two dimensions, or in a numbered list of experts.
    """
    for name, module in model.named_modules():
        # Convolutions have such weights too, and are counted as unquantized.
        stacked = not isinstance(module, nn.modules.conv._ConvNd) and any(
            sum(size > 1 for size in parameter.shape) > 2 for parameter in module.parameters(recurse=False)
        )
        if stacked or (isinstance(module, nn.Linear) and _EXPERT_NAME.search(name)):
            kind = "stacks the weights of several layers in one tensor" if stacked else "is one of several experts"
            raise ModelError(
                f"{type(model).__name__}: {type(module).__name__} ({name}) {kind}, as mixtures of experts do. Neither "
                "training nor export can quantize it; use a dense model."
            )


def refuse_expert_config(config: PretrainedConfig) -> None:
    """Refuse a mixture of experts by its configuration, before gigabytes of weights are read.

    Raises:
        ModelError: The configuration counts experts, and the model made from it has them.
    """
    counts = [getattr(config, name, None) for name in COUNTS]
    if not any(isinstance(count, int) and count > 1 for count in counts):
        return
    try:
        model = model_without_weights(config)
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # code of its own: `refuse_experts` sees the loaded model
    refuse_experts(model)
