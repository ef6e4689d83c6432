"""Measure how far training moved quantized weights, in steps of their codes.

A weight is rounded to a multiple of its scale, so an update much smaller than one scale (a step) changes a code only
near a rounding tie, and an update of several steps discards what the PTQ initialization compensated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat_edge.quant import fake, numerics
from qat_edge.quant.scheme import WeightScheme


@dataclass(frozen=True)
class Movement:
    """Change of the weights of all quantized linear layers.

    Attributes:
        rms_steps: Root mean square of the change of a weight, in steps of its scale before the change.
        codes_changed: Share of the codes that differ, 0 to 1.
        rms_scale: Root mean square of the relative change of a scale.
    """

    rms_steps: float
    codes_changed: float
    rms_scale: float

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"QAT moved weights by {self.rms_steps:.2g} of a code's step and scales by {self.rms_scale:.1%} (root mean "
            f"square); {self.codes_changed:.2%} of the codes changed"
        )


def measure(model: nn.Module, layers: Mapping[str, WeightScheme], before: Mapping[str, Tensor]) -> Movement:
    """Compare the weights of a model in training with those under earlier values of its trained parameters.

    One layer is computed at a time, and the model ends as it was, bit for bit.

    Args:
        model: A model prepared by `fake.insert`, with or without adapters.
        layers: Bits and group size by module name.
        before: Earlier values by parameter name, of every trained parameter of these layers.
    """
    base, merged = fake.base_of(model), fake.MergedWeights(model)
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in before}
    squares, changed, scale_squares, weights, scales = 0.0, 0, 0.0, 0, 0
    with torch.no_grad():
        for name, spec in layers.items():
            layer = base.get_submodule(name)
            now = _rounded(layer, merged, name, spec)
            own = {p: before[names[id(p)]] for p in layer.parameters() if id(p) in names}
            with _values(own):
                then = _rounded(layer, merged, name, spec)
            groups = (now.weight.double() - then.weight).unflatten(-1, (then.scales.shape[-1], -1))
            steps = groups / (then.scales.unsqueeze(-1) * spec.codebook.step)
            squares += float(steps.pow(2).sum())
            changed += int((now.codes != then.codes).sum())
            scale_squares += float((now.scales / then.scales - 1).double().pow(2).sum())
            weights, scales = weights + now.codes.numel(), scales + now.scales.numel()
    return Movement(math.sqrt(squares / weights), changed / weights, math.sqrt(scale_squares / scales))


@dataclass(frozen=True)
class _Rounded:
    """Merged weight (out, in), scales (out, in // group) in bfloat16, and codes (out, in) of one layer."""

    weight: Tensor
    scales: Tensor
    codes: Tensor


def _rounded(layer: nn.Module, merged: fake.MergedWeights, name: str, spec: WeightScheme) -> _Rounded:
    """Merge and round one layer as its forward pass does."""
    weight = merged.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    scales = layer.trained_scales if isinstance(layer, fake.FakeQuantLinear | fake.LoraFakeQuantLinear) else None
    if scales is None:
        rounded_scales = numerics.choose_scales(weight, spec.codebook, spec.group_size)
    else:
        rounded_scales = numerics.representable(scales)
    # Of trained weights without adapters the merged weight is the parameter itself, whose values are exchanged.
    return _Rounded(weight.clone(), rounded_scales, numerics.round_codes(weight, rounded_scales, spec.codebook))


@contextmanager
def _values(of: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give parameters other values inside the block."""
    current = _exchange(of.items())
    try:
        yield
    finally:
        _exchange(current)


def _exchange(values: Iterable[tuple[nn.Parameter, Tensor]]) -> list[tuple[nn.Parameter, Tensor]]:
    """Set the data of parameters, and return what they had."""
    before = []
    for parameter, value in values:
        before.append((parameter, parameter.data))
        parameter.data = value.to(parameter.device, parameter.dtype)
    return before
