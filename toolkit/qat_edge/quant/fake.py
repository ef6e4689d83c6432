"""Fake quantization in training, and LoRA adapters that are merged before they are rounded.

The forward of an adapted layer is the deployed one, `fq(X) fq(W + s B A)^T`, not the usual
`fq(X) fq(W)^T + s X A^T B^T`, whose adapters are never rounded. With a straight-through estimator
(https://arxiv.org/abs/1308.3432) on both roundings, Wq = fq(W + s B A) and Xq = fq(X):

    dX = dY Wq        dB = s dY^T (Xq A^T)        dA = s (dY B)^T Xq

so the gradient of W is never formed, and Wq is rounded again in the backward pass instead of being
kept: memory stays that of LoRA.

Group scales are those of the largest merged weights, until `set_scales` gives a layer its own. Those may be
learned: the adapter, or the layer itself where weights are trained without adapters, then holds a factor for each
(`lora_scale_factor`, `scale_factor`), the forward rounds their product to bfloat16, and dWq = dY^T Xq is formed for
one layer at a time (`numerics.straight_through`).

A frozen W may be held in few bits (`storage`); it is then dequantized wherever these formulas say W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.errors import UsageError
from qat_edge.quant import numerics, qlora_base
from qat_edge.quant.qlora_base import StoredLinear, StoredWeight
from qat_edge.quant.scheme import Scheme, WeightScheme

ADAPTER = "default"  # peft's name for the only adapter of a model
SCALE_FACTOR = "scale_factor"  # in the names of the parameters that learned scales are made of


@dataclass
class Switch:
    """Whether the layers that share this object round. Off, they are the layers they replaced.

    learned_scales: their adapters, or they themselves, are made with factors for the scales.
    """

    enabled: bool = False
    learned_scales: bool = False

    def __deepcopy__(self, memo: Any) -> Switch:
        return self  # peft trains a copy of a head, which rounds when the others do


class MergedFakeQuantLinear(torch.autograd.Function):
    """`fq(X) fq(W + s B A)^T + b` with the gradients of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | StoredWeight,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scales: Tensor | None,
        scaling: float,
        spec: WeightScheme,
    ) -> Tensor:
        """x: (..., in), weight: (out, in), lora_a: (rank, in), lora_b: (out, rank) -> (..., out).

        scales: (out, in // group), not yet rounded to bfloat16; None for those of the largest weights.
        """
        ctx.compute_dtype = _compute_dtype(x)
        ctx.x_dtype, ctx.scaling, ctx.spec = x.dtype, scaling, spec
        with torch.autocast(x.device.type, enabled=False):
            rounded_x = numerics.fake_quantize_activation(x).to(ctx.compute_dtype)
            merged = _merged(weight, lora_a, lora_b, scaling)
            rounded_scales = _rounded(scales, merged, spec)
            rounded_weight = numerics.fake_quantize_weight(merged, spec.bits, spec.group_size, rounded_scales)
            output = functional.linear(
                rounded_x, rounded_weight.to(ctx.compute_dtype), None if bias is None else bias.to(ctx.compute_dtype)
            )
        # Gradients of the weight side want the input; a frozen layer without adapters keeps nothing.
        kept_x = rounded_x if any(ctx.needs_input_grad[1:6]) else None
        ctx.stored = weight if isinstance(weight, StoredWeight) else None
        ctx.save_for_backward(kept_x, weight if ctx.stored is None else None, lora_a, lora_b, scales)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, of what is trained among weight, bias, lora_a, lora_b and scales."""
        rounded_x, weight, lora_a, lora_b, scales = ctx.saved_tensors
        weight = weight if ctx.stored is None else ctx.stored
        needs_x, needs_weight, needs_bias, *_, needs_scales = ctx.needs_input_grad[:6]
        grad = grads[0].to(ctx.compute_dtype)
        found: list[Tensor | None] = [None] * 6
        with torch.autocast(grad.device.type, enabled=False):
            merged = _merged(weight, lora_a, lora_b, ctx.scaling)
            rounded_scales = _rounded(scales, merged, ctx.spec)
            codes = numerics.round_codes(merged, rounded_scales, ctx.spec.bits)
            if needs_x:
                rounded = numerics.dequantize(codes, rounded_scales)
                found[0] = (grad @ rounded.to(ctx.compute_dtype)).to(ctx.x_dtype)
            rows = grad.flatten(0, -2)
            if needs_bias:
                found[2] = rows.sum(0).float()
            if needs_weight or needs_scales:
                by_weight = (rows.T @ rounded_x.flatten(0, -2)).to(merged.dtype)
                if scales is not None:
                    by_weight, found[5] = numerics.straight_through(merged, rounded_scales, codes, by_weight)
                found[1] = by_weight if needs_weight else None
                if lora_a is not None:
                    found[3] = (lora_b.T @ by_weight) * ctx.scaling
                    found[4] = (by_weight @ lora_a.T) * ctx.scaling
            elif lora_a is not None:
                found[3:5] = _adapter_gradients(rows, rounded_x.flatten(0, -2), lora_a, lora_b, ctx.scaling)
        return (*found, None, None)


class FakeQuantLinear(nn.Linear):
    """A linear layer that rounds its input and its weight while the switch is on. `insert` makes them.

    scales: (out, in // group) of its own, None for those of its largest weights.
    scale_factor: (out, in // group), what they are multiplied by; only where they are learned without an adapter.
    """

    spec: WeightScheme
    switch: Switch
    is_head: bool
    scales: Tensor | None
    scale_factor: nn.Parameter | None

    @property
    def learns_scales(self) -> bool:
        """Whether its scales are trained; a head's follow its weights: no method that prepares them looks at it."""
        return self.switch.learned_scales and self.spec.bits == 4 and not self.is_head

    @property
    def trained_scales(self) -> Tensor | None:
        """(out, in // group), not yet rounded to bfloat16; None for those of the largest weights."""
        if self.scales is None or self.scale_factor is None:
            return self.scales
        return self.scales * self.scale_factor

    def forward(self, input: Tensor) -> Tensor:
        if not self.switch.enabled:
            return super().forward(input)
        weight, scales = qlora_base.held(self), self.trained_scales
        return MergedFakeQuantLinear.apply(input, weight, self.bias, None, None, scales, 1.0, self.spec)


class FakeQuantStoredLinear(FakeQuantLinear, StoredLinear):
    """A FakeQuantLinear whose weight is held in few bits."""


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
    lora_scale_factor: (out, in // group), what the layer's scales are multiplied by; only where they are learned.
    """

    def __init__(self, base_layer: FakeQuantLinear, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        if base_layer.learns_scales:
            self.lora_scale_factor = nn.ParameterDict({adapter_name: _scale_factor(base_layer)})

    @property
    def trained_scales(self) -> Tensor | None:
        """(out, in // group), not yet rounded to bfloat16; None for those of the largest merged weights."""
        scales = self.get_base_layer().scales
        if scales is None or not hasattr(self, "lora_scale_factor"):
            return scales
        return scales * self.lora_scale_factor[ADAPTER]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if not base.switch.enabled or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        lora_a, lora_b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        lora_a = lora_a * self.lora_dropout[ADAPTER](torch.ones_like(lora_a[:1]))
        return MergedFakeQuantLinear.apply(
            x, qlora_base.held(base), base.bias, lora_a, lora_b, self.trained_scales, self.scaling[ADAPTER], base.spec
        )


def insert(model: nn.Module, scheme: Scheme, learned_scales: bool = False) -> Switch:
    """Make every layer of `scheme` round when the returned switch is on. In place; parameters stay shared."""
    switch = Switch(learned_scales=learned_scales)
    for name, spec in scheme.weights.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, StoredLinear):
            module.dense_class = _rounding(module.dense_class)
        module.__class__ = _rounding(type(module))
        module.spec, module.switch = spec, switch
        if isinstance(module, FakeQuantLinear):
            module.is_head = name in scheme.heads
            module.register_buffer("scales", None, persistent=False)
            module.register_parameter(SCALE_FACTOR, None)
    return switch


def _rounding(theirs: type[nn.Module]) -> Any:
    """The class that does what `theirs` does, and rounds."""
    ours = {nn.Linear: FakeQuantLinear, StoredLinear: FakeQuantStoredLinear, nn.Embedding: FakeQuantEmbedding}
    plain = next(c for c in (StoredLinear, nn.Linear, nn.Embedding) if issubclass(theirs, c))
    # A subclass (a scaled embedding, say) keeps its forward, whose super() now reaches ours.
    return ours[plain] if theirs is plain else type(f"FakeQuant{theirs.__name__}", (theirs, ours[plain]), {})


def set_scales(model: nn.Module, scales_of: Mapping[str, Tensor]) -> None:
    """Give linear layers prepared by `insert` scales of their own, by module name: (out, in // group)."""
    for name, scales in scales_of.items():
        layer = linear(model, name)
        layer.scales = scales.to(qlora_base.held(layer).device, torch.float32)


def linear(model: nn.Module, name: str) -> FakeQuantLinear:
    """The layer that `insert` made of the module `name`, which an adapter may be wrapped around by now.

    Raises:
        TypeError: there is none of that name.
    """
    module = model.get_submodule(name)
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(layer, FakeQuantLinear):
        raise TypeError(f"{name} is a {type(layer).__name__}, no FakeQuantLinear")
    return layer


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


def train_weights(model: Any) -> Any:
    """Make all of a model prepared by `insert` trainable, learned scales included: fine-tuning without adapters."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, FakeQuantLinear) and module.learns_scales:
            module.scale_factor = _scale_factor(module)
    return model


def base_of(model: Any) -> Any:
    """The model that adapters were put into, or that is trained itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class MergedWeights:
    """The layers of a training model with their adapters merged: what a quantization method may look at.

    One weight at a time exists; nothing in the model changes, and what is written into a weight is lost.
    """

    def __init__(self, model: Any) -> None:
        self.model = base_of(model)

    def get_submodule(self, name: str) -> nn.Module:
        """A module that has the merged `.weight` (out, in) in float32."""
        with torch.no_grad():
            holder = nn.Module()
            holder.register_buffer("weight", _merged_weight(self.model.get_submodule(name)))
        return holder


def merge_adapters(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The base model with every adapter merged into a float32 weight, unrounded, and the scales of layers that
    have their own, by module name, as bfloat16 holds them. The adapters and factors are gone, nothing is stored
    in few bits any more. A model without adapters is that base model itself."""
    scales: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in list(base_of(model).named_modules()):
            inner = name.endswith(".base_layer")  # of an adapted layer, which has been here before
            if inner or not isinstance(module, LoraFakeQuantLinear | FakeQuantLinear):
                continue
            if module.trained_scales is not None:
                scales[name] = numerics.representable(module.trained_scales)
            layer = linear(base_of(model), name)
            if isinstance(module, LoraFakeQuantLinear) or isinstance(layer, StoredLinear):
                qlora_base.make_dense(layer, _merged_weight(module))
            layer.scale_factor = None
    return (model.unload() if isinstance(model, PeftModel) else model), scales


def _merged_weight(layer: Any) -> Tensor:
    """W + s B A of an adapted layer, W of any other: (out, in) in float32."""
    if not isinstance(layer, LoraFakeQuantLinear):
        return _merged(qlora_base.held(layer), None, None, 1.0)
    lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return _merged(qlora_base.held(layer.get_base_layer()), lora_a, lora_b, layer.scaling[ADAPTER])


def _scale_factor(layer: FakeQuantLinear) -> nn.Parameter:
    """Of learned scales at their start: ones (out, in // group)."""
    shape = layer.out_features, layer.in_features // layer.spec.group_size
    return nn.Parameter(torch.ones(shape, device=qlora_base.held(layer).device))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _merged(held: Tensor | StoredWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    weight = qlora_base.dense(held)
    if lora_a is None or lora_b is None:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    return numerics.merge(weight, lora_a, lora_b, scaling)


def _rounded(scales: Tensor | None, merged: Tensor, spec: WeightScheme) -> Tensor:
    """A layer's own scales as runtimes hold them; without any, those of its largest merged weights."""
    if scales is None:
        return numerics.choose_scales(merged, spec.bits, spec.group_size)
    return numerics.representable(scales)


def _adapter_gradients(
    grad: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Of A and B, without the gradient of the weight. grad: (tokens, out), x: (tokens, in)."""
    a, b = lora_a.to(grad.dtype), lora_b.to(grad.dtype)
    grad_a = ((grad @ b).T @ x).to(lora_a.dtype) * scaling
    return grad_a, (grad.T @ (x @ a.T)).to(lora_b.dtype) * scaling
