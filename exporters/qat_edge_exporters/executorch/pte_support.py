"""What this target lacks for a model, said by its configuration alone: before it is trained, frozen or exported."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_MAPPING

from qat_edge.models import tasks

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def missing(config: Any) -> str:
    """Why the model cannot become a .pte, as a sentence; empty where nothing speaks against it."""
    if tasks.is_encoder(config):
        return _missing_for_encoder(config)
    strange = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS)
    if strange:
        return f"layers of type {', '.join(strange)} keep a state that is no key-value cache."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."
    return ""


def _missing_for_encoder(config: Any) -> str:
    windows = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if windows:
        return f"{config.model_type} has layers that see a part of the text only ({', '.join(sorted(windows))})."
    body: Any = MODEL_MAPPING.get(type(config), None)
    if not getattr(body, "_supports_attention_backend", False):
        return f"{config.model_type} has attention of its own, which no other can take the place of."
    return ""
