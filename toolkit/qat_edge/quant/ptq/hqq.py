"""Group scales that are not those of the largest weight: a little clipping pays where it makes the rest finer."""

from __future__ import annotations

import torch
from torch import Tensor

from qat_edge.quant import numerics

RATIOS = torch.linspace(1.0, 0.7, 13).tolist()


def search_scales(weight: Tensor, bits: int, group_size: int, importance: Tensor) -> Tensor:
    """Scales (out, in // group), bfloat16-representable, of least weighted squared error over `RATIOS`.

    weight: (out, in); importance: (in,), what a squared error in each column costs, such as its inputs' square.
    """
    largest = numerics.choose_scales(weight, bits, group_size)
    best, least = largest, torch.full_like(largest, torch.inf)
    for ratio in RATIOS:
        scales = numerics.representable(largest * ratio)
        error = numerics.dequantize(numerics.quantize(weight, scales, bits), scales) - weight
        cost = (error.square() * importance).unflatten(-1, (-1, group_size)).sum(-1)
        better = cost < least
        best, least = torch.where(better, scales, best), torch.where(better, cost, least)
    return best
