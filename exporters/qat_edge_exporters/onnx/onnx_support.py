"""What this target lacks for a model, said by its configuration alone: before it is trained, frozen or exported."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
ROTATED_MULTIPLE = 16  # channels of a head: GroupQueryAttention takes tables of a multiple of 8 columns, half as wide


def missing(config: Any) -> str:
    """Why the model cannot become ONNX, as a sentence; empty where nothing speaks against it."""
    architectures, known = config.architectures or [], _known_to_builder()
    if architectures and known and architectures[0] not in known:
        return f"onnxruntime-genai's builder does not know the architecture {architectures[0]}."
    strange = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS)
    if strange:
        return f"layers of type {', '.join(strange)} keep no plain key-value cache."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."
    rotated = _rotated(config)
    if rotated % ROTATED_MULTIPLE:
        return (
            f"{rotated} channels of each head are rotated, and onnxruntime's attention rotates a multiple "
            f"of {ROTATED_MULTIPLE}."
        )
    return ""


def _known_to_builder() -> set[str]:
    """Architectures that the installed builder branches on; none where its source cannot be read."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    source = Path(spec.origin).parent / "models/builder.py" if spec and spec.origin else None
    if source is None or not source.is_file():
        return set()
    return set(re.findall(r'architectures\[0\] == "(\w+)"', source.read_text(encoding="utf-8")))


def _rotated(config: Any) -> int:
    """Channels of a head that positions turn."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width * parameters.get("partial_rotary_factor", 1.0))
