"""Read what the graph has to compute besides its matrices, from the model's configuration and its own code."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig

from qat_edge import remote_code
from qat_edge.errors import ExportError
from qat_edge.models.meta_model import model_without_weights
from qat_edge.quant.frozen import FrozenWeight
from qat_edge_exporters.artifact import Artifact, FloatConstant
from qat_edge_exporters.onnx import names, onnx_compat

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EMBEDDING_SCALE = f"{names.EMBEDDING}.scale"  # initializer with the factor of looked-up embeddings
ALL_LAYERS = ""  # layer type of the rotary embedding of models that have one for all layers


class RotaryTables(NamedTuple):
    """Cosines and sines of a rotary embedding, float32 (positions, rotated width / 2)."""

    cosines: NDArray[np.float32]
    sines: NDArray[np.float32]


@dataclass(frozen=True)
class Architecture:
    """Properties of one model that `repair` needs.

    Attributes:
        rotary: tables by layer type, under `ALL_LAYERS` if all layers share them.
        unrotated_layers: indices of layers whose queries and keys are not rotated.
        embedding_scale: factor by which looked-up embeddings are multiplied.
        fused: for each fused projection, the rows of its parts in order, by name of the part.
    """

    rotary: dict[str, RotaryTables]
    unrotated_layers: list[int]
    embedding_scale: float
    fused: dict[str, dict[str, int]]


def read_architecture(folder: Path, context_length: int) -> Architecture:
    """Read the architecture of the checkpoint in `folder`, with rotary tables for `context_length` positions.

    Raises:
        ExportError: its rotary embeddings change within the context.
    """
    with remote_code.refusals(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code.permitted())
    model = without_weights(config)
    if model is None:
        raise ExportError(f"onnx: transformers has no class for a model of type {config.model_type}.")

    rotates = getattr(config, "no_rope_layers", None) or []  # despite its name, 1 for a layer that rotates
    unrotated = [index for index, rotated in enumerate(rotates[: config.num_hidden_layers]) if not rotated]
    return Architecture(
        rotary=_rotary_tables(model, context_length),
        unrotated_layers=unrotated,
        embedding_scale=onnx_compat.embedding_scale(model),
        fused=fused_projections(model),
    )


def without_weights(config: PretrainedConfig) -> PreTrainedModel | None:
    """Build a model on the meta device; None where transformers cannot without the model's own code."""
    try:
        return model_without_weights(config)
    except (ValueError, KeyError):
        return None


def computed_constants(checkpoint: Path, artifact: Artifact) -> list[FloatConstant]:
    """Return the graph's constants that `repair` computes: rotary tables, and the factor of scaled embeddings."""
    architecture = read_architecture(checkpoint, int(artifact.metadata["context_length"]))
    constants = [FloatConstant(EMBEDDING_SCALE, np.array(architecture.embedding_scale, np.float32))]
    for name, table in names.ROTARY_TABLES.items():
        # The builder's own table stays where the model pairs neighbouring channels.
        if table.layer_type in architecture.rotary:
            tables = architecture.rotary[table.layer_type]
            constants.append(FloatConstant(name, tables.sines if table.is_sine else tables.cosines))
    return constants


def split_fused(weights: dict[str, FrozenWeight], fused: dict[str, dict[str, int]]) -> dict[str, FrozenWeight]:
    """Split fused projections by rows into their parts; every row keeps its codes and scales."""
    found: dict[str, FrozenWeight] = {}
    for name, weight in weights.items():
        start = 0
        for part, rows in fused.get(name, {name: weight.codes.shape[0]}).items():
            end = start + rows
            found[part] = replace(weight, codes=weight.codes[start:end], scales=weight.scales[start:end])
            start = end
    return found


def fused_metadata(fused: dict[str, dict[str, int]]) -> dict[str, str]:
    """Return the graph's metadata about fused projections, from which its reader joins them again."""
    return {"fused": json.dumps({name: list(parts) for name, parts in fused.items()})} if fused else {}


def _rotary_tables(model: nn.Module, positions: int) -> dict[str, RotaryTables]:
    """Compute the rotary tables by layer type with the model's own module."""
    module = onnx_compat.find_rotary_embedding(model)
    if module is None:
        return {}

    # Made again on the CPU: the buffers of a module on the meta device hold no values.
    rotary = type(module)(module.config)
    types = rotary.rope_type if isinstance(rotary.rope_type, dict) else {ALL_LAYERS: rotary.rope_type}
    for rope_type in types.values():
        _require_fixed_frequencies(module.config, rope_type, positions)

    # Under "default" the module does not update its frequencies by the length of the text.
    rotary.rope_type = "default" if ALL_LAYERS in types else dict.fromkeys(types, "default")
    ids = torch.arange(positions).unsqueeze(0)
    tables = {}
    for layer_type in types:
        selected: dict[str, Any] = {"layer_type": layer_type} if layer_type else {}
        cosines, sines = rotary(torch.zeros(1), ids, **selected)
        # `rotate_half` pairs channels of the two halves of a head, so both halves of a table are equal. If they are
        # not, the model pairs neighbours, and the builder's own table stays.
        first, second = cosines[0].chunk(2, dim=-1)
        if torch.equal(first, second):
            sine = sines[0].chunk(2, dim=-1)[0]
            tables[layer_type] = RotaryTables(first.contiguous().numpy(), sine.contiguous().numpy())
    return tables


def _require_fixed_frequencies(config: PretrainedConfig, rope_type: str, positions: int) -> None:
    """Reject frequencies that change with the length of the text, if the context is long enough for that.

    Raises:
        ExportError: keys in the cache would have been rotated by the earlier frequencies.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    fixed = parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    if ("dynamic" in rope_type or rope_type == "longrope") and positions > fixed:
        raise ExportError(
            f"onnx: --context-length {positions}: {rope_type} rotary embeddings change beyond {fixed} tokens, but keys "
            f"already in the cache would keep the earlier ones. Give {fixed} or less."
        )


def fused_projections(model: nn.Module) -> dict[str, dict[str, int]]:
    """Find projections that the builder expects separately: queries, keys and values; gate and up."""
    found: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        owner, _, last = name.rpartition(".")
        if last == "qkv_proj":
            attention: Any = model.get_submodule(owner)
            width = attention.head_dim
            heads, key_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
            rows = {"q_proj": heads * width, "k_proj": key_heads * width, "v_proj": key_heads * width}
        elif last == "gate_up_proj" and isinstance(module, nn.Linear):
            rows = dict.fromkeys(("gate_proj", "up_proj"), module.out_features // 2)
        else:
            continue
        found[name] = {f"{owner}.{part}": count for part, count in rows.items()}
    return found
