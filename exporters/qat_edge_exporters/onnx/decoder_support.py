"""Tell from a configuration whether a decoder can be traced from its own code, before it is trained or frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge_exporters import decoder_probe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Its comparisons choose by value, which `decoder_check` could not tell from a graph that was changed to do so.
COMPARING = ("xielu",)
NO_CACHE = "have no plain key-value cache"  # layers of other types, in a sentence
OPERATOR = "onnxruntime's operator"


def missing(config: PretrainedConfig) -> str:
    """Return why the model cannot be traced, as a sentence; empty if no reason is known."""
    activation = getattr(config, "hidden_act", None)
    if activation in COMPARING:
        return f"its activation function {activation} compares values, and verify accepts no graph that does."
    return decoder_probe.layer_gap(config, NO_CACHE) or decoder_probe.obstacle(config, OPERATOR)
