"""The two ways a matrix is named: the frozen checkpoint's modules and the builder's nodes and initializers."""

from __future__ import annotations

import re

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
TURN_NODE = f"/{HEAD}/turn/MatMul"  # what turns the head's input
GENAI_CONFIG = "genai_config.json"
# Initializers (positions, rotated width / 2): name -> the layer type they belong to, and 0 for cosines, 1 for sines.
ROTARY_TABLES = {
    "cos_cache": ("", 0),
    "sin_cache": ("", 1),
    "cos_cache_global": ("full_attention", 0),
    "sin_cache_global": ("full_attention", 1),
    "cos_cache_local": ("sliding_attention", 0),
    "sin_cache_local": ("sliding_attention", 1),
}

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_NODE = re.compile(r"/(model/layers\.\d+/(?:attn|mlp)/\w+|lm_head)/MatMul(?:NBits)?")


def is_known(module: str) -> bool:
    """Whether the builder has a place for this module's codes."""
    return module in (EMBEDDING, HEAD) or _LINEAR.fullmatch(module) is not None


def module_of_node(node: str) -> str | None:
    """Module whose matrix a MatMulNBits or MatMul node multiplies by, None for a name the builder does not give."""
    found = _NODE.fullmatch(node)
    if found is None:
        return None
    module = found[1].replace("/", ".").replace(".attn.", ".self_attn.")
    return module if is_known(module) else None


def initializer_stem(node: str) -> str:
    """What the names of a node's initializers start with."""
    return node.removeprefix("/").replace("/", ".")
