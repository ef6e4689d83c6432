"""Fake quantization in training, with LoRA adapters that are merged before they are rounded.

The forward of an adapted layer is the deployed one, `fq(X) fq(W + s B A)^T`, not the usual
`fq(X) fq(W)^T + s X A^T B^T`, whose adapters are never rounded. With a straight-through estimator
(https://arxiv.org/abs/1308.3432) on both roundings, Wq = fq(W + s B A) and Xq = fq(X):

    dX = dY Wq        dB = s dY^T (Xq A^T)        dA = s (dY B)^T Xq

so the gradient of W is never formed, and Wq is rounded again in the backward pass instead of being
kept: memory stays that of LoRA.

Group scales are those that `numerics.choose_scales` gives the merged weights, until `set_scales` gives a layer its
own. Those may be learned: the adapter, or the layer itself where weights are trained without adapters, then has a
factor for each (`lora_scale_factor`, `scale_factor`), the forward rounds their product to bfloat16, and dWq = dY^T Xq
is formed for one layer at a time (`numerics.straight_through`).

Codes may be fixed (`fix_codes`): layers with learned scales then keep the codes Q that they have, and their factors
alone are trained, as in the second stage of EfficientQAT (https://arxiv.org/abs/2407.11062): with the scales S,
Wq = S Q, dS = dWq Q summed over each group. Nothing is merged or rounded in these layers.

A frozen W may be quantized (`qlora_base`); it is then dequantized wherever these formulas say W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.errors import ModelError, UsageError
from qat_edge.quant import numerics, qlora_base
from qat_edge.quant.autocast import compute_dtype
from qat_edge.quant.module_class import insert_base
from qat_edge.quant.qlora_base import QloraLinear, QloraWeight
from qat_edge.quant.scheme import Scheme, WeightScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name for the only adapter of a model
SCALE_FACTOR = "scale_factor"  # part of the names of the parameters that learned scales are made of
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class Switch:
    """State shared by all fake-quantized layers of a model.

    Attributes:
        enabled: The layers round. Off, they compute what the layers they replaced did.
        learned_scales: The adapters, or the layers themselves, are made with factors for the scales.
    """

    enabled: bool = False
    learned_scales: bool = False

    def __deepcopy__(self, memo: Any) -> Switch:
        return self  # peft trains a copy of a head, which has to round when the others do


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
            merged = _merged(weight, lora_a, lora_b, scaling)
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
        needs_x, needs_weight, needs_bias, *_, needs_scales = ctx.needs_input_grad[:6]
        grad = grads[0].to(ctx.compute_dtype)
        grad_x = grad_weight = grad_bias = grad_a = grad_b = grad_scales = None

        with torch.autocast(grad.device.type, enabled=False):
            # Round again what the forward pass rounded, instead of having kept it.
            merged = _merged(weight, lora_a, lora_b, ctx.scaling)
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
                if lora_a is not None:
                    grad_a = (lora_b.T @ grad_merged) * ctx.scaling
                    grad_b = (grad_merged @ lora_a.T) * ctx.scaling
            elif lora_a is not None:
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


class FakeQuantLinear(nn.Linear):
    """A linear layer that rounds its input and its weight while the switch is on. `insert` makes them.

    Attributes:
        spec: Bits and group size of the weight.
        switch: Shared by all layers of the model.
        is_head: The layer comes after the blocks.
        scales: Scales of its own, shape (out, in // group); None for those of `choose_scales`.
        scale_factor: Learned factors of the scales, shape (out, in // group); None where the scales are not learned,
            or where the factors belong to an adapter.
        codes: Fixed codes, shape (out, in), int8; None where they follow the weights.
    """

    spec: WeightScheme
    switch: Switch
    is_head: bool
    scales: Tensor | None
    codes: Tensor | None
    scale_factor: nn.Parameter | None

    @property
    def learns_scales(self) -> bool:
        """True if the scales are trained. Those of a head follow its weights, or stay as a PTQ method chose them."""
        return self.switch.learned_scales and self.spec.has_groups and not self.is_head

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of its scales: (out, in // group)."""
        return self.out_features, self.in_features // self.spec.group_size

    @property
    def trained_scales(self) -> Tensor | None:
        """Scales (out, in // group), not yet rounded to bfloat16; None for those of `choose_scales`."""
        if self.scales is None or self.scale_factor is None:
            return self.scales
        return self.scales * self.scale_factor

    def forward(self, input: Tensor) -> Tensor:
        if not self.switch.enabled:
            return super().forward(input)
        weight, scales = qlora_base.base_weight(self), self.trained_scales
        return MergedFakeQuantLinear.apply(input, weight, self.bias, None, None, scales, 1.0, self.spec)


class FakeQuantQloraLinear(FakeQuantLinear, QloraLinear):
    """A FakeQuantLinear whose frozen weight is quantized."""


class FakeQuantEmbedding(nn.Embedding):
    """An embedding that rounds the rows it looks up while the switch is on. `insert` makes them.

    Attributes:
        spec: Bits and group size of the weight.
        switch: Shared by all layers of the model.
        scales: Scales of its own, shape (rows, width // group); None for those of `choose_scales`.
    """

    spec: WeightScheme
    switch: Switch
    scales: Tensor | None

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of its scales: (rows, width // group)."""
        return self.num_embeddings, self.embedding_dim // self.spec.group_size

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        if not self.switch.enabled:
            return rows
        # Rounding the rows that were looked up gives the rows of the rounded table: groups never span rows.
        scales = None if self.scales is None else functional.embedding(input, self.scales)
        rounded = numerics.fake_quantize_weight(rows.float(), self.spec.codebook, self.spec.group_size, scales)
        return rows + (rounded - rows).detach() if rows.requires_grad else rounded


class LoraFakeQuantLinear(lora.Linear):
    """peft's LoRA layer around a FakeQuantLinear; while the switch is on, the adapter is merged before rounding.

    Dropout then falls on columns of A, one mask per step: a merged weight has no per-token input to drop.

    Attributes:
        lora_scale_factor: Learned factors of the layer's scales, shape (out, in // group), by adapter name; missing
            where the scales are not learned.
    """

    def __init__(self, base_layer: FakeQuantLinear, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        if base_layer.learns_scales:
            self.lora_scale_factor = nn.ParameterDict({adapter_name: _initial_scale_factor(base_layer)})

    @property
    def trained_scales(self) -> Tensor | None:
        """Scales (out, in // group), not yet rounded to bfloat16; None for those of `choose_scales`."""
        scales = self.get_base_layer().scales
        if scales is None or not hasattr(self, "lora_scale_factor"):
            return scales
        return scales * self.lora_scale_factor[ADAPTER]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if not base.switch.enabled or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        if base.codes is not None:
            return FixedCodesLinear.apply(x, base.codes, self.trained_scales, base.bias)
        # One mask of columns for all tokens of a step.
        lora_a, lora_b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        lora_a = lora_a * self.lora_dropout[ADAPTER](torch.ones_like(lora_a[:1]))
        weight, scaling = qlora_base.base_weight(base), self.scaling[ADAPTER]
        return MergedFakeQuantLinear.apply(
            x, weight, base.bias, lora_a, lora_b, self.trained_scales, scaling, base.spec
        )


def insert(model: nn.Module, scheme: Scheme, learned_scales: bool = False) -> Switch:
    """Make every layer of `scheme` round while the returned switch is on.

    Layers change their class in place, so that shared parameters stay shared.
    """
    switch = Switch(learned_scales=learned_scales)
    for name, spec in scheme.weights.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, QloraLinear):
            # `restore_dense` gives this class. Once its weight is dense again, the layer still has to round.
            module.dense_class = _fake_quant_class(module.dense_class)
        module.__class__ = _fake_quant_class(type(module))

        module.spec, module.switch = spec, switch
        # Scales of its own may come later: of an embedding where it shares the table of a head.
        module.register_buffer("scales", None, persistent=False)
        if isinstance(module, FakeQuantLinear):
            module.is_head = name in scheme.heads
            module.register_buffer("codes", None, persistent=False)
            module.register_parameter(SCALE_FACTOR, None)
    return switch


def _fake_quant_class(original: type[nn.Module]) -> Any:
    """Return the class that computes what `original` does, and rounds."""
    ours = {nn.Linear: FakeQuantLinear, QloraLinear: FakeQuantQloraLinear, nn.Embedding: FakeQuantEmbedding}
    # QloraLinear first: it is a Linear too.
    base = next(c for c in (QloraLinear, nn.Linear, nn.Embedding) if issubclass(original, c))
    return insert_base(original, base, ours[base], "FakeQuant")


def set_scales(model: nn.Module, scales_of: Mapping[str, Tensor]) -> None:
    """Give layers and embeddings prepared by `insert` scales of their own.

    Args:
        model: May have adapters around its layers.
        scales_of: Module name -> scales (out, in // group).
    """
    for name, scales in scales_of.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, FakeQuantEmbedding):
            module.scales = scales.to(module.weight.device, torch.float32)
        else:
            layer = linear(model, name)
            layer.scales = scales.to(qlora_base.base_weight(layer).device, torch.float32)


def linear(model: nn.Module, name: str) -> FakeQuantLinear:
    """Return the layer that `insert` made of the module `name`, without an adapter around it.

    Raises:
        TypeError: There is none of that name.
    """
    module = model.get_submodule(name)
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(layer, FakeQuantLinear):
        raise TypeError(f"{name} is a {type(layer).__name__}, not a FakeQuantLinear")
    return layer


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Add peft adapters in float32, merged before rounding, to a model prepared by `insert`.

    Raises:
        UsageError: The target modules do not exist, or their adapters cannot be merged before they are rounded.
        ModelError: The model cannot have adapters on its linear layers.
    """
    is_default = config.target_modules == "all-linear"  # which peft replaces by the names of layers
    try:
        adapted: PeftModel = get_peft_model(model, register(config))
    except ValueError as error:
        text = " ".join(str(error).split())
        # The default needs no flag, so no message may name one.
        if is_default:
            raise ModelError(
                f"{type(model).__name__}: adapters cannot be added to its linear layers ({text})."
            ) from error
        raise UsageError(f"--target-modules: {text}") from error
    # peft has adapters for embeddings and convolutions too, which it would add outside of the rounding.
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraFakeQuantLinear):
            raise UsageError(
                f"--target-modules: {name.rpartition('.')[2]} is a {type(module.get_base_layer()).__name__}; only "
                "adapters of linear layers are merged before they are rounded. Leave it out."
            )
    return adapted


def register(config: LoraConfig) -> LoraConfig:
    """Make peft use LoraFakeQuantLinear for the layers that `insert` prepared; returns `config`."""
    config._register_custom_module({FakeQuantLinear: LoraFakeQuantLinear})
    return config


def train_weights(model: ModelT) -> ModelT:
    """Make all parameters of a model prepared by `insert` trainable, for fine-tuning without adapters.

    Learned scales get their factors. Changes the model in place and returns it.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, FakeQuantLinear) and module.learns_scales:
            module.scale_factor = _initial_scale_factor(module)
    return model


def fix_codes(model: nn.Module) -> None:
    """Keep the codes that a model's layers with learned scales have, and train the factors of their scales alone.

    The codes are those of the merged weights under the layers' own scales (`set_scales`), whatever the factors are, so
    they are the same for a training that begins, one that is resumed, and one that is loaded. Adapters and all other
    parameters stay as they are.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, LoraFakeQuantLinear) or not hasattr(module, "lora_scale_factor"):
                continue
            layer = module.get_base_layer()
            scales = numerics.representable(layer.scales)
            layer.codes = numerics.quantize(_merged_weight(module), scales, layer.spec.codebook)
            module.lora_scale_factor[ADAPTER].requires_grad_(True)


def scale_gradient_shares(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Return each factor of learned scales with 1 / sqrt(n q), by which LSQ multiplies its gradient.

    n is the number of weights that share a scale, q the greatest code (https://arxiv.org/abs/1902.08153, section 2.2):
    a scale collects the gradients of n weights.
    """
    found = []
    for module in model.modules():
        if isinstance(module, LoraFakeQuantLinear) and hasattr(module, "lora_scale_factor"):
            spec, factor = module.get_base_layer().spec, module.lora_scale_factor[ADAPTER]
        elif isinstance(module, FakeQuantLinear) and module.scale_factor is not None:
            spec, factor = module.spec, module.scale_factor
        else:
            continue
        greatest = spec.codebook.high / spec.codebook.step
        found.append((factor, 1 / math.sqrt(spec.group_size * greatest)))
    return found


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the model that adapters were put into, or the model itself where it has none."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


class MergedWeights:
    """Read-only view of a training model with its adapters merged, for methods that only look at weights.

    One merged weight exists at a time. Nothing in the model changes, and what is written into a weight is lost.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = base_of(model)

    def get_submodule(self, name: str) -> nn.Module:
        """Return a module that has the merged `.weight` (out, in) in float32."""
        with torch.no_grad():
            holder = nn.Module()
            holder.register_buffer("weight", _merged_weight(self.model.get_submodule(name)))
        return holder


def merge_adapters(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Merge every adapter into a float32 weight, without rounding, in place.

    Adapters and scale factors are removed, and quantized base weights become dense. A model without adapters is
    returned itself.

    Returns:
        The base model, and the scales of the layers that have their own, bfloat16-representable, by module name.
    """
    scales: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in list(base_of(model).named_modules()):
            inner = name.endswith(".base_layer")  # inside an adapted layer, which the loop has met before
            if isinstance(module, FakeQuantEmbedding) and module.scales is not None:
                scales[name] = numerics.representable(module.scales)
            if inner or not isinstance(module, LoraFakeQuantLinear | FakeQuantLinear):
                continue
            if module.trained_scales is not None:
                scales[name] = numerics.representable(module.trained_scales)
            # A dense layer without an adapter stays as it is.
            layer = linear(base_of(model), name)
            if isinstance(module, LoraFakeQuantLinear) or isinstance(layer, QloraLinear):
                qlora_base.restore_dense(layer, _merged_weight(module))
            layer.scale_factor = None
    return (model.unload() if isinstance(model, PeftModel) else model), scales


def _merged_weight(layer: Any) -> Tensor:
    """Return W + s B A of an adapted layer, S Q of one with fixed codes, W of any other: (out, in) in float32."""
    if not isinstance(layer, LoraFakeQuantLinear):
        return _merged(qlora_base.base_weight(layer), None, None, 1.0)
    codes, scales = layer.get_base_layer().codes, layer.trained_scales
    if codes is not None and scales is not None:
        # Rounded under the same scales again, it has these codes.
        return numerics.dequantize(codes, numerics.representable(scales))
    lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return _merged(qlora_base.base_weight(layer.get_base_layer()), lora_a, lora_b, layer.scaling[ADAPTER])


def _initial_scale_factor(layer: FakeQuantLinear) -> nn.Parameter:
    """Return the factors that learned scales begin with: ones (out, in // group)."""
    return nn.Parameter(torch.ones(layer.scales_shape, device=qlora_base.base_weight(layer).device))


def _merged(base: Tensor | QloraWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
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
