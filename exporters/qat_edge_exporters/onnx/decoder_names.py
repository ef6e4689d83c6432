"""Names of inputs and outputs in the graph of a decoder: the builder's own, which traced graphs have as well."""

from __future__ import annotations

INPUTS = IDS, MASK, POSITIONS = ("input_ids", "attention_mask", "position_ids")
LOGITS = "logits"
PAST, PRESENT = "past_key_values", "present"  # begin the names of the cache's inputs and outputs
# Metadata that tells such a graph from the builder's, and its value.
TRACED, FORMAT = "traced", "decoder 1"
MODEL_TYPE = "decoder"  # onnxruntime-genai's name for any decoder


def cache_names(prefix: str, layers: int) -> list[str]:
    """Return the names of keys and values of all layers, in turn."""
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
