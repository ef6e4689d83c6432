"""Tell from a model's configuration, before it is trained or frozen, whether llama.cpp's graphs compute it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge.models import tasks
from qat_edge.models.gguf_rotary import head_width
from qat_edge_exporters.gguf.gguf_families import FAMILIES, Family
from qat_edge_exporters.gguf.gguf_rope import rotary_gap

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FULL, WINDOW = "full_attention", "sliding_attention"
# Gemma of so many layers scales scores by other numbers in llama.cpp, whatever the file says.
OTHER_SCALES = {"gemma2": 46, "gemma3": 62}


def missing(config: PretrainedConfig) -> str:
    """Return what llama.cpp lacks for a model, as a sentence; empty where nothing is known."""
    if tasks.is_encoder_config(config):
        return f"{config.model_type} is an encoder, and this target is for models that generate text."
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"llama.cpp's graph for {config.model_type} is not known here. Known families: {', '.join(FAMILIES)}."
    classes = config.architectures or [family.model_class]
    if classes != [family.model_class]:
        return f"{classes[0]} is not {family.model_class}, which llama.cpp's graph for {family.architecture} computes."
    checks = (_gap_in_settings, _gap_in_layers, _gap_in_scores)
    reasons = (check(config, family) for check in checks)
    return next((reason for reason in reasons if reason), "") or rotary_gap(config, family.architecture)


def window_gap(config: PretrainedConfig, family: Family, context_length: int) -> str:
    """Return why a context is too long, in a sentence: llama.cpp's graph lets all layers see everything."""
    window = getattr(config, "sliding_window", None)
    if family.window_period or window is None or context_length <= window:
        return ""
    types = getattr(config, "layer_types", None)
    if types is not None and WINDOW not in types:
        return ""
    return (
        f"--context-length {context_length}: layers of this model see the last {window} tokens, and llama.cpp's graph "
        f"for {family.architecture} has no such window. Give {window} or less."
    )


def _gap_in_settings(config: PretrainedConfig, family: Family) -> str:
    """Name a setting with which the model computes otherwise than the graph."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != family.activation:
        return f"its activation function is {activation}, and llama.cpp's graph has {family.activation}."
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            return f"its layers have biases ({key}) that are not exported to GGUF."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."
    if family.architecture == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        return "llama.cpp's graph for gemma2 has soft caps on scores and logits, and this model lacks one."
    if family.architecture == "gemma3" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        return "llama.cpp's graph for gemma3 has no soft caps."
    heads = config.num_attention_heads
    if family.is_fused and heads * head_width(config) != config.hidden_size:
        return f"llama.cpp's graph for {family.architecture} has heads that are together as wide as the hidden states."
    return ""


def _gap_in_layers(config: PretrainedConfig, family: Family) -> str:
    """Name layers that differ from those of the graph in what they see or rotate."""
    layers, types = config.num_hidden_layers, getattr(config, "layer_types", None) or []
    unknown = sorted(set(types) - {FULL, WINDOW})
    if unknown:
        return f"layers of type {', '.join(unknown)} are not exported to GGUF."
    period = family.window_period
    if period and list(types) != [WINDOW if (i + 1) % period else FULL for i in range(layers)]:
        return (
            f"in llama.cpp's graph for {family.architecture} each {period}th layer sees everything, and in this model "
            "others do."
        )
    period = family.unrotated_period
    if period and [bool(r) for r in config.no_rope_layers] != [bool((i + 1) % period) for i in range(layers)]:
        return (
            f"in llama.cpp's graph for {family.architecture} each {period}th layer is not rotated, and in this model "
            "others are not."
        )
    return ""


def _gap_in_scores(config: PretrainedConfig, family: Family) -> str:
    """Name a scale of attention scores that is not that of the graph."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return ""
    is_other = OTHER_SCALES.get(family.architecture) == config.num_hidden_layers
    expected = config.hidden_size // config.num_attention_heads if is_other else head_width(config)
    if scalar != expected:
        return f"it divides scores by the root of {scalar}, and llama.cpp's graph by that of {expected}."
    return ""
