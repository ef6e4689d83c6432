"""Forward and backward of one fake-quantized layer.

The forward of an adapted layer is the deployed one, `fq(X) fq(W + s B A)^T`, not the usual
`fq(X) fq(W)^T + s X A^T B^T`, whose adapters are never rounded. With a straight-through estimator
(https://arxiv.org/abs/1308.3432) on both roundings, Wq = fq(W + s B A) and Xq = fq(X):

    dX = dY Wq        dB = s dY^T (Xq A^T)        dA = s (dY B)^T Xq

so the gradient of W is never formed, and Wq is rounded again in the backward pass instead of being
kept: memory stays that of LoRA. Layers that read the same tensor, such as q, k and v, share one Xq (`SharedInput`).

Where a layer has scales of its own and they are learned, the forward rounds them to bfloat16, and dWq = dY^T Xq is
formed for one layer at a time (`numerics.straight_through`). For fixed codes Q under scales S, Wq = S Q, and
dS = dWq Q summed over each group; nothing is merged or rounded.

A frozen W may be quantized (`qlora_base`); it is then dequantized wherever these formulas say W.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat_edge.quant import fused, numerics, qlora_base
from qat_edge.quant.autocast import compute_dtype
from qat_edge.quant.qlora_base import QloraWeight
from qat_edge.quant.scheme import WeightScheme


class MergedFakeQuantLinear(torch.autograd.Function):
    """`fq(X) fq(W + s B A)^T + b` with the gradients of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rounded_x: Tensor,
        weight: Tensor | QloraWeight,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scales: Tensor | None,
        scaling: float,
        spec: WeightScheme,
    ) -> Tensor:
        """Apply the layer: x (..., in) -> (..., out).

        Args:
            ctx: autograd's context.
            x: Input.
            rounded_x: `rounded_input` of x, in its shape.
            weight: W (out, in), dense or quantized.
            bias: (out,).
            lora_a: A (rank, in); None without an adapter, like B.
            lora_b: B (out, rank).
            scales: (out, in // group), not yet rounded to bfloat16; None for those of `choose_scales`.
            scaling: s.
            spec: Bits and group size.
        """
        # `ctx` keeps what is no tensor; tensors go through `save_for_backward` below.
        ctx.compute_dtype = compute_dtype(x)
        ctx.x_dtype, ctx.scaling, ctx.spec = x.dtype, scaling, spec

        # Merging and rounding are float32 whatever autocast says; only the product is in its dtype.
        with torch.autocast(x.device.type, enabled=False):
            rounded_weight = _rounded_weight(weight, lora_a, lora_b, scales, scaling, spec, ctx.compute_dtype)
            cast_bias = None if bias is None else bias.to(ctx.compute_dtype)
            output = functional.linear(rounded_x, rounded_weight, cast_bias)

        # Gradients of weight, bias, adapter and scales need the input; a frozen layer without adapters keeps nothing.
        kept_x = rounded_x if any(ctx.needs_input_grad[2:7]) else None
        ctx.quantized = weight if isinstance(weight, QloraWeight) else None
        ctx.save_for_backward(kept_x, weight if ctx.quantized is None else None, lora_a, lora_b, scales)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of those of weight, bias, lora_a, lora_b and scales that are trained."""
        rounded_x, weight, lora_a, lora_b, scales = ctx.saved_tensors
        weight = weight if ctx.quantized is None else ctx.quantized
        needs_x, _, needs_weight, needs_bias, needs_adapter, _, needs_scales = ctx.needs_input_grad[:7]
        grad = grads[0].to(ctx.compute_dtype)
        grad_x = grad_weight = grad_bias = grad_a = grad_b = grad_scales = None

        with torch.autocast(grad.device.type, enabled=False):
            rows, merging = grad.flatten(0, -2), (weight, lora_a, lora_b, scales, ctx.scaling, ctx.spec)
            grad_bias = rows.sum(0).float() if needs_bias else None
            rounded_weight = None
            if needs_weight or needs_scales:
                # dWq is formed for this layer alone, and everything else follows from it.
                grad_merged = rows.T @ rounded_x.flatten(0, -2)
                if scales is not None:
                    rounded_weight, grad_merged, grad_scales = _through_scales(*merging, grad_merged)
                grad_weight = grad_merged if needs_weight else None
                if needs_adapter:
                    grad_a = (lora_b.to(grad_merged.dtype).T @ grad_merged).to(lora_a.dtype) * ctx.scaling
                    grad_b = (grad_merged @ lora_a.to(grad_merged.dtype).T).to(lora_b.dtype) * ctx.scaling
            elif needs_adapter:
                # Only the adapter is trained: its gradients without dWq, in the memory of LoRA.
                grad_a, grad_b = _adapter_gradients(rows, rounded_x.flatten(0, -2), lora_a, lora_b, ctx.scaling)
            if needs_x:
                # Round again what the forward pass rounded, instead of having kept it.
                if rounded_weight is None:
                    rounded_weight = _rounded_weight(*merging, ctx.compute_dtype)
                grad_x = (grad @ rounded_weight).to(ctx.x_dtype)
        return grad_x, None, grad_weight, grad_bias, grad_a, grad_b, grad_scales, None, None


class FixedCodesLinear(torch.autograd.Function):
    """`fq(X) (S Q)^T + b` for fixed codes Q, with the gradients of X, b and S."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded_x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer: x (..., in) -> (..., out).

        Args:
            ctx: autograd's context.
            x: Input.
            rounded_x: `rounded_input` of x, in its shape.
            codes: Q (out, in), int8.
            scales: S (out, in // group), not yet rounded to bfloat16.
            bias: (out,).
        """
        ctx.compute_dtype, ctx.x_dtype = compute_dtype(x), x.dtype
        with torch.autocast(x.device.type, enabled=False):
            weight = _dequantized(codes, scales, ctx.compute_dtype)
            cast_bias = None if bias is None else bias.to(ctx.compute_dtype)
            output = functional.linear(rounded_x, weight, cast_bias)
        ctx.save_for_backward(rounded_x if any(ctx.needs_input_grad[3:]) else None, codes, scales)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, and of scales and bias where they are trained."""
        rounded_x, codes, scales = ctx.saved_tensors
        needs_x, _, _, needs_scales, needs_bias = ctx.needs_input_grad
        grad = grads[0].to(ctx.compute_dtype)
        grad_x = grad_scales = None
        rows = grad.flatten(0, -2)
        with torch.autocast(grad.device.type, enabled=False):
            if needs_x:
                weight = _dequantized(codes, scales, ctx.compute_dtype)
                grad_x = (grad @ weight).to(ctx.x_dtype)
            if needs_scales:
                # dWq is formed for this layer alone.
                grad_weight = (rows.T @ rounded_x.flatten(0, -2)).to(scales.dtype)
                grad_scales = (grad_weight * codes).unflatten(-1, (scales.shape[-1], -1)).sum(-1)
        return grad_x, None, None, grad_scales, rows.sum(0).float() if needs_bias else None


class SharedInput:
    """Input of the last layer, rounded, for the layers after it that read the same tensor.

    Attention calls q, k and v with one tensor, and an MLP gate and up: it is then rounded once and kept once.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0
        self._rounded: Tensor | None = None

    def rounded(self, x: Tensor) -> Tensor:
        """Return `rounded_input` of x (..., in)."""
        if x.is_inference():  # without a version, which says that nothing was written into it
            return rounded_input(x)
        is_same = self._source is not None and self._source() is x and self._version == x._version
        if not is_same or self._rounded is None or self._rounded.dtype != compute_dtype(x):
            self._rounded = rounded_input(x)
            # Nothing is kept longer than its source.
            self._source, self._version = weakref.ref(x, self._forget), x._version
        return self._rounded

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if source is self._source:
            self._source = self._rounded = None


def rounded_input(x: Tensor) -> Tensor:
    """Return x (..., in) rounded to int8 per token, in the dtype that its layer computes in, without a gradient."""
    dtype = compute_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _rounded_activation(x, dtype)


class RoundedInput(torch.autograd.Function):
    """The input of a layer rounded to int8, with its gradient passed through (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Round x (..., in) and return float32."""
        ctx.x_dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return _rounded_activation(x, torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        """Return the gradient of x."""
        return grads[0].to(ctx.x_dtype)


def _rounded_activation(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `numerics.fake_quantize_activation` of x (..., in) in a dtype."""
    kernels = fused.kernels_on(x.device)
    if kernels is not None:
        rounded: Tensor = kernels.round_activation(x, dtype)
        return rounded
    return numerics.fake_quantize_activation(x).to(dtype)


def merged_weight(base: Tensor | QloraWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """Return W + s B A in float32 or wider, and W alone without an adapter: (out, in), see `numerics.merge`."""
    weight = qlora_base.dequantized(base)
    if lora_a is None or lora_b is None:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    return numerics.merge(weight, lora_a, lora_b, scaling)


def _rounded_weight(
    base: Tensor | QloraWeight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scales: Tensor | None,
    scaling: float,
    spec: WeightScheme,
    dtype: torch.dtype,
) -> Tensor:
    """Return fq(W + s B A) in a dtype, (out, in); arguments as of `MergedFakeQuantLinear`."""
    weight, codebook, group_size = qlora_base.dequantized(base), spec.codebook, spec.group_size
    kernels = fused.kernels_for(weight, scales, codebook)
    if kernels is not None:
        rounded: Tensor = kernels.round_merged(weight, lora_a, lora_b, scales, scaling, codebook, group_size, dtype)
        return rounded
    own = None if scales is None else numerics.representable(scales)
    merged = merged_weight(weight, lora_a, lora_b, scaling)
    return numerics.fake_quantize_weight(merged, codebook, group_size, own).to(dtype)


def _through_scales(
    base: Tensor | QloraWeight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scales: Tensor,
    scaling: float,
    spec: WeightScheme,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return fq(W + s B A) and the gradients of W + s B A and of its scales, for a layer with scales of its own.

    grad: Gradient of the rounded weight, (out, in), which may be overwritten; the rounded weight has its dtype.
    """
    weight, codebook, dtype = qlora_base.dequantized(base), spec.codebook, grad.dtype
    kernels = fused.kernels_for(weight, scales, codebook)
    if kernels is not None:
        rounded, grad_scales = kernels.scale_gradients(
            weight, lora_a, lora_b, scales, scaling, codebook, spec.group_size, grad.contiguous(), dtype
        )
        return rounded, grad, grad_scales
    merged, own = merged_weight(weight, lora_a, lora_b, scaling), numerics.representable(scales)
    codes = numerics.round_codes(merged, own, codebook)
    grad_merged, grad_scales = numerics.straight_through(merged, own, codes, grad.to(merged.dtype), codebook.step)
    return numerics.dequantize(codes, own).to(dtype), grad_merged, grad_scales


def _dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return S Q in a dtype, (out, in): S in bfloat16 and Q are exact in it, and their product is rounded once."""
    return numerics.dequantize(codes, numerics.representable(scales).to(dtype))


def _adapter_gradients(
    grad: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B without forming that of the weight. grad: (tokens, out); x: (tokens, in)."""
    # Brackets as here keep every product narrow: (tokens, rank), never (out, in).
    a, b = lora_a.to(grad.dtype), lora_b.to(grad.dtype)
    grad_a = ((grad @ b).T @ x).to(lora_a.dtype) * scaling
    return grad_a, (grad.T @ (x @ a.T)).to(lora_b.dtype) * scaling
