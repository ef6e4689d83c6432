"""GPTQ (https://arxiv.org/abs/2210.17323): round a matrix column by column, and let later columns compensate.

With H = sum x x^T over a layer's inputs and U the upper Cholesky factor of its inverse, rounding column j with error

    e = (w_j - q_j) / U_jj        is compensated by        w_k -= e U_jk    for every k > j

which is the least-squares solution for the outputs. The float value kept of each column is the one just before it was
rounded, so that rounding the whole matrix to nearest gives the same codes. Inputs are rounded to int8 as in deployment;
the scales of a group are chosen when the group is reached, from weights that compensate for earlier errors already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qat_edge.errors import DataError
from qat_edge.quant import numerics
from qat_edge.quant.codebook import Codebook
from qat_edge.quant.ptq.block_calls import KeptTokens
from qat_edge.quant.ptq.blockwise import Block, add_gram, mirrored, output_energy, relative_error, token_rows
from qat_edge.quant.ptq.group_buffers import GroupBuffers
from qat_edge.quant.ptq.hqq import search_scales
from qat_edge.quant.scheme import WeightScheme
from qat_edge.readers import counted

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it: the paper's


class Compensated(NamedTuple):
    """A float weight (out, in) that rounds to the chosen codes under `scales` (out, in // group)."""

    weight: Tensor
    scales: Tensor


@dataclass
class GPTQ:
    """GPTQ on one block after another.

    Attributes:
        errors: Relative squared error of each layer's outputs.
        nearest: The same with the layer rounded to nearest.
    """

    errors: list[float] = field(default_factory=list)
    nearest: list[float] = field(default_factory=list)
    name: ClassVar[str] = "GPTQ"

    def quantize_block(self, block: Block) -> dict[str, Tensor]:
        """Compensate every weight in groups of the block in place; returns their scales by name.

        Raises:
            DataError: The inputs do not determine the weights.
        """
        groups = block.input_groups_in_few_bits()
        hessians = accumulate_hessians(block, [names[0] for names in groups])
        scales: dict[str, Tensor] = {}
        for names in groups:
            # Layers that share an input share its Hessian.
            hessian = hessians.pop(names[0])
            with torch.autocast(hessian.device.type, enabled=False):
                factor = inverse_factor(hessian, names[0])
                for alike in block.by_codes(names):
                    scales |= self.compensate_layers(block, alike, block.weights(alike), hessian, factor)
        return scales

    def summary(self) -> list[str]:
        """Return lines for people: the error of the layers' outputs, root mean square over layers."""
        count = len(self.errors)
        ours, theirs = ((sum(errors) / max(count, 1)) ** 0.5 for errors in (self.errors, self.nearest))
        return [
            f"{self.name}: outputs of {counted(count, 'layer')} are off by {ours:.1%}, rounded to nearest by "
            f"{theirs:.1%}"
        ]

    def compensate_layers(
        self, block: Block, names: list[str], target: Tensor, hessian: Tensor, factor: Tensor
    ) -> dict[str, Tensor]:
        """Quantize layers that share an input, in place; returns their scales by name.

        Args:
            block: Holds the layers.
            names: Layers of the same scheme.
            target: Weights to approximate, the layers' rows one below the other: (sum of out, in).
            hessian: Sum of x x^T, (in, in).
            factor: `inverse_factor` of it.
        """
        # Rows are independent, so that the layers are one tall matrix.
        spec = block.specs[names[0]]
        compensated, scales = self.choose_codes(target, hessian, factor, spec)
        rounded = numerics.dequantize(numerics.quantize(compensated, scales, spec.codebook), scales)
        nearest = numerics.fake_quantize_weight(target, spec.codebook, spec.group_size)

        # Give each layer its own rows back.
        sizes = [block.linears[name].weight.shape[0] for name in names]
        parts = zip(*(rows.split(sizes) for rows in (target, rounded, nearest, compensated, scales)), strict=True)
        found: dict[str, Tensor] = {}
        for name, (own_target, own_rounded, own_nearest, weight, own_scales) in zip(names, parts, strict=True):
            energy = output_energy(own_target, hessian)
            self.errors.append(relative_error(own_target, own_rounded, hessian, energy))
            self.nearest.append(relative_error(own_target, own_nearest, hessian, energy))
            block.linears[name].weight.data.copy_(weight)
            found[name] = own_scales
        return found

    def choose_codes(self, target: Tensor, hessian: Tensor, factor: Tensor, spec: WeightScheme) -> Compensated:
        """Choose codes and scales for `target` (out, in)."""
        return compensate(target, hessian, factor, spec)


def accumulate_hessians(block: Block, names: list[str]) -> dict[str, Tensor]:
    """Sum x x^T over the inputs of each layer, rounded as in deployment: float32 (in, in) by name."""
    sums: dict[str, Tensor] = {}
    with block.quantized_inputs():  # registered first, so that observers see rounded inputs
        for batch in block.batches:

            def add(name: str, x: Tensor, keep: KeptTokens = batch.keep) -> None:
                if name in names:
                    rows = token_rows(x, keep)
                    if name not in sums:
                        sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                    add_gram(sums[name], rows)

            block.observe(batch, add)
    return {name: mirrored(total) for name, total in sums.items()}


def inverse_factor(hessian: Tensor, name: str, damping: float = DAMPING) -> Tensor:
    """Return the upper Cholesky factor U of the damped Hessian's inverse, U^T U = (H + damping)^-1.

    Args:
        hessian: H, shape (in, in).
        name: Layer, for the message.
        damping: Fraction of the Hessian's mean diagonal.

    Returns:
        float32, shape (in, in).

    Raises:
        DataError: The damped Hessian is not positive definite.
    """
    # float64: squared inputs span ten orders of magnitude in models with outlier channels.
    damped = hessian.double()
    damped.diagonal().add_(damping * hessian.diagonal().double().mean())
    # H = L L^T, then the inverse from L, then the upper factor of that: the paper's three steps.
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not bool(torch.isfinite(hessian).all()):
        found = "all zero" if not bool(hessian.any()) else f"finite: {bool(torch.isfinite(hessian).all())}"
        raise DataError(
            f"GPTQ: the inputs of {name} in the calibration data do not determine its weights ({found}): the damped "
            "Hessian has no Cholesky factor. Give more or other calibration data, or use rtn or hqq."
        )
    return upper.float()


def compensate(weight: Tensor, hessian: Tensor, factor: Tensor, spec: WeightScheme) -> Compensated:
    """Run GPTQ on one matrix.

    Args:
        weight: Shape (out, in).
        hessian: Sum of x x^T, shape (in, in).
        factor: `inverse_factor` of it.
        spec: Bits and group size.

    Returns:
        Each column just before it was rounded, and the scales.
    """
    # Transposed, so that the weights of a column are contiguous.
    work = weight.T.contiguous()
    importance = hessian.diagonal()
    buffers = GroupBuffers(work, spec.group_size)
    found = []
    for start in range(0, work.shape[0], spec.group_size):
        columns, later = slice(start, start + spec.group_size), slice(start + spec.group_size, None)
        # Only now: the weights of this group have changed since the first one.
        group = work[columns].T.contiguous()
        scales = search_scales(group, spec.codebook, spec.group_size, importance[columns])
        buffers.matrix.copy_(factor[columns, columns].T)
        buffers.values.copy_(work[columns])
        _round_group(buffers, scales.view(-1), spec.codebook)
        work[columns].copy_(buffers.values)
        # Inside the group the errors are compensated already; here, by all columns after it.
        work[later].addmm_(factor[columns, later].T, buffers.changes, alpha=-1)
        found.append(scales)
    return Compensated(work.T, torch.cat(found, dim=1))


def _round_group(buffers: GroupBuffers, scales: Tensor, codebook: Codebook) -> None:
    """Compensate inside one group, in place; `buffers.changes` become each column's error over U_jj.

    Args:
        buffers: The group's weights as values, and its part of U^T.
        scales: Shape (out,).
        codebook: Of the codes.
    """
    inverse = 1.0 / scales
    for column in buffers:
        # The column as it is now, with the errors of all columns before it.
        torch.mul(column.values, inverse, out=column.codes)
        numerics.round_to_codes(column.codes, codebook)
        torch.addcmul(column.values, column.codes, scales, value=-1, out=column.changes).div_(column.diagonal)
        column.spread(-1)
