"""Group scales of least squared error, instead of those of the largest weights.

Two searches: `hqq_scales`, without data, by torchao's scale-only HQQ, and `search_scales`, weighted by the inputs, for
the calibrated methods. Clipping the largest weights a little pays where it makes the steps of all others finer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq

from qat_edge.quant import numerics
from qat_edge.quant.codebook import Codebook
from qat_edge.quant.numerics import Codes

RATIOS = torch.linspace(1.0, 0.7, 13).tolist()  # of the scales of the largest weights, at more than 2 bits
REFITS = 20  # of scales to their codes; random groups of 32 no longer change after about ten


def hqq_scales(weight: Tensor, codes: Codes, group_size: int) -> Tensor:
    """Return scales of least squared weight error, rounded to bfloat16 before any code is chosen.

    torchao's function also chooses codes, under scales that no runtime stores; they are not used. It knows no odd codes
    and starts from the largest weights, so at 2 bits scales and codes are fitted to each other here (`_refitted`).

    Args:
        weight: Shape (out, in).
        codes: Codes that the weights get.
        group_size: Weights per scale.

    Returns:
        Shape (out, in // group_size), float32, bfloat16-representable.
    """
    codebook = numerics.as_codebook(codes)
    if codebook.searches_scales:
        return _refitted(weight.float(), codebook, group_size)
    low, high = numerics.code_range(codebook)
    scales = _choose_qparams_and_quantize_scale_only_hqq(weight, [1, group_size], low, high)[1]
    return numerics.representable(scales.float())


def search_scales(weight: Tensor, codes: Codes, group_size: int, importance: Tensor) -> Tensor:
    """Return the scales of least weighted squared error among ratios of those of the largest weights.

    Args:
        weight: Shape (out, in).
        codes: Codes that the weights get.
        group_size: Weights per scale.
        importance: Weight of a squared error in each column, such as the mean square of its inputs; shape (in,).

    Returns:
        Shape (out, in // group_size), bfloat16-representable.
    """
    ratios = numerics.RATIOS_2_BITS if numerics.as_codebook(codes).searches_scales else RATIOS
    return numerics.search_scales(weight, codes, group_size, ratios, importance)


def _refitted(weight: Tensor, codebook: Codebook, group_size: int) -> Tensor:
    """Return scales after turns of rounding to the nearest codes and fitting the scale to them by least squares."""
    scales = numerics.choose_scales(weight, codebook, group_size)
    groups = weight.unflatten(-1, (-1, group_size))
    least = torch.full_like(scales, torch.inf)
    best = scales
    for _ in range(REFITS):
        codes = numerics.round_codes(weight, scales, codebook).unflatten(-1, (-1, group_size))
        cost = (codes * scales.unsqueeze(-1) - groups).square().sum(-1)
        better = cost < least
        best, least = torch.where(better, scales, best), torch.where(better, cost, least)
        # Where every code is 0, or the fit is negative, the smallest positive scale is as good as any.
        norms = codes.square().sum(-1).clamp(min=torch.finfo(scales.dtype).tiny)
        scales = numerics.representable((codes * groups).sum(-1) / norms)
    return best
