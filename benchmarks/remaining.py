"""What the remaining loss is made of: a frozen checkpoint with one part of its rounding switched off at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qat_edge import adapters
from qat_edge.errors import RunError
from qat_edge.quant import frozen, numerics

# The head's part is its weight and its input; weights and activations are those of every other linear layer.
PARTS = ("weights", "activations", "embedding", "head")
# Weights are not switched off: those that coordinate descent leaves to be rounded are no model before they are.
SWITCHED_OFF: Mapping[str, tuple[str, ...]] = {
    "all rounding on": (),
    "activations off": ("activations",),
    "embedding off": ("embedding",),
    "head off": ("head",),
    "weights alone on": ("activations", "embedding", "head"),
}


def partly_rounded(adapter: Path, quantized: Path, off: tuple[str, ...], say: Callable[[str], None]) -> Any:
    """The float model merged from `adapter`, rounded as `quantized` is except for the parts `off`.

    With nothing off it computes what `reference.load_exact(quantized)` does.

    Raises:
        RunError: the checkpoint's weights are not this model's.
    """
    unknown = set(off) - set(PARTS)
    if unknown:
        raise ValueError(f"parts {sorted(unknown)}: there are {', '.join(PARTS)}")
    model = adapters.merged_model(adapter, say).model
    plan, codes = frozen.read_scheme(quantized), frozen.read_weights(quantized)
    if set(codes) != set(plan.weights):
        raise RunError(f"{quantized}: its weights are not those of its scheme. Make it again with --force.")
    for name, spec in plan.weights.items():
        module = model.get_submodule(name)
        part = {plan.embedding: "embedding", plan.head: "head"}.get(name, "weights")
        if part not in off:
            weight = numerics.dequantize(codes[name].codes, codes[name].scales.float())
            module.weight = nn.Parameter(weight, requires_grad=False)
        if spec.quantize_input and ("head" if part == "head" else "activations") not in off:
            module.register_forward_pre_hook(numerics.round_input)
    return model.eval()
