"""Check from a model's configuration, before it is trained or frozen, whether it can become a .pte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge.models import tasks
from qat_edge_exporters import decoder_probe, encoder_support

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def missing(config: PretrainedConfig) -> str:
    """Return why the model cannot become a .pte, as a sentence; empty if no reason is known."""
    if tasks.is_encoder_config(config):
        return encoder_support.missing(config)

    unknown = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS)
    if unknown:
        return f"layers of type {', '.join(unknown)} keep a state that is no key-value cache."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."
    return decoder_probe.obstacle(config)
