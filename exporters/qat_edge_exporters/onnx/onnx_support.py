"""Tell from its configuration alone whether a model can be exported to ONNX, before it is trained or frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge_exporters.onnx import onnx_compat

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Rotated channels of a head must be a multiple: GroupQueryAttention takes tables of half as many columns, and their
# number must be a multiple of 8.
ROTATED_MULTIPLE = 16


def missing(config: PretrainedConfig) -> str:
    """Return a sentence on why the model cannot become ONNX; empty if nothing prevents it."""
    architectures, known = config.architectures or [], onnx_compat.known_architectures()
    if architectures and known and architectures[0] not in known:
        return f"onnxruntime-genai's builder does not know the architecture {architectures[0]}."

    unsupported = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS)
    if unsupported:
        return f"layers of type {', '.join(unsupported)} have no plain key-value cache."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."

    rotated = _rotated_channels(config)
    if rotated % ROTATED_MULTIPLE:
        return (
            f"{rotated} channels of each head are rotated, and onnxruntime's attention rotates a multiple "
            f"of {ROTATED_MULTIPLE}."
        )
    return ""


def _rotated_channels(config: PretrainedConfig) -> int:
    """Return the number of channels of a head that get a rotary embedding."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)  # some models have parameters for each layer type
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width * parameters.get("partial_rotary_factor", 1.0))
