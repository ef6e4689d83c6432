"""What the graph has to compute beside its matrices, as the model's configuration and its own code say."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qat_edge.errors import ExportError
from qat_edge.quant.frozen import FrozenWeight

Tables = tuple[NDArray[np.float32], NDArray[np.float32]]  # cosines and sines, (positions, rotated width / 2)


@dataclass(frozen=True)
class Architecture:
    """Facts of one model for `repair`.

    rotary: tables by layer type, under "" where all layers share them. plain_layers: those whose queries and keys are
    not rotated. embedding_scale: what looked-up rows are multiplied by. fused: rows of each part, in order, by the name
    of a projection that holds several.
    """

    rotary: dict[str, Tables]
    plain_layers: list[int]
    embedding_scale: float
    fused: dict[str, dict[str, int]]


def read(folder: Path, context_length: int) -> Architecture:
    """The facts of the checkpoint in `folder`, tables for `context_length` positions.

    Raises:
        ExportError: its rotary embeddings change within the context.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights are not read, only what surrounds them
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    rotates = getattr(config, "no_rope_layers", None) or []  # 1 where a layer rotates, 0 where not
    return Architecture(
        rotary=_rotary_tables(model, context_length),
        plain_layers=[i for i, rotated in enumerate(rotates[: config.num_hidden_layers]) if not rotated],
        embedding_scale=float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)),
        fused=_fused(model),
    )


def split(weights: dict[str, FrozenWeight], fused: dict[str, dict[str, int]]) -> dict[str, FrozenWeight]:
    """Every matrix under the names of its parts; rows keep their codes and scales."""
    found: dict[str, FrozenWeight] = {}
    for name, weight in weights.items():
        start = 0
        for part, rows in fused.get(name, {name: weight.codes.shape[0]}).items():
            end = start + rows
            found[part] = FrozenWeight(weight.codes[start:end], weight.scales[start:end], weight.bits)
            start = end
    return found


def metadata(fused: dict[str, dict[str, int]]) -> dict[str, str]:
    """What the graph's metadata says of projections that were fused, so that its reader can join them again."""
    return {"fused": json.dumps({name: list(parts) for name, parts in fused.items()})} if fused else {}


def _rotary_tables(model: nn.Module, positions: int) -> dict[str, Tables]:
    """By the model's own module, made again on the CPU: buffers of one on the meta device hold nothing."""
    module: Any = next((m for m in model.modules() if hasattr(m, "rope_type")), None)
    if module is None:
        return {}
    rotary = type(module)(module.config)
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}
    for kind in kinds.values():
        _check_positions(module.config, kind, positions)
    rotary.rope_type = dict.fromkeys(kinds, "default") if "" not in kinds else "default"
    ids = torch.arange(positions).unsqueeze(0)
    tables = {}
    for kind in kinds:
        both = rotary(torch.zeros(1), ids, **({"layer_type": kind} if kind else {}))
        # Both halves are one table, as rotate_half pairs channels; of interleaved ones the builder's own stays.
        (cos, again), (sin, _) = (table[0].chunk(2, dim=-1) for table in both)
        if torch.equal(cos, again):
            tables[kind] = (cos.contiguous().numpy(), sin.contiguous().numpy())
    return tables


def _check_positions(config: Any, kind: str, positions: int) -> None:
    """Refuse frequencies that change with the length of the text, where it may become long enough for that."""
    parameters = getattr(config, "rope_parameters", None) or {}
    fixed = parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    if ("dynamic" in kind or kind == "longrope") and positions > fixed:
        raise ExportError(
            f"onnx: --context-length {positions}: {kind} rotary embeddings change beyond {fixed} tokens, and what lies "
            f"in the cache by then would not follow. Give {fixed} or less."
        )


def _fused(model: nn.Module) -> dict[str, dict[str, int]]:
    """Projections that the builder wants apart: queries, keys and values; gate and up."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        owner, _, last = name.rpartition(".")
        if last == "qkv_proj":
            attention: Any = model.get_submodule(owner)
            width = attention.head_dim
            heads, shared = attention.config.num_attention_heads, attention.config.num_key_value_heads
            rows = {"q_proj": heads * width, "k_proj": shared * width, "v_proj": shared * width}
        elif last == "gate_up_proj" and isinstance(module, nn.Linear):
            rows = dict.fromkeys(("gate_proj", "up_proj"), module.out_features // 2)
        else:
            continue
        found[name] = {f"{owner}.{part}": count for part, count in rows.items()}
    return found
