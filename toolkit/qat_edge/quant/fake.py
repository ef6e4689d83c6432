"""Fake quantization in training, with LoRA adapters that are merged before they are rounded.

Layers change their class in place. `layer_functions` has what an adapted layer computes, and its gradients.

Group scales are those that `numerics.choose_scales` gives the merged weights, until `set_scales` gives a layer its
own. Those may be learned: the adapter, or the layer itself where weights are trained without adapters, then has a
factor for each (`lora_scale_factor`, `scale_factor`).

Codes may be fixed (`fix_codes`): layers with learned scales then keep the codes that they have, and their factors
alone are trained, as in the second stage of EfficientQAT (https://arxiv.org/abs/2407.11062).

Adapters may stay unmerged (`Switch.unmerged`): the forward pass is then fq(x) fq(W)^T + s x A^T B^T, over a base that
nothing changes (`fix_base`).

A frozen W may be quantized (`qlora_base`) or stored in 16 bits (`base_storage`); it is then widened first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from qat_edge.errors import ModelError, UsageError
from qat_edge.quant import numerics, qlora_base
from qat_edge.quant.layer_functions import FixedCodesLinear, MergedFakeQuantLinear, SharedInput, merged_weight
from qat_edge.quant.module_class import insert_base
from qat_edge.quant.qlora_base import FrozenLinear, QloraLinear, QloraWeight
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
        unmerged: Adapters are added to the outputs of rounded layers, in float, instead of to their weights.
        inputs: Rounds an input that several layers read once.
    """

    enabled: bool = False
    learned_scales: bool = False
    unmerged: bool = False
    inputs: SharedInput = field(default_factory=SharedInput, repr=False, compare=False)

    def __deepcopy__(self, memo: Any) -> Switch:
        return self  # peft trains a copy of a head, which has to round when the others do


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

    def rounded_weight(self) -> Tensor:
        """Return the weight (out, in) that the forward pass multiplies with while the switch is on, in float32.

        It has no gradient: it is for a head, whose weight is not trained.
        """
        with torch.no_grad():
            weight, scales = merged_weight(qlora_base.base_weight(self), None, None, 1.0), self.trained_scales
            own = None if scales is None else numerics.representable(scales)
            return numerics.fake_quantize_weight(weight, self.spec.codebook, self.spec.group_size, own)

    def forward(self, input: Tensor) -> Tensor:
        weight = qlora_base.base_weight(self)
        if not self.switch.enabled:
            return FrozenLinear.apply(input, weight, self.bias) if is_narrow(weight) else super().forward(input)
        scales, rounded = self.trained_scales, self.switch.inputs.rounded(input)
        if self.codes is not None and scales is not None:
            return FixedCodesLinear.apply(input, rounded, self.codes, scales, self.bias)
        return MergedFakeQuantLinear.apply(input, rounded, weight, self.bias, None, None, scales, 1.0, self.spec)


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
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # the table may be stored in 16 bits
        if not self.switch.enabled:
            return rows
        # Rounding the rows that were looked up gives the rows of the rounded table: groups never span rows.
        scales = None if self.scales is None else functional.embedding(input, self.scales)
        rounded = numerics.fake_quantize_weight(rows, self.spec.codebook, self.spec.group_size, scales)
        return rows + (rounded - rows).detach() if rows.requires_grad else rounded


class LoraFakeQuantLinear(lora.Linear):
    """peft's LoRA layer around a FakeQuantLinear; while the switch is on, the adapter is merged before rounding.

    Dropout then falls on columns of A, one mask per step: a merged weight has no per-token input to drop. An unmerged
    adapter is peft's own.

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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the adapter as peft does, which takes only a layer that does not round.

        Raises:
            UsageError: The layer rounds: its forward pass merges the adapter already, under scales of its own.
        """
        if self.get_base_layer().switch.enabled:
            raise UsageError(
                "merge_adapter or merge_and_unload of a model in QAT: it would be another function than the trained "
                "one. Export the run with `qat-edge export`, or merge the plain LoRA in RUN/reference."
            )
        super().merge(safe_merge, adapter_names)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if not base.switch.enabled or base.switch.unmerged or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        rounded = base.switch.inputs.rounded(x)
        if base.codes is not None:
            return FixedCodesLinear.apply(x, rounded, base.codes, self.trained_scales, base.bias)
        # One mask of columns for all tokens of a step.
        lora_a, lora_b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        lora_a = lora_a * self.lora_dropout[ADAPTER](torch.ones_like(lora_a[:1]))
        weight, scaling = qlora_base.base_weight(base), self.scaling[ADAPTER]
        return MergedFakeQuantLinear.apply(
            x, rounded, weight, base.bias, lora_a, lora_b, self.trained_scales, scaling, base.spec
        )


def insert(model: nn.Module, scheme: Scheme, learned_scales: bool = False, unmerged: bool = False) -> Switch:
    """Make every layer of `scheme` round while the returned switch is on.

    Layers change their class in place, so that shared parameters stay shared.
    """
    switch = Switch(learned_scales=learned_scales, unmerged=unmerged)
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


def fix_base(model: nn.Module) -> None:
    """Keep codes and scales that the layers under unmerged adapters have, so that no pass rounds them again."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FakeQuantLinear):
                weight, spec = merged_weight(qlora_base.base_weight(module), None, None, 1.0), module.spec
                own = module.scales
                scales = numerics.choose_scales(weight, spec.codebook, spec.group_size) if own is None else own
                module.scales = numerics.representable(scales)
                module.codes = numerics.quantize(weight, module.scales, spec.codebook)


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


def is_narrow(weight: Tensor | QloraWeight) -> bool:
    """Return whether a dense weight is stored in 16 bits."""
    return isinstance(weight, Tensor) and weight.dtype.itemsize < torch.float32.itemsize


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the model that adapters were put into, or the model itself where it has none."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
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

    Adapters and scale factors are removed, and base weights in few bits become dense float32. A model without adapters
    is returned itself. Unmerged adapters are removed and change nothing.

    Returns:
        The base model, and the scales of the layers that have their own, bfloat16-representable, by module name.
    """
    scales: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in list(base_of(model).named_modules()):
            inner = name.endswith(".base_layer")  # inside an adapted layer, which the loop has met before
            if isinstance(module, FakeQuantEmbedding | FakeQuantLinear) and is_narrow(qlora_base.base_weight(module)):
                module.weight.data = module.weight.data.float()
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
    """Return W + s B A of an adapted layer, S Q of one with fixed codes, W of any other: (out, in) in float32.

    W is also that of a layer with an unmerged adapter.
    """
    if not isinstance(layer, LoraFakeQuantLinear):
        return merged_weight(qlora_base.base_weight(layer), None, None, 1.0)
    if layer.get_base_layer().switch.unmerged:
        return merged_weight(qlora_base.base_weight(layer.get_base_layer()), None, None, 1.0)
    codes, scales = layer.get_base_layer().codes, layer.trained_scales
    if codes is not None and scales is not None:
        # Rounded under the same scales again, it has these codes.
        return numerics.dequantize(codes, numerics.representable(scales))
    lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return merged_weight(qlora_base.base_weight(layer.get_base_layer()), lora_a, lora_b, layer.scaling[ADAPTER])


def _initial_scale_factor(layer: FakeQuantLinear) -> nn.Parameter:
    """Return the factors that learned scales begin with: ones (out, in // group)."""
    return nn.Parameter(torch.ones(layer.scales_shape, device=qlora_base.base_weight(layer).device))
