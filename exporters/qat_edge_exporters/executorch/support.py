"""What this target lacks for a model, said by its configuration alone: before it is trained, frozen or exported."""

from __future__ import annotations

from typing import Any

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def missing(config: Any) -> str:
    """Why the model cannot become a .pte, as a sentence; empty where nothing speaks against it."""
    strange = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS)
    if strange:
        return f"layers of type {', '.join(strange)} keep a state that is no key-value cache."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."
    return ""
