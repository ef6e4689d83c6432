"""Forward and backward of one fake-quantized layer.

The forward of an adapted layer is the deployed one, `fq(X) fq(W + s B A)^T`, not the usual
`fq(X) fq(W)^T + s X A^T B^T`, whose adapters are never rounded. With a straight-through estimator
(https://arxiv.org/abs/1308.3432) on both roundings, Wq = fq(W + s B A) and Xq = fq(X):

    dX = dY Wq        dB = s dY^T (Xq A^T)        dA = s (dY B)^T Xq

so the gradient of W is never formed, and Wq is rounded again in the backward pass instead of being
kept: memory stays that of LoRA.

Where a layer has scales of its own and they are learned, the forward rounds them to bfloat16, and dWq = dY^T Xq is
formed for one layer at a time (`numerics.straight_through`). For fixed codes Q under scales S, Wq = S Q, and
dS = dWq Q summed over each group; nothing is merged or rounded.

A frozen W may be quantized (`qlora_base`); it is then dequantized wherever these formulas say W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat_edge.quant import numerics, qlora_base
from qat_edge.quant.autocast import compute_dtype
from qat_edge.quant.qlora_base import QloraWeight
from qat_edge.quant.scheme import WeightScheme


class MergedFakeQuantLinear(torch.autograd.Function):
    """`fq(X) fq(W + s B A)^T + b` with the gradients of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
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
            rounded_x = numerics.fake_quantize_activation(x).to(ctx.compute_dtype)
            merged = merged_weight(weight, lora_a, lora_b, scaling)
            rounded_scales = _rounded_scales(scales, merged, spec)
            rounded_weight = numerics.fake_quantize_weight(merged, spec.codebook, spec.group_size, rounded_scales)
            cast_bias = None if bias is None else bias.to(ctx.compute_dtype)
            output = functional.linear(rounded_x, rounded_weight.to(ctx.compute_dtype), cast_bias)

        # Gradients of weight, bias, adapter and scales need the input; a frozen layer without adapters keeps nothing.
        kept_x = rounded_x if any(ctx.needs_input_grad[1:6]) else None
        ctx.quantized = weight if isinstance(weight, QloraWeight) else None
        ctx.save_for_backward(kept_x, weight if ctx.quantized is None else None, lora_a, lora_b, scales)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of those of weight, bias, lora_a, lora_b and scales that are trained."""
        rounded_x, weight, lora_a, lora_b, scales = ctx.saved_tensors
        weight = weight if ctx.quantized is None else ctx.quantized
        needs_x, needs_weight, needs_bias, needs_adapter, _, needs_scales = ctx.needs_input_grad[:6]
        grad = grads[0].to(ctx.compute_dtype)
        grad_x = grad_weight = grad_bias = grad_a = grad_b = grad_scales = None

        with torch.autocast(grad.device.type, enabled=False):
            # Round again what the forward pass rounded, instead of having kept it.
            merged = merged_weight(weight, lora_a, lora_b, ctx.scaling)
            rounded_scales = _rounded_scales(scales, merged, ctx.spec)
            codes = numerics.round_codes(merged, rounded_scales, ctx.spec.codebook)

            if needs_x:
                rounded_weight = numerics.dequantize(codes, rounded_scales)
                grad_x = (grad @ rounded_weight.to(ctx.compute_dtype)).to(ctx.x_dtype)
            rows = grad.flatten(0, -2)
            if needs_bias:
                grad_bias = rows.sum(0).float()

            if needs_weight or needs_scales:
                # dWq is formed for this layer alone, and everything else follows from it.
                grad_merged = (rows.T @ rounded_x.flatten(0, -2)).to(merged.dtype)
                if scales is not None:
                    grad_merged, grad_scales = numerics.straight_through(
                        merged, rounded_scales, codes, grad_merged, ctx.spec.codebook.step
                    )
                grad_weight = grad_merged if needs_weight else None
                if needs_adapter:
                    grad_a = (lora_b.T @ grad_merged) * ctx.scaling
                    grad_b = (grad_merged @ lora_a.T) * ctx.scaling
            elif needs_adapter:
                # Only the adapter is trained: its gradients without dWq, in the memory of LoRA.
                grad_a, grad_b = _adapter_gradients(rows, rounded_x.flatten(0, -2), lora_a, lora_b, ctx.scaling)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_scales, None, None


class FixedCodesLinear(torch.autograd.Function):
    """`fq(X) (S Q)^T + b` for fixed codes Q, with the gradients of X, b and S."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer: x (..., in) -> (..., out).

        Args:
            ctx: autograd's context.
            x: Input.
            codes: Q (out, in), int8.
            scales: S (out, in // group), not yet rounded to bfloat16.
            bias: (out,).
        """
        ctx.compute_dtype, ctx.x_dtype = compute_dtype(x), x.dtype
        with torch.autocast(x.device.type, enabled=False):
            rounded_x = numerics.fake_quantize_activation(x).to(ctx.compute_dtype)
            weight = _dequantized(codes, scales, ctx.compute_dtype)
            cast_bias = None if bias is None else bias.to(ctx.compute_dtype)
            output = functional.linear(rounded_x, weight, cast_bias)
        ctx.save_for_backward(rounded_x if any(ctx.needs_input_grad[2:]) else None, codes, scales)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, and of scales and bias where they are trained."""
        rounded_x, codes, scales = ctx.saved_tensors
        needs_x, _, needs_scales, needs_bias = ctx.needs_input_grad
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
        return grad_x, None, grad_scales, rows.sum(0).float() if needs_bias else None


class RoundedInput(torch.autograd.Function):
    """The input of a layer rounded to int8, with its gradient passed through (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Round x (..., in) and return float32."""
        ctx.x_dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return numerics.fake_quantize_activation(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        """Return the gradient of x."""
        return grads[0].to(ctx.x_dtype)


def merged_weight(base: Tensor | QloraWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """Return W + s B A in float32 or wider, and W alone without an adapter: (out, in), see `numerics.merge`."""
    weight = qlora_base.dequantized(base)
    if lora_a is None or lora_b is None:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    return numerics.merge(weight, lora_a, lora_b, scaling)


def _rounded_scales(scales: Tensor | None, merged: Tensor, spec: WeightScheme) -> Tensor:
    """Return a layer's own scales in bfloat16; without any, those of `choose_scales`."""
    if scales is None:
        return numerics.choose_scales(merged, spec.codebook, spec.group_size)
    return numerics.representable(scales)


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
