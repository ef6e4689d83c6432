"""Convert between the names of a matrix: module of the frozen checkpoint, node and initializer of the graph."""

from __future__ import annotations

import re
from typing import NamedTuple

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ATTENTION = "GroupQueryAttention"  # operator over a cache of keys and values
ADAPTER_FILE = "adapter.onnx_adapter"  # matrices of an unmerged LoRA adapter, in onnxruntime's format
ROTATION_NODE = f"/{HEAD}/turn/MatMul"  # multiplies the head's input by a rotation; the name is part of the format
INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # without which text cannot be tokenized
GENAI_CONFIG = "genai_config.json"  # of a decoder
CONFIG = "config.json"  # of an encoder, copied from its checkpoint


class RotaryTable(NamedTuple):
    """A rotary table of the graph.

    Attributes:
        layer_type: the layers that use it; "" if all do.
        is_sine: True for sines, False for cosines.
    """

    layer_type: str
    is_sine: bool


class AdapterNames(NamedTuple):
    """Names of the nodes and inputs that add a LoRA adapter to the product of one layer.

    Attributes:
        down: input of the graph with A transposed, (in, rank).
        up: input of the graph with s B transposed, (rank, out).
        down_node: node that multiplies the layer's input by A.
        up_node: node that multiplies the result by s B.
        sum_node: node that adds this to the layer's own product.
        base: value that holds the layer's own product.
    """

    down: str
    up: str
    down_node: str
    up_node: str
    sum_node: str
    base: str


# Initializers of shape (positions, rotated width / 2).
ROTARY_TABLES = {
    "cos_cache": RotaryTable("", is_sine=False),
    "sin_cache": RotaryTable("", is_sine=True),
    "cos_cache_global": RotaryTable("full_attention", is_sine=False),
    "sin_cache_global": RotaryTable("full_attention", is_sine=True),
    "cos_cache_local": RotaryTable("sliding_attention", is_sine=False),
    "sin_cache_local": RotaryTable("sliding_attention", is_sine=True),
}

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)")
_NODE = re.compile(r"/(model/layers\.\d+/(?:attn|mlp)/\w+|lm_head)/MatMul(?:NBits)?")


def is_known(module: str) -> bool:
    """Return whether the builder's graph has a node for this module's codes."""
    return module in (EMBEDDING, HEAD) or _LINEAR.fullmatch(module) is not None


def module_of_node(node: str | bytes) -> str | None:
    """Return the module whose matrix a MatMulNBits or MatMul node multiplies by, or None for other names.

    A name that is not UTF-8 is read as bytes, and no name of ours.
    """
    found = _NODE.fullmatch(node) if isinstance(node, str) else None
    if found is None:
        return None
    module = found[1].replace("/", ".").replace(".attn.", ".self_attn.")
    return module if is_known(module) else None


def half_step_stem(node: str) -> str:
    """Return the prefix of the names of the nodes that add half a step to a MatMulNBits node's levels."""
    return f"{node.rpartition('/')[0]}/half_step"


def adapter_names(node: str) -> AdapterNames:
    """Return the names that belong to the adapter of the layer whose MatMulNBits or MatMul node has this name."""
    stem = node.rpartition("/")[0]
    down, up = f"{stem}/lora_A/MatMul", f"{stem}/lora_B/MatMul"
    return AdapterNames(
        down=f"{initializer_stem(down)}.weight",
        up=f"{initializer_stem(up)}.weight",
        down_node=down,
        up_node=up,
        sum_node=f"{stem}/lora/Add",
        base=f"{stem}/lora/base",
    )


def initializer_stem(node: str) -> str:
    """Return the prefix of the names of a node's initializers."""
    return node.removeprefix("/").replace("/", ".")
