"""Tell from a configuration whether a decoder can be traced from its own code, before it is trained or frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge_exporters import decoder_probe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
OPERATOR = "onnxruntime's operator"


def missing(config: PretrainedConfig) -> str:
    """Return why the model cannot be traced, as a sentence; empty if no reason is known."""
    unknown = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS)
    if unknown:
        return f"layers of type {', '.join(unknown)} have no plain key-value cache."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."
    return decoder_probe.obstacle(config, OPERATOR)
