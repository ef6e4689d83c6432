"""Rotary embedding in GGUF: base, rotated width and scaling, computed with transformers' own functions.

llama.cpp divides each frequency by a factor of its own where the file has a tensor of them: Llama 3's scaling is
stored so, and Phi's factors for short and for long texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qat_edge.models.gguf_rotary import LONG_FACTORS, ROTARY_FACTORS, SHORT_FACTORS, YARN_BETAS, head_width

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PLAIN = "default"
# Types of scaling that llama.cpp's graph of an architecture can have, beyond none.
SCALINGS = {
    "llama": ("linear", "yarn", "llama3"),
    "smollm3": ("linear", "yarn"),
    "qwen2": ("linear", "yarn"),
    "qwen3": ("linear", "yarn"),
    "phi3": ("longrope",),
    "gemma2": (),
    "gemma3": ("linear",),
}
YARN_KEYS = {"factor", "original_max_position_embeddings", "rope_type", "type", "rope_theta", *YARN_BETAS}


class RotarySettings(NamedTuple):
    """Metadata without the architecture's name, and tensors by name, of a rotary embedding."""

    metadata: dict[str, Any]
    factors: dict[str, NDArray[np.float32]]


def full_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the parameters of layers that see everything, which are those of all layers in most models."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    found: dict[str, Any] = parameters.get("full_attention", parameters)
    return found


def rotary_gap(config: PretrainedConfig, architecture: str) -> str:
    """Return what llama.cpp's graph lacks for the rotary embedding of a model, in a sentence; empty where nothing."""
    full = full_parameters(config)
    kind = full.get("rope_type", PLAIN)
    if kind != PLAIN and kind not in SCALINGS[architecture]:
        return f"llama.cpp's graph for {architecture} has no rotary embedding of type {kind}."
    if kind == "yarn" and (full.keys() - YARN_KEYS or not full.get("original_max_position_embeddings")):
        return "llama.cpp computes yarn rotary embeddings from factor, original length and betas alone."
    local = (config.rope_parameters or {}).get("sliding_attention", {})
    if local.get("rope_type", PLAIN) != PLAIN:
        return "llama.cpp does not scale the rotary embedding of layers with a window."
    if architecture != "phi3" and full.get("partial_rotary_factor", 1.0) != 1.0:
        return f"llama.cpp's graph for {architecture} rotates all channels of a head, and this model a part of them."
    return ""


def rotary_settings(config: PretrainedConfig, architecture: str) -> RotarySettings:
    """Return what a file has about the rotary embedding of a model without a `rotary_gap`."""
    full = full_parameters(config)
    kind = full.get("rope_type", PLAIN)
    values: dict[str, Any] = {
        "rope.dimension_count": int(head_width(config) * full.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(full["rope_theta"]),
    }
    factors: dict[str, NDArray[np.float32]] = {}
    if "sliding_attention" in (config.rope_parameters or {}):
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = int(full["original_max_position_embeddings"])
        values |= {f"rope.scaling.yarn_{key}": float(full[key]) for key in YARN_BETAS if key in full}
    if kind == "llama3":
        factors[ROTARY_FACTORS] = _frequency_factors(config, full["rope_theta"])
    if kind == "longrope":
        values["rope.scaling.original_context_length"] = int(full["original_max_position_embeddings"])
        values["rope.scaling.attn_factor"] = float(ROPE_INIT_FUNCTIONS[kind](config, "cpu")[1])
        for name, key in ((LONG_FACTORS, "long_factor"), (SHORT_FACTORS, "short_factor")):
            factors[name] = np.asarray(full[key], np.float32)
    return RotarySettings(values, factors)


def _frequency_factors(config: PretrainedConfig, base: float) -> NDArray[np.float32]:
    """Return what each frequency is divided by, shape (width / 2)."""
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
    width = 2 * len(scaled)
    plain = float(base) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    # Frequencies that stay have factor 1, not one that differs from it by the rounding of float32.
    ratio = (plain / scaled).astype(np.float32)
    return np.where(np.isclose(ratio, 1, rtol=1e-6, atol=0), np.float32(1), ratio)
