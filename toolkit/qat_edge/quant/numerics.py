"""The only place that rounds. Training, freezing, exporting and checking all call these functions.

Weights: symmetric, `bits` wide, one scale for `group_size` neighbours in a row:

    s = bfloat16(max|w| / (2^(bits-1) - 1/2))        q = clamp(round(w * (1/s)), -2^(bits-1), 2^(bits-1) - 1)

which is torchao's symmetric choose_qparams_affine and quantize_affine [1] with one difference: the scale is rounded to
bfloat16 *before* it divides. XNNPACK and KleidiAI store group scales as bfloat16 [2]; rounding there, after
the codes were chosen, would ship other weights than were trained. A bfloat16 number is a float32 number
too, so every runtime dequantizes to the same float32 values.

Activations: asymmetric int8 per token, chosen at run time, torchao's own primitives unchanged [3].

[1] https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quant_primitives.py
[2] https://github.com/pytorch/executorch/blob/v1.4.1/backends/xnnpack/operators/node_visitor.py
[3] https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quantize_/workflows/intx/intx_unpacked_to_int8_tensor.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

QUANTIZER = "8da4w symmetric, bfloat16 scales, 1"  # its name in manifests; changed with the formulas above


def code_range(bits: int) -> tuple[int, int]:
    """Least and greatest code of a signed integer of `bits`."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def choose_scales(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Group scales of `weight` (out, in), bfloat16-representable, in its dtype: (out, in // group_size)."""
    low, high = code_range(bits)
    largest = weight.unflatten(-1, (-1, group_size)).abs().amax(dim=-1)
    return representable(largest / ((high - low) / 2))


def representable(scales: Tensor) -> Tensor:
    """Positive scales as every runtime can hold them: the nearest bfloat16 numbers, in the dtype given."""
    return scales.clamp(min=torch.finfo(scales.dtype).eps).to(torch.bfloat16).to(scales.dtype)


def quantize(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes of `weight` (out, in) under `scales` (out, in // group): int8, (out, in)."""
    return round_codes(weight, scales, bits).to(torch.int8)


def round_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes as whole numbers in the dtype of `weight` (out, in), which `dequantize` takes too: (out, in)."""
    low, high = code_range(bits)
    groups = weight.unflatten(-1, (scales.shape[-1], -1))
    # Multiplied by the reciprocal, as torchao does: a division would round otherwise at some ties.
    return (groups * (1.0 / scales).unsqueeze(-1)).round_().clamp_(low, high).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Weights that the codes stand for, in the scales' dtype: (out, in)."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).to(scales.dtype)
    return (groups * scales.unsqueeze(-1)).flatten(-2)


def fake_quantize_weight(weight: Tensor, bits: int, group_size: int, scales: Tensor | None = None) -> Tensor:
    """`dequantize(quantize(weight))` under `scales`, or those it would choose itself; no gradient of its own."""
    if scales is None:
        scales = choose_scales(weight, bits, group_size)
    return dequantize(round_codes(weight, scales, bits), scales)


def straight_through(weight: Tensor, scales: Tensor, codes: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` (out, in) and `scales` (out, groups), given that of the dequantized weight (out, in).

    codes: `round_codes` of the weight under these scales.

    Learned step size quantization (https://arxiv.org/abs/1902.08153): a weight that is clamped has no gradient
    of its own and passes its code to the scale, any other passes q - w / s.
    """
    ratio = weight.unflatten(-1, (scales.shape[-1], -1)) / scales.unsqueeze(-1)
    by_code = codes.unflatten(-1, (scales.shape[-1], -1))
    inside = (by_code - ratio).abs() <= 0.5
    by_group = grad.unflatten(-1, (scales.shape[-1], -1))
    grad_scales = (by_group * torch.where(inside, by_code - ratio, by_code)).sum(dim=-1)
    return (by_group * inside).flatten(-2), grad_scales


def fake_quantize_activation(x: Tensor) -> Tensor:
    """`x` (..., features) as int8 represents it, one asymmetric scale and zero point per token, in float32."""
    x = x.float()
    block = [1] * (x.dim() - 1) + [x.shape[-1]]
    low, high = code_range(8)
    scale, zero_point = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, torch.int8, low, high, zero_point_dtype=torch.int8
    )
    codes = quantize_affine(x, block, scale, zero_point, torch.int8, low, high)
    return dequantize_affine(codes, block, scale, zero_point, torch.int8, low, high, output_dtype=x.dtype)


def round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the first argument (..., features) as int8 represents it."""
    return (fake_quantize_activation(args[0]), *args[1:])


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """`W + s B A` in float32 or wider. weight: (out, in); lora_a: (rank, in); lora_b: (out, rank).

    Every forward pass and the final merge call this one function, so both round the same numbers.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.add(weight.to(dtype), lora_b.to(dtype) @ lora_a.to(dtype), alpha=scaling)
