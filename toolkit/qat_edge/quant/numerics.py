"""Quantization arithmetic. Training, freezing, exporting and verifying all call these functions.

Weights are symmetric, `bits` wide, with one scale for each group of `group_size` neighbors in a row:

    s = bfloat16(max|w| / (2^(bits-1) - 1/2))        q = clamp(round(w * (1/s)), -2^(bits-1), 2^(bits-1) - 1)

At 2 bits the scale is searched for the least squared error instead (`choose_scales`), and codes may be odd numbers
(`codebook`), of which the nearest is taken.

This is torchao's symmetric choose_qparams_affine and quantize_affine [1] with one difference: the scale is rounded to
bfloat16 *before* it divides. XNNPACK and KleidiAI store group scales as bfloat16 [2]; rounding the scale after the
codes were chosen would deploy other weights than were trained. Every bfloat16 number is also a float32 number, so every
runtime dequantizes to the same float32 values.

Activations are asymmetric int8 per token, with scales chosen at run time by torchao's own primitives, unchanged [3].

Every rounding of a weight to a code goes through `round_to_codes`, and every rounding of a scale through
`representable`. Coordinate descent (`ptq.coordinate_descent`) chooses what it rounds in another way, but rounds with
the same two functions. Two modules round for purposes of their own: `qlora_base` can store a frozen base as NF4, and
`diagnose.runtime_rounding` imitates runtimes that round activations differently from `fake_quantize_activation`.

[1] https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quant_primitives.py
[2] https://github.com/pytorch/executorch/blob/v1.4.1/backends/xnnpack/operators/node_visitor.py
[3] https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quantize_/workflows/intx/intx_unpacked_to_int8_tensor.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

from qat_edge.quant.codebook import Codebook, codebook_of

QUANTIZER = "8da4w symmetric, bfloat16 scales, 1"  # name in manifests; change it together with the formulas above


# Ratios to the scale of the largest weight that the search at 2 bits tries. All weights at the greatest of the levels
# -2 to 1 need 1.5; the best for normally distributed weights is 0.65 to 0.69 in groups of 32, 0.54 to 0.56 in 128.
RATIOS_2_BITS = tuple(0.3 + 0.05 * index for index in range(25))

# Errors that a search of scales computes at once: 512 KB, in the second-level cache of a CPU; 64 MB elsewhere.
SEARCHED_ON_CPU, SEARCHED = 2**17, 2**24

Codes = Codebook | int  # an int stands for all signed integers of so many bits


def as_codebook(codes: Codes) -> Codebook:
    """Return the codebook of signed integers for a number of bits, and a codebook itself."""
    return codebook_of(codes) if isinstance(codes, int) else codes


def code_range(codes: Codes) -> tuple[int, int]:
    """Return the least and the greatest code."""
    codebook = as_codebook(codes)
    return codebook.low, codebook.high


def choose_scales(weight: Tensor, codes: Codes, group_size: int) -> Tensor:
    """Return the scale of each group from its weights alone: by the largest, at 2 bits by the least squared error.

    Args:
        weight: Shape (out, in).
        codes: Codes that the weights get.
        group_size: Weights per scale; divides `in`.

    Returns:
        Shape (out, in // group_size), bfloat16-representable, in the dtype of `weight`.
    """
    if as_codebook(codes).searches_scales:
        return search_scales(weight, codes, group_size, RATIOS_2_BITS)
    return largest_scales(weight, codes, group_size)


def largest_scales(weight: Tensor, codes: Codes, group_size: int) -> Tensor:
    """Return the scale of each group by its largest weight; arguments and result as in `choose_scales`."""
    # At 4 bits the largest weight is 7.5 steps: a compromise between -8, which has no positive counterpart, and 7.
    low, high = code_range(codes)
    largest = weight.unflatten(-1, (-1, group_size)).abs().amax(dim=-1)
    return representable(largest / ((high - low) / 2))


def search_scales(
    weight: Tensor, codes: Codes, group_size: int, ratios: Sequence[float], importance: Tensor | None = None
) -> Tensor:
    """Return the scales of least squared error among `ratios` of those of the largest weights.

    Args:
        weight: Shape (out, in).
        codes: Codes that the weights get.
        group_size: Weights per scale; divides `in`.
        ratios: Candidates.
        importance: Weight of a squared error in each column, shape (in,); None for equal weights.

    Returns:
        Shape (out, in // group_size), bfloat16-representable.
    """
    largest = largest_scales(weight, codes, group_size)
    multiples = torch.tensor(ratios, dtype=largest.dtype).to(largest.device, non_blocking=True).view(-1, 1, 1)
    # All candidates of some rows at once: few calls and, on a CPU, buffers that stay in its cache.
    count = SEARCHED_ON_CPU if weight.device.type == "cpu" else SEARCHED
    rows = max(1, count // (len(ratios) * weight.shape[-1]))
    parts = zip(weight.flatten(0, -2).split(rows), largest.flatten(0, -2).split(rows), strict=True)
    found = [_best_multiples(part, scales, multiples, codes, importance) for part, scales in parts]
    return torch.cat(found).view_as(largest)


def _best_multiples(
    weight: Tensor, largest: Tensor, multiples: Tensor, codes: Codes, importance: Tensor | None
) -> Tensor:
    """Return the best of `multiples` (ratios, 1, 1) of the scales `largest` (out, in // group), in their shape."""
    groups = weight.unflatten(-1, (largest.shape[-1], -1))
    # Errors of the rounded scales: a runtime stores no others.
    candidates = representable(largest * multiples)  # (ratios, out, in // group)
    error = round_to_codes(groups * (1.0 / candidates).unsqueeze(-1), codes)
    error.mul_(candidates.unsqueeze(-1)).sub_(groups).square_()
    if importance is not None:
        error.mul_(importance.view(groups.shape[-2:]))

    # Each group takes the first of those that are best for it. A cost that overflows is none.
    cost = error.sum(-1).nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least, index = cost.min(dim=0, keepdim=True)
    return torch.where(least < torch.inf, candidates.gather(0, index), largest).squeeze(0)


def representable(scales: Tensor) -> Tensor:
    """Round positive scales to bfloat16, keeping their dtype.

    Runtimes store scales in bfloat16 or wider, so the result is exact everywhere.
    """
    # A group of zeros has scale 0, which nothing can be divided by.
    return scales.clamp(min=torch.finfo(scales.dtype).eps).to(torch.bfloat16).to(scales.dtype)


def round_to_codes(ratios: Tensor, codes: Codes) -> Tensor:
    """Round weights divided by their scales to the nearest codes, in place; codes keep the dtype of `ratios`."""
    codebook = as_codebook(codes)
    if codebook.step == 1:
        return ratios.round_().clamp_(codebook.low, codebook.high)
    # Counted in steps from the least code.
    steps = ratios.sub_(codebook.low).div_(codebook.step).round_()
    return steps.mul_(codebook.step).add_(codebook.low).clamp_(codebook.low, codebook.high)


def quantize(weight: Tensor, scales: Tensor, codes: Codes) -> Tensor:
    """Return the codes of `weight` (out, in) under `scales` (out, in // group): int8, (out, in)."""
    return round_codes(weight, scales, codes).to(torch.int8)


def round_codes(weight: Tensor, scales: Tensor, codes: Codes) -> Tensor:
    """Return the codes as whole numbers in the dtype of `weight` (out, in); `dequantize` takes them too."""
    groups = weight.unflatten(-1, (scales.shape[-1], -1))
    # Multiplied by the reciprocal, as torchao does: a division would round differently at some ties.
    return round_to_codes(groups * (1.0 / scales).unsqueeze(-1), codes).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the weights (out, in) that the codes stand for, in the dtype of the scales."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).to(scales.dtype)
    return (groups * scales.unsqueeze(-1)).flatten(-2)


def fake_quantize_weight(weight: Tensor, codes: Codes, group_size: int, scales: Tensor | None = None) -> Tensor:
    """Quantize and dequantize `weight` (out, in) under `scales`, by default those of `choose_scales`.

    The result has no useful gradient: see `straight_through`.
    """
    # Codes stay in the weight's dtype: int8 and back would only cost time.
    if scales is None:
        scales = choose_scales(weight, codes, group_size)
    return dequantize(round_codes(weight, scales, codes), scales)


def straight_through(
    weight: Tensor, scales: Tensor, codes: Tensor, grad: Tensor, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a weight and of its scales by learned step size quantization.

    https://arxiv.org/abs/1902.08153: a weight that is clamped has no gradient of its own and passes its code to the
    scale; any other passes q - w / s.

    Args:
        weight: Shape (out, in).
        scales: Shape (out, in // group).
        codes: `round_codes` of the weight under these scales, (out, in).
        grad: Gradient of the dequantized weight, (out, in).
        step: Distance between neighboring codes.

    Returns:
        Gradients of `weight` and of `scales`, in their shapes.
    """
    # As in `round_codes`: a division could put a weight at a tie further than half a step from its code.
    ratio = weight.unflatten(-1, (scales.shape[-1], -1)) * (1.0 / scales).unsqueeze(-1)
    codes_by_group = codes.unflatten(-1, (scales.shape[-1], -1))
    grad_by_group = grad.unflatten(-1, (scales.shape[-1], -1))

    # A clamped weight is further than half a step from its code.
    inside = (codes_by_group - ratio).abs() <= step / 2
    grad_scales = (grad_by_group * torch.where(inside, codes_by_group - ratio, codes_by_group)).sum(dim=-1)
    return (grad_by_group * inside).flatten(-2), grad_scales


def fake_quantize_activation(x: Tensor) -> Tensor:
    """Round `x` (..., features) to int8 with one asymmetric scale and zero point per token; returns float32."""
    # The scales are torchao's. The rest gives the numbers of its `quantize_affine` and `dequantize_affine` [3], bit for
    # bit, without their temporaries, which took most of the time.
    x = x.detach().float()
    block = [1] * (x.dim() - 1) + [x.shape[-1]]  # one block of values per token
    low, high = code_range(8)
    scale, zero_point = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, torch.int8, low, high, zero_point_dtype=torch.int8
    )
    scale, zero_point = scale.unsqueeze(-1), zero_point.to(x.dtype).unsqueeze(-1)
    codes = (x * (1.0 / scale)).round_().add_(zero_point).clamp_(low, high)
    return codes.sub_(zero_point).mul_(scale)


def round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round the first argument (..., features) of a module to int8. A forward pre-hook."""
    return (fake_quantize_activation(args[0]), *args[1:])


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Return `W + s B A` in float32 or wider.

    Every forward pass and the final merge call this one function, so that both round the same numbers.

    Args:
        weight: W, shape (out, in).
        lora_a: A, shape (rank, in).
        lora_b: B, shape (out, rank).
        scaling: s.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.add(weight.to(dtype), lora_b.to(dtype) @ lora_a.to(dtype), alpha=scaling)
