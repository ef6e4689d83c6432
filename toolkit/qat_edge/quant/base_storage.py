"""Frozen base weights in 16 bits while adapters train: half the memory of float32, and not a bit of another result.

Models are loaded in float32. Most checkpoints hold bfloat16, and every bfloat16 or float16 number is a float32 number,
so a weight all of whose values one of them can hold is stored in it and widened again where it is used. Norms, biases
and everything that is not quantized stay in float32.

The start of QAT rotates weights and chooses codes in float32: `widen` before it, `narrow` after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat_edge import progress
from qat_edge.quant import fake
from qat_edge.quant.autocast import trial_pass
from qat_edge.quant.qlora_base import QloraLinear
from qat_edge.quant.scheme import Scheme

NARROW_DTYPES = (torch.bfloat16, torch.float16)
PROBE = 8  # tokens of the trial passes


class Narrowed(NamedTuple):
    """Result of `narrow`.

    Attributes:
        narrow: Weights in 16 bits.
        total: Weights that were considered.
        before_bytes: Memory of all of them before.
        after_bytes: Memory of all of them after.
    """

    narrow: int
    total: int
    before_bytes: int
    after_bytes: int

    def describe(self) -> str:
        """Return a line for people."""
        return (
            f"Base: {self.narrow} of {self.total} weights in 16 bits without a change, "
            f"{self.after_bytes / 1e6:.0f} MB instead of {self.before_bytes / 1e6:.0f} MB"
        )


def round_to_bfloat16(model: nn.Module, scheme: Scheme) -> None:
    """Round the weights of a float32 model that the scheme quantizes to bfloat16, keeping their dtype, in place."""
    with torch.no_grad():
        for name in scheme.weights:
            module: Any = model.get_submodule(name)
            module.weight.copy_(module.weight.to(torch.bfloat16))


def narrow(model: nn.Module, scheme: Scheme) -> Narrowed:
    """Store each frozen weight in 16 bits that loses nothing by it, in place.

    The outputs of a few tokens are computed before and after. If one bit of them changes, because a module reads the
    dtype of a weight, all weights become float32 again, and a warning says so.

    Args:
        model: A model prepared by `fake.insert`, with or without adapters, its switch off.
        scheme: Names the weights.
    """
    expected = _outputs(model)
    before = _size_bytes(model, scheme)
    with torch.no_grad():
        for weight in frozen_weights(model, scheme):
            exact = (w for w in map(weight.to, NARROW_DTYPES) if torch.equal(w.to(weight.dtype), weight))
            weight.data = next(exact, weight.data)

    if not torch.equal(_outputs(model), expected):
        widen(model, scheme)
        progress.warn(
            f"Base: {type(fake.base_of(model)).__name__} computes something else with weights in 16 bits, so they stay "
            "in float32"
        )
    weights = list(frozen_weights(model, scheme))
    narrow_weights = sum(map(fake.is_narrow, weights))
    return Narrowed(narrow_weights, len(weights), before, _size_bytes(model, scheme))


def widen(model: nn.Module, scheme: Scheme) -> None:
    """Store the weights that `narrow` stored in 16 bits in float32 again, in place."""
    for weight in frozen_weights(model, scheme):
        if fake.is_narrow(weight):
            weight.data = weight.data.float()


def frozen_weights(model: nn.Module, scheme: Scheme) -> Iterator[nn.Parameter]:
    """Yield the weights that may be stored in 16 bits, a shared table once.

    Modules with a forward of their own, such as Gemma's embedding, may compute in the dtype of their weight.
    """
    known = (fake.FakeQuantLinear.forward, fake.FakeQuantEmbedding.forward)
    found: dict[int, nn.Parameter] = {}
    read_elsewhere: set[int] = set()
    base = fake.base_of(model)
    for name in scheme.weights:
        module: Any = base.get_submodule(name)
        module = module.get_base_layer() if isinstance(module, fake.LoraFakeQuantLinear) else module
        if isinstance(module, QloraLinear):
            continue
        found[id(module.weight)] = module.weight
        if type(module).forward not in known:
            read_elsewhere.add(id(module.weight))
    yield from (w for key, w in found.items() if key not in read_elsewhere and not w.requires_grad)


def _outputs(model: nn.Module) -> Tensor:
    """Return the first output for a few tokens, in evaluation mode and without autocast."""
    with trial_pass(model) as device:
        ids = torch.arange(PROBE, device=device)[None]
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return torch.as_tensor(output[0])


def _size_bytes(model: nn.Module, scheme: Scheme) -> int:
    return sum(weight.numel() * weight.element_size() for weight in frozen_weights(model, scheme))
