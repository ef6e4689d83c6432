"""Fake quantization in training, and LoRA adapters that are merged before they are rounded.

The forward of an adapted layer is the deployed one, `fq(X) fq(W + s B A)^T`, not the usual
`fq(X) fq(W)^T + s X A^T B^T`, whose adapters are never rounded. With a straight-through estimator
(https://arxiv.org/abs/1308.3432) on both roundings, Wq = fq(W + s B A) and Xq = fq(X):

    dX = dY Wq        dB = s dY^T (Xq A^T)        dA = s (dY B)^T Xq

so the gradient of W is never formed, and Wq is rounded again in the backward pass instead of being
kept: memory stays that of LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.errors import UsageError
from qat_edge.quant import numerics
from qat_edge.quant.scheme import Scheme, WeightScheme

ADAPTER = "default"  # peft's name for the only adapter of a model


@dataclass
class Switch:
    """Whether the layers that share this object round. Off, they are the layers they replaced."""

    enabled: bool = False


class MergedFakeQuantLinear(torch.autograd.Function):
    """`fq(X) fq(W + s B A)^T + b` with the gradients of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        spec: WeightScheme,
    ) -> Tensor:
        """x: (..., in), weight: (out, in), lora_a: (rank, in), lora_b: (out, rank) -> (..., out)."""
        ctx.compute_dtype = _compute_dtype(x)
        ctx.x_dtype, ctx.scaling, ctx.spec = x.dtype, scaling, spec
        with torch.autocast(x.device.type, enabled=False):
            rounded_x = numerics.fake_quantize_activation(x).to(ctx.compute_dtype)
            rounded_weight = _rounded_weight(weight, lora_a, lora_b, scaling, spec).to(ctx.compute_dtype)
            output = functional.linear(rounded_x, rounded_weight, None if bias is None else bias.to(ctx.compute_dtype))
        ctx.save_for_backward(rounded_x if lora_a is not None else None, weight, lora_a, lora_b)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, lora_a and lora_b; the base weight and its bias are not trained."""
        rounded_x, weight, lora_a, lora_b = ctx.saved_tensors
        grad = grads[0].to(ctx.compute_dtype)
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                rounded_weight = _rounded_weight(weight, lora_a, lora_b, ctx.scaling, ctx.spec)
                grad_x = (grad @ rounded_weight.to(ctx.compute_dtype)).to(ctx.x_dtype)
            if lora_a is not None:
                rows, columns = grad.flatten(0, -2), rounded_x.flatten(0, -2)
                a, b = lora_a.to(ctx.compute_dtype), lora_b.to(ctx.compute_dtype)
                grad_b = (rows.T @ (columns @ a.T)).to(lora_b.dtype) * ctx.scaling
                grad_a = ((rows @ b).T @ columns).to(lora_a.dtype) * ctx.scaling
        return grad_x, None, None, grad_a, grad_b, None, None


class FakeQuantLinear(nn.Linear):
    """A linear layer that rounds its input and its weight while the switch is on. `insert` makes them."""

    spec: WeightScheme
    switch: Switch

    def forward(self, input: Tensor) -> Tensor:
        if not self.switch.enabled:
            return super().forward(input)
        return MergedFakeQuantLinear.apply(input, self.weight, self.bias, None, None, 1.0, self.spec)


class FakeQuantEmbedding(nn.Embedding):
    """An embedding that rounds the rows it looks up while the switch is on. `insert` makes them."""

    spec: WeightScheme
    switch: Switch

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        if not self.switch.enabled:
            return rows
        rounded = numerics.fake_quantize_weight(rows.float(), self.spec.bits, self.spec.group_size)
        return rows + (rounded - rows).detach() if rows.requires_grad else rounded


class LoraFakeQuantLinear(lora.Linear):
    """peft's LoRA layer around a FakeQuantLinear; while the switch is on, the adapter is merged before rounding.

    Dropout then falls on columns of A, one mask a step: a merged weight has no per-token input to drop.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if not base.switch.enabled or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        lora_a, lora_b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        lora_a = lora_a * self.lora_dropout[ADAPTER](torch.ones_like(lora_a[:1]))
        return MergedFakeQuantLinear.apply(x, base.weight, base.bias, lora_a, lora_b, self.scaling[ADAPTER], base.spec)


def insert(model: nn.Module, scheme: Scheme) -> Switch:
    """Make every layer of `scheme` round when the returned switch is on. In place; parameters stay shared."""
    switch = Switch()
    for name, spec in scheme.weights.items():
        module = model.get_submodule(name)
        ours = FakeQuantLinear if isinstance(module, nn.Linear) else FakeQuantEmbedding
        plain = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
        # A subclass (a scaled embedding, say) keeps its forward, whose super() now reaches ours.
        theirs = type(module)
        module.__class__ = ours if theirs is plain else type(f"FakeQuant{theirs.__name__}", (theirs, ours), {})
        module.spec, module.switch = spec, switch  # type: ignore[assignment]
    return switch


def add_adapters(model: Any, config: LoraConfig) -> PeftModel:
    """peft adapters on a model prepared by `insert`, in float32, merged before rounding.

    Raises:
        UsageError: the target modules are not there, or are none that can be merged before they are rounded.
    """
    try:
        adapted = get_peft_model(model, register(config))
    except ValueError as error:
        raise UsageError(f"--target-modules: {' '.join(str(error).split())}") from error
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraFakeQuantLinear):
            raise UsageError(
                f"--target-modules: {name.rpartition('.')[2]} is a {type(module.get_base_layer()).__name__}; only "
                "adapters of linear layers are merged before they are rounded. Leave it out."
            )
    return adapted


def register(config: LoraConfig) -> LoraConfig:
    """Have peft use LoraFakeQuantLinear where `insert` was at work."""
    config._register_custom_module({FakeQuantLinear: LoraFakeQuantLinear})
    return config


def merge_adapters(model: PeftModel) -> Any:
    """The base model with every adapter merged into a float32 weight, unrounded; the adapters are gone."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraFakeQuantLinear):
                base = module.get_base_layer()
                lora_a, lora_b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
                base.weight = nn.Parameter(
                    numerics.merge(base.weight, lora_a, lora_b, module.scaling[ADAPTER]), requires_grad=False
                )
    return model.unload()


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rounded_weight(
    weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, spec: WeightScheme
) -> Tensor:
    if lora_a is None or lora_b is None:
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
    else:
        merged = numerics.merge(weight, lora_a, lora_b, scaling)
    return numerics.fake_quantize_weight(merged, spec.bits, spec.group_size)
