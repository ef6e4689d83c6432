"""Tell from its configuration alone whether a model can be exported to ONNX, before it is trained or frozen.

onnxruntime-genai's builder writes one graph for each architecture that it knows, from the numbers that it reads in a
configuration. A model whose code computes something else would get another function. So the model is built without
weights, on the meta device, and what its modules compute is compared with what the builder writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from qat_edge.models import config_keys
from qat_edge_exporters import decoder_probe
from qat_edge_exporters.onnx import architecture, names, onnx_compat
from qat_edge_exporters.onnx.decoder_support import NO_CACHE

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Rotated channels of a head must be a multiple: GroupQueryAttention takes tables of half as many columns, and their
# number must be a multiple of 8.
ROTATED_MULTIPLE = 16
# Numbers in configurations by which models multiply, and the value with which nothing changes.
MULTIPLIERS = {
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
}  # fmt: skip
CLIPPED = ("clip_qkv", "swiglu_limit")  # numbers at which models clip values
EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")  # attributes of norms


def missing(config: PretrainedConfig) -> str:
    """Return a sentence on why the model cannot become ONNX; empty if nothing prevents it."""
    architectures, known = config.architectures or [], onnx_compat.known_architectures()
    if architectures and known and architectures[0] not in known:
        return f"onnxruntime-genai's builder does not know the architecture {architectures[0]}."

    gap = decoder_probe.layer_gap(config, NO_CACHE)
    if gap:
        return gap

    rotated = _rotated_channels(config)
    if rotated % ROTATED_MULTIPLE:
        return (
            f"{rotated} channels of each head are rotated, and onnxruntime's attention rotates a multiple "
            f"of {ROTATED_MULTIPLE}."
        )
    return _missing_numbers(config) or _missing_in_modules(config)


def _missing_numbers(config: PretrainedConfig) -> str:
    """Return a number of the configuration that the builder's graph leaves out, in a sentence."""
    name = (config.architectures or [""])[0]
    for key in CLIPPED:
        if getattr(config, key, None) is not None and config_keys.reads(config, key):
            return f"{name} clips values at {getattr(config, key):g} ({key}), and the builder's graph does not."
    if name not in onnx_compat.WITH_MULTIPLIERS:
        for key, neutral in MULTIPLIERS.items():
            value = getattr(config, key, None)
            if value is not None and value != neutral and config_keys.reads(config, key):
                return f"{name} multiplies by {value:g} ({key}), and the builder's graph does not."

    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation is not None and activation not in onnx_compat.ACTIVATIONS:
        return f"the builder does not know the activation function {activation}."
    return ""


def _missing_in_modules(config: PretrainedConfig) -> str:
    """Return what the builder's graph would compute otherwise than the model's modules, in a sentence."""
    model = architecture.without_weights(config)
    if model is None:
        return ""  # code of its own, which is not run here
    checks: tuple[Callable[[PreTrainedModel], str], ...] = (_unknown_layers, _other_norms, _other_scales)
    return next((sentence for check in checks if (sentence := check(model))), "")


def _unknown_layers(model: PreTrainedModel) -> str:
    """Name matrices that the builder's graph has no node for."""
    fused = architecture.fused_projections(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parts = [part for name in linears for part in fused.get(name, {name: 0})]
    unknown = sorted(part for part in parts if not names.is_known(part))
    if unknown:
        return f"{type(model).__name__} has layers that the exporter does not know: {', '.join(unknown[:3])}."
    return ""


def _other_norms(model: PreTrainedModel) -> str:
    """Name a norm of another type or with another epsilon than the builder writes."""
    config, name = model.config, type(model).__name__
    written = onnx_compat.norm_epsilon(config)
    for module in model.modules():
        kind = type(module).__name__
        if not kind.lower().endswith(("norm", "norm1p", "layernorm")):
            continue
        found = next((float(getattr(module, e)) for e in EPSILON_NAMES if hasattr(module, e)), None)
        if getattr(module, "weight", None) is None:
            return f"{kind} of {name} has no weight, and the builder writes norms with weights only."
        is_layer_norm = isinstance(module, nn.LayerNorm) or getattr(module, "bias", None) is not None
        if is_layer_norm != (name in onnx_compat.WITH_LAYER_NORM):
            other = "RMS norms" if is_layer_norm else "layer norms"
            return f"{name} normalizes with {kind}, and the builder writes {other} for it."
        if found is not None and not math.isclose(found, written, rel_tol=1e-5):
            return f"{kind} of {name} has an epsilon of {found:g}, and the builder writes {written:g}."
    return ""


def _other_scales(model: PreTrainedModel) -> str:
    """Name an attention whose scores are scaled by another number than the builder writes."""
    for module in model.modules():
        scaling: Any = getattr(module, "scaling", None)
        width: Any = getattr(module, "head_dim", None)
        if not isinstance(scaling, float) or not isinstance(width, int) or not hasattr(module, "layer_idx"):
            continue
        written = onnx_compat.attention_scale(model.config, width)
        if not math.isclose(scaling, written, rel_tol=1e-5):
            kind = type(module).__name__
            return f"{kind} multiplies attention scores by {scaling:g}, and the builder writes {written:g}."
    return ""


def _rotated_channels(config: PretrainedConfig) -> int:
    """Return the number of channels of a head that get a rotary embedding."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)  # some models have parameters for each layer type
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = parameters.get(config_keys.PARTIAL, 1.0) if config_keys.reads_rope(config, config_keys.PARTIAL) else 1.0
    return int(width * share)
