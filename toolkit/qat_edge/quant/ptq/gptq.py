"""GPTQ (https://arxiv.org/abs/2210.17323): round a matrix column by column, and let the columns to come make up for it.

With H = sum x x^T over a layer's inputs and U the upper Cholesky factor of its inverse, rounding column j with error

    e = (w_j - q_j) / U_jj        is made up for by        w_k -= e U_jk    for every k > j

which is the least-squares answer for the outputs. What is kept of each column is its float value just before it
was rounded, so that rounding the whole matrix to nearest gives the same codes. Inputs are rounded to int8 as in
deployment; a group's scales are chosen when the group is reached, from weights that were already made up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from qat_edge.errors import DataError
from qat_edge.quant import numerics
from qat_edge.quant.ptq.blockwise import Block, gram, relative_error, tokens_of
from qat_edge.quant.ptq.hqq import search_scales
from qat_edge.quant.scheme import WeightScheme

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it: the paper's


@dataclass
class Compensator:
    """GPTQ on one block after another. errors, nearest: of each layer's outputs, GPTQ's and round-to-nearest's."""

    errors: list[float] = field(default_factory=list)
    nearest: list[float] = field(default_factory=list)
    name: ClassVar[str] = "GPTQ"

    def treat(self, block: Block) -> dict[str, Tensor]:
        """Compensate every int4 weight of the block in place; its scales by name.

        Raises:
            DataError: the inputs say too little about the weights.
        """
        groups = block.compensated()
        hessians = accumulate(block, [names[0] for names in groups])
        scales: dict[str, Tensor] = {}
        for names in groups:
            hessian = hessians.pop(names[0])
            with torch.autocast(hessian.device.type, enabled=False):
                factor = inverse_factor(hessian, names[0])
                scales |= self.settle(block, names, block.weights(names), hessian, factor)
        return scales

    def summary(self) -> list[str]:
        """For people: how far the outputs of the layers are off, root mean square over layers."""
        count = len(self.errors)
        ours, theirs = ((sum(errors) / max(count, 1)) ** 0.5 for errors in (self.errors, self.nearest))
        return [f"{self.name}: outputs of {count} layers are off by {ours:.1%}, rounded to nearest by {theirs:.1%}"]

    def settle(
        self, block: Block, names: list[str], weight: Tensor, hessian: Tensor, factor: Tensor
    ) -> dict[str, Tensor]:
        """Compensate layers that share an input towards `weight`, their rows one below the other; scales by name."""
        spec = block.specs[names[0]]
        compensated, scales = self.choose(weight, hessian, factor, spec)
        rounded = numerics.dequantize(numerics.quantize(compensated, scales, spec.bits), scales)
        nearest = numerics.fake_quantize_weight(weight, spec.bits, spec.group_size)
        sizes = [block.linears[name].weight.shape[0] for name in names]
        parts = zip(*(rows.split(sizes) for rows in (weight, rounded, nearest, compensated, scales)), strict=True)
        found: dict[str, Tensor] = {}
        for name, (wanted, ours, theirs, kept, own) in zip(names, parts, strict=True):
            self.errors.append(relative_error(wanted, ours, hessian))
            self.nearest.append(relative_error(wanted, theirs, hessian))
            block.linears[name].weight.data.copy_(kept)
            found[name] = own
        return found

    def choose(self, weight: Tensor, hessian: Tensor, factor: Tensor, spec: WeightScheme) -> tuple[Tensor, Tensor]:
        """What rounds to the codes chosen for `weight` (out, in), and the scales (out, in // group)."""
        return compensate(weight, hessian, factor, spec)


def accumulate(block: Block, names: list[str]) -> dict[str, Tensor]:
    """Sum of x x^T over the tokens each layer is given, rounded as in deployment: (in, in) by name, float32."""
    sums: dict[str, Tensor] = {}
    with block.rounded_inputs():  # registered first, so that what is seen is rounded
        for batch in block.batches:

            def see(name: str, x: Tensor, keep: Tensor = batch.keep) -> None:
                if name in names:
                    product = gram(tokens_of(x, keep))
                    sums[name] = sums[name].add_(product) if name in sums else product

            block.observe(batch, see)
    return sums


def inverse_factor(hessian: Tensor, name: str, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor U of the damped Hessian's inverse, U^T U = (H + damping)^-1: (in, in), float32.

    damping: of the Hessian's mean diagonal.

    Raises:
        DataError: the Hessian is not positive definite even so.
    """
    # float64: squared inputs span ten orders of magnitude in models with outlier channels.
    damped = hessian.double()
    damped.diagonal().add_(damping * hessian.diagonal().double().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not bool(torch.isfinite(hessian).all()):
        found = "all zero" if not bool(hessian.any()) else f"finite: {bool(torch.isfinite(hessian).all())}"
        raise DataError(
            f"GPTQ: the inputs of {name} in the calibration data do not determine its weights ({found}): the damped "
            "Hessian has no Cholesky factor. Give more or other calibration data, or take rtn or hqq."
        )
    return upper.float()


def compensate(weight: Tensor, hessian: Tensor, factor: Tensor, spec: WeightScheme) -> tuple[Tensor, Tensor]:
    """Each column of `weight` (out, in) as it is just before it is rounded, and the scales (out, in // group)."""
    work = weight.clone()
    importance = hessian.diagonal()
    found = []
    for start in range(0, weight.shape[1], spec.group_size):
        end = start + spec.group_size
        group = work[:, start:end]
        scales = search_scales(group, spec.bits, spec.group_size, importance[start:end])
        errors = _round_group(group, scales, factor[start:end, start:end], spec.bits)
        work[:, end:] -= errors @ factor[start:end, end:]
        found.append(scales)
    return work, torch.cat(found, dim=1)


def _round_group(group: Tensor, scales: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Go through the columns of one group (out, group), in place; the error of each over U_jj: (out, group)."""
    errors = torch.empty_like(group)
    for j in range(group.shape[1]):
        column = group[:, j : j + 1]
        rounded = numerics.dequantize(numerics.quantize(column, scales, bits), scales)
        error = (column - rounded) / factor[j, j]
        group[:, j + 1 :] -= error * factor[j, j + 1 :]
        errors[:, j : j + 1] = error
    return errors
