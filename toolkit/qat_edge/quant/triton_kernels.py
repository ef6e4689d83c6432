"""Triton kernels of fake quantization: a merged weight is rounded in one pass over W, and an input in one over x.

They compute the numbers of `numerics` on a CPU, bit for bit: B A is a chain of fused multiply-adds over the rank, as in
the matrix product of a CPU, divisions round to nearest, and bfloat16 is rounded to nearest even. So the codes of a
training on a GPU are those that the export finds when it merges on a CPU.

A program of a grid reads a tile of W, (ROWS, GROUPS * WIDTH), and columns of A and rows of B once. WIDTH is the group
size rounded up to a power of two, because Triton knows no other lengths; what is beyond the group is masked. Nothing of
the size of W is allocated but the result.

Not measured: no GPU was at hand. The tests run these kernels in Triton's interpreter (TRITON_INTERPRET=1).
"""

# Triton reads annotations of a kernel as types of its own: none are postponed, and only constants have them.
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat_edge.quant.codebook import Codebook

TILE = 4096  # elements of a tile: 32 registers for each of 128 threads
COLUMNS = 128  # of a tile, where groups are narrower
_ROUNDER = 12582912.0  # 1.5 * 2^23: a float32 below 2^22 added to it loses its fraction, rounded half to even
ROUNDER: Any = tl.constexpr(_ROUNDER)
EPS: Any = tl.constexpr(torch.finfo(torch.float32).eps)
ALL: Any = tl.constexpr(tl.PropagateNan.ALL)


def round_merged(
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scales: Tensor | None,
    scaling: float,
    codebook: Codebook,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return fq(W + s B A), rounded to `dtype`: (out, in).

    Args:
        weight: W (out, in), float32 or 16 bits.
        lora_a: A (rank, in), float32; None without an adapter, like B.
        lora_b: B (out, rank), float32.
        scales: (out, in // group), not yet rounded to bfloat16; None for those of the largest weights.
        scaling: s.
        codebook: Codes of the weight.
        group_size: Weights per scale; divides `in`.
        dtype: float32 or bfloat16.
    """
    rounded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _launch(_round_merged, weight, lora_a, lora_b, scales, scaling, codebook, group_size, (rounded,))
    return rounded


def scale_gradients(
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scales: Tensor,
    scaling: float,
    codebook: Codebook,
    group_size: int,
    grad: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return fq(W + s B A) in `dtype` and the gradient of the scales; mask the gradient of the weight in place.

    The gradients are those of `numerics.straight_through`.

    Args:
        weight: W, like the next six arguments as in `round_merged`.
        lora_a: A.
        lora_b: B.
        scales: Required here.
        scaling: s.
        codebook: Codes of the weight.
        group_size: Weights per scale.
        grad: Gradient of the rounded weight, (out, in), contiguous; that of W + s B A afterwards.
        dtype: float32 or bfloat16.
    """
    rounded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    grad_scales = torch.empty(scales.shape, dtype=torch.float32, device=weight.device)
    tensors = (rounded, grad, grad_scales)
    _launch(_round_and_differentiate, weight, lora_a, lora_b, scales, scaling, codebook, group_size, tensors)
    return rounded, grad_scales


def round_activation(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (..., features) rounded to int8 with one asymmetric scale per token, in `dtype`."""
    rows = x.contiguous().view(-1, x.shape[-1])
    rounded = torch.empty(rows.shape, dtype=dtype, device=x.device)
    width = triton.next_power_of_2(rows.shape[1])
    _round_tokens[(len(rows),)](
        rows, rounded, rows.shape[1], WIDTH=width, BF16=dtype == torch.bfloat16, num_warps=_warps(width),
        enable_fp_fusion=False,
    )  # fmt: skip
    return rounded.view(x.shape)


def _launch(
    kernel: Any,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scales: Tensor | None,
    scaling: float,
    codebook: Codebook,
    group_size: int,
    outputs: tuple[Tensor, ...],
) -> None:
    """Run a kernel over all tiles of a weight."""
    rows, columns = weight.shape
    groups, width = columns // group_size, triton.next_power_of_2(group_size)
    # Whole groups to a tile, so that a scale needs no other tile.
    tile_groups = max(1, COLUMNS // width)
    tile_rows = max(1, TILE // (tile_groups * width))
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(groups, tile_groups))

    weight = weight.contiguous()
    # Without an adapter, pointers to something that is not read.
    lora_a = weight if lora_a is None else lora_a.contiguous()
    rank = 0 if lora_b is None else lora_b.shape[1]
    lora_b = weight if lora_b is None else lora_b.contiguous()
    own = scales is not None
    scales = weight if scales is None else scales.contiguous()
    kernel[grid](
        weight, lora_a, lora_b, scales, *outputs, scaling, rows, columns, groups, group_size,
        RANK=rank, OWN=own, ROWS=tile_rows, GROUPS=tile_groups, WIDTH=width, LOW=float(codebook.low),
        HIGH=float(codebook.high), STEP=codebook.step, BF16=outputs[0].dtype == torch.bfloat16,
        num_warps=_warps(tile_rows * tile_groups * width),
        enable_fp_fusion=False,  # where a multiply-add is meant, the kernel says so
    )  # fmt: skip


def _warps(elements: int) -> int:
    """Return the warps of a program for a tile."""
    return min(16, max(4, elements // 1024))


@triton.jit
def _round_half_even(x):
    """Round |x| < 2^22 to the nearest whole number."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def _bfloat16(x):
    """Round to bfloat16, keeping float32; by its bits, because the cast of Triton's interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the sum could carry a NaN over into a number


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def _codes_of(ratio, LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr):
    """Return the nearest codes, as `numerics.round_to_codes`; clamped first, which gives the same."""
    clamped = _clamp(ratio, LOW, HIGH)
    if STEP == 1:
        return _round_half_even(clamped)
    return _round_half_even((clamped - LOW) * (1 / STEP)) * STEP + LOW


@triton.jit
def _merged_groups(
    w, a, b, scaling, rows, columns, offsets, is_row, is_column, row_length,
    RANK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return W + s B A of a tile, (ROWS, GROUPS, WIDTH)."""
    merged = tl.load(w + offsets, mask=is_row[:, None] & is_column[None, :], other=0.0).to(tl.float32)
    if RANK > 0:
        product = tl.zeros_like(merged)
        for k in range(RANK):
            row_of_a = tl.load(a + k * row_length + columns, mask=is_column, other=0.0)
            column_of_b = tl.load(b + rows * RANK + k, mask=is_row, other=0.0)
            product = tl.fma(column_of_b[:, None], row_of_a[None, :], product)
        merged = tl.fma(product, scaling, merged)
    return tl.reshape(merged, (ROWS, GROUPS, WIDTH))


@triton.jit
def _tile(row_count, group_count, group_size, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows, columns and offsets of this program's tile, and which of them exist."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = tl.arange(0, GROUPS * WIDTH)
    groups = tl.program_id(1) * GROUPS + places // WIDTH
    columns = groups * group_size + places % WIDTH
    is_column = (places % WIDTH < group_size) & (groups < group_count)
    # A large table has more weights than int32 counts.
    offsets = rows.to(tl.int64)[:, None] * (group_count * group_size) + columns[None, :]
    return rows, columns, offsets, rows < row_count, is_column


@triton.jit
def _scale_tile(rows, is_row, group_count, GROUPS: tl.constexpr):
    """Return offsets (ROWS, GROUPS) of the scales of this program's tile, and which of them exist."""
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    return rows[:, None] * group_count + groups[None, :], is_row[:, None] & (groups < group_count)[None, :]


@triton.jit
def _scales_of(merged, s, offsets, exists, LOW: tl.constexpr, HIGH: tl.constexpr, OWN: tl.constexpr):
    """Return the scales of a tile, (ROWS, GROUPS), as `numerics.representable` rounds them."""
    if OWN:
        scales = tl.load(s + offsets, mask=exists, other=1.0)
    else:
        largest = tl.max(tl.abs(merged), axis=2)
        scales = tl.div_rn(largest, tl.full(largest.shape, (HIGH - LOW) / 2, tl.float32))
    return _bfloat16(tl.maximum(scales, EPS, propagate_nan=ALL))


@triton.jit
def _store(pointer, values, mask, BF16: tl.constexpr):
    if BF16:
        tl.store(pointer, _bfloat16(values).to(tl.bfloat16), mask=mask)
    else:
        tl.store(pointer, values, mask=mask)


@triton.jit
def _round_merged(
    w, a, b, s, out, scaling, row_count, row_length, group_count, group_size,
    RANK: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Write the rounded weight of a tile."""
    rows, columns, offsets, is_row, is_column = _tile(row_count, group_count, group_size, ROWS, GROUPS, WIDTH)
    merged = _merged_groups(
        w, a, b, scaling, rows, columns, offsets, is_row, is_column, row_length, RANK, ROWS, GROUPS, WIDTH
    )
    scale_offsets, exists = _scale_tile(rows, is_row, group_count, GROUPS)
    scales = _scales_of(merged, s, scale_offsets, exists, LOW, HIGH, OWN)
    inverse = tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)
    codes = _codes_of(merged * inverse[:, :, None], LOW, HIGH, STEP)
    values = tl.reshape(codes * scales[:, :, None], (ROWS, GROUPS * WIDTH))
    _store(out + offsets, values, is_row[:, None] & is_column[None, :], BF16)


@triton.jit
def _round_and_differentiate(
    w, a, b, s, out, grad, grad_s, scaling, row_count, row_length, group_count, group_size,
    RANK: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Write the rounded weight of a tile, the gradients of its scales, and the masked gradient of its weights."""
    rows, columns, offsets, is_row, is_column = _tile(row_count, group_count, group_size, ROWS, GROUPS, WIDTH)
    mask = is_row[:, None] & is_column[None, :]
    merged = _merged_groups(
        w, a, b, scaling, rows, columns, offsets, is_row, is_column, row_length, RANK, ROWS, GROUPS, WIDTH
    )
    scale_offsets, exists = _scale_tile(rows, is_row, group_count, GROUPS)
    scales = _scales_of(merged, s, scale_offsets, exists, LOW, HIGH, OWN)
    inverse = tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales)
    ratio = merged * inverse[:, :, None]
    codes = _codes_of(ratio, LOW, HIGH, STEP)
    _store(out + offsets, tl.reshape(codes * scales[:, :, None], (ROWS, GROUPS * WIDTH)), mask, BF16)

    # A clamped weight is further than half a step from its code: it has no gradient, and its scale gets its code.
    error = codes - ratio
    inside = tl.abs(error) <= STEP / 2
    loaded = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    by_group = tl.reshape(loaded, (ROWS, GROUPS, WIDTH))
    tl.store(grad_s + scale_offsets, tl.sum(by_group * tl.where(inside, error, codes), axis=2), mask=exists)
    masked = tl.reshape(by_group * inside.to(tl.float32), (ROWS, GROUPS * WIDTH))
    tl.store(grad + offsets, masked.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _round_tokens(x, out, length, WIDTH: tl.constexpr, BF16: tl.constexpr):
    """Round one token to int8, by the formulas of torchao's choose_qparams_affine and quantize_affine."""
    columns = tl.arange(0, WIDTH)
    mask = columns < length
    offsets = tl.program_id(0).to(tl.int64) * length + columns
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    # 0 is among the values, so it is between the least and the greatest.
    least, greatest = tl.minimum(tl.min(values), 0.0), tl.maximum(tl.max(values), 0.0)
    scale = tl.maximum(tl.div_rn(greatest - least, 255.0), EPS)
    zero = _clamp(-128.0 - _round_half_even(tl.div_rn(least, scale)), -128.0, 127.0)
    codes = _round_half_even(values * tl.div_rn(1.0, scale)) + zero
    _store(out + offsets, (_clamp(codes, -128.0, 127.0) - zero) * scale, mask, BF16)
