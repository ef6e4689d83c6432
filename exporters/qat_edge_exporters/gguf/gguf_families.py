"""Families of models whose graph llama.cpp has: names of tensors, order of rows, and the metadata that its graph reads.

Families differ in three ways. llama.cpp's rotary embedding pairs neighboring channels in some of them, where
transformers pairs the halves of a head: the rows of queries and keys are stored in another order then, each with its
codes and scales. Gemma's norms multiply by 1 + their weight, and llama.cpp stores that sum. And some have settings of
their own, such as a soft cap.

Reference: llama.cpp's src/models, https://github.com/ggml-org/llama.cpp/tree/master/src/models
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qat_edge.errors import ExportError
from qat_edge.models.gguf_rotary import head_width

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
SILU, GELU_TANH = "silu", "gelu_pytorch_tanh"
# Modules of one layer in transformers; a family has some of them.
LAYER_MODULES = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj",
    "self_attn.q_norm", "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj",
)  # fmt: skip
# Modules that llama.cpp stores under one name, in different families.
FUSED, PARTS = ("self_attn.qkv_proj", "mlp.gate_up_proj"), ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        architecture: llama.cpp's name, which its keys begin with.
        model_class: transformers' class.
        activation: of the MLP in llama.cpp's graph.
        pairs_neighbors: llama.cpp rotates neighboring channels together; rows of queries and keys are reordered.
        norm_offset: what llama.cpp's weights of norms have more than those of transformers.
        window_period: of so many layers, the last one sees everything and the others a window; 0 for a graph without
            windows.
        shares_table: the graph has one table for embedding and head.
        is_fused: the graph has fused projections.
        unrotated_period: of so many layers, the last one does not rotate queries and keys; 0 for none.
        qkv_bias: queries, keys and values have biases.
    """

    architecture: str
    model_class: str
    activation: str = SILU
    pairs_neighbors: bool = False
    norm_offset: float = 0.0
    window_period: int = 0
    shares_table: bool = False
    is_fused: bool = False
    unrotated_period: int = 0
    qkv_bias: bool = False


_GEMMA: dict[str, Any] = {"activation": GELU_TANH, "norm_offset": 1.0}
# By `model_type` of a configuration.
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", pairs_neighbors=True),
    "mistral": Family("llama", "MistralForCausalLM", pairs_neighbors=True),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", pairs_neighbors=True, unrotated_period=4),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", **_GEMMA, window_period=2, shares_table=True),
    "gemma3_text": Family("gemma3", "Gemma3ForCausalLM", **_GEMMA, window_period=6),
    "phi3": Family("phi3", "Phi3ForCausalLM", is_fused=True),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model.

    Raises:
        ExportError: it is not known; the message lists the known ones.
    """
    if config.model_type not in FAMILIES:
        raise ExportError(f"gguf: models of type {config.model_type} are not known. Known: {', '.join(FAMILIES)}.")
    return FAMILIES[config.model_type]


def family_of_architecture(architecture: str) -> Family | None:
    """Return a family with llama.cpp's graph of that name; None where there is none."""
    return next((family for family in FAMILIES.values() if family.architecture == architecture), None)


def module_names(family: Family, layers: int) -> dict[str, str]:
    """Return llama.cpp's name of every module that the graph of a family can have, by transformers' name."""
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    table = gguf.get_tensor_name_map(number, layers)
    other = PARTS if family.is_fused else FUSED
    modules = [f"model.layers.{i}.{part}" for i in range(layers) for part in LAYER_MODULES if part not in other]
    names = {module: table.get_name(module) for module in (EMBEDDING, NORM, HEAD, *modules)}
    return {module: str(name) for module, name in names.items() if name is not None}


def row_order(module: str, rows: int, metadata: Mapping[str, Any], family: Family) -> NDArray[np.intp] | None:
    """Return the order in which llama.cpp has the rows of a matrix or bias; None where it is that of transformers.

    Args:
        module: transformers' name.
        rows: of the matrix.
        metadata: of the file.
        family: of the model.
    """
    part = module.rpartition(".")[2]
    if not family.pairs_neighbors or part not in ("q_proj", "k_proj"):
        return None
    heads = metadata[f"{family.architecture}.attention.head_count{'' if part == 'q_proj' else '_kv'}"]
    # Channel i of the first half of a head, then channel i of the second half.
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def is_norm(module: str) -> bool:
    """Return whether a module of the table above is a norm."""
    return module == NORM or module.endswith("norm")


def architecture_metadata(config: PretrainedConfig, family: Family, context_length: int) -> dict[str, Any]:
    """Return the keys of the architecture, apart from those of the rotary embedding's scaling."""
    width = head_width(config)
    values: dict[str, Any] = {
        "context_length": context_length,
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if family.window_period:
        values["attention.sliding_window"] = config.sliding_window
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            values[cap] = float(getattr(config, cap))
    return {f"{family.architecture}.{key}": value for key, value in values.items()}
