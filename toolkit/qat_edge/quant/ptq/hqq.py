"""Group scales of least squared error, instead of those of the largest weights.

Two searches: `hqq_scales`, without data, by torchao's scale-only HQQ, and `search_scales`, weighted by the inputs, for
the calibrated methods. Clipping the largest weights a little pays where it makes the steps of all others finer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq

from qat_edge.quant import numerics

RATIOS = torch.linspace(1.0, 0.7, 13).tolist()  # of the scales of the largest weights


def hqq_scales(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Return scales of least squared weight error, rounded to bfloat16 before any code is chosen.

    torchao's function also chooses codes, under scales that no runtime stores; they are not used.

    Args:
        weight: Shape (out, in).
        bits: Of the codes.
        group_size: Weights per scale.

    Returns:
        Shape (out, in // group_size), float32, bfloat16-representable.
    """
    low, high = numerics.code_range(bits)
    scales = _choose_qparams_and_quantize_scale_only_hqq(weight, [1, group_size], low, high)[1]
    return numerics.representable(scales.float())


def search_scales(weight: Tensor, bits: int, group_size: int, importance: Tensor) -> Tensor:
    """Return the scales of least weighted squared error among `RATIOS` of those of the largest weights.

    Args:
        weight: Shape (out, in).
        bits: Of the codes.
        group_size: Weights per scale.
        importance: Weight of a squared error in each column, such as the mean square of its inputs; shape (in,).

    Returns:
        Shape (out, in // group_size), bfloat16-representable.
    """
    largest = numerics.choose_scales(weight, bits, group_size)
    best, least = largest, torch.full_like(largest, torch.inf)
    # Errors of the rounded scales: a runtime stores no others.
    for ratio in RATIOS:
        scales = numerics.representable(largest * ratio)
        error = numerics.dequantize(numerics.quantize(weight, scales, bits), scales) - weight
        cost = (error.square() * importance).unflatten(-1, (-1, group_size)).sum(-1)
        # Each group takes the ratio that is best for it.
        better = cost < least
        best, least = torch.where(better, scales, best), torch.where(better, cost, least)
    return best
