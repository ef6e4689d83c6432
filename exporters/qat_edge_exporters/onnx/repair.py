"""What the builder leaves to be put right in its graph before it is the frozen function.

- A head that shares its table with the embedding has flat scales, and onnxruntime then refuses the model:
  GatherBlockQuantized wants them as (vocabulary, blocks).
- An embedding of its own would be a float table: it becomes GatherBlockQuantized over the frozen codes.
- A row whose width no block divides counts its padding in K.
- A head whose input is turned (`quant.turned`) is built as if it were not.
- Adapters that are to stay beside their layers have no place yet.
- The rotary tables are plain ones for the longest context the model knows: the model's own, up to the context length,
  take their place.
- A layer whose queries and keys are not rotated (SmolLM3) is built as if they were.
- The factor of scaled embeddings (Gemma) is rounded to two decimals.
- Projections that the model has in one are built apart: the graph's metadata says so, for its reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qat_edge.errors import ExportError
from qat_edge.quant.frozen import FrozenWeight
from qat_edge_exporters.checkpoint import Adapter
from qat_edge_exporters.onnx import graph_file, names
from qat_edge_exporters.onnx.architecture import Architecture, metadata
from qat_edge_exporters.onnx.layout import block_scales, block_size, packed_codes
from qat_edge_exporters.onnx.unmerged_adapters import add_adapters

EMBEDDING_GATHER = "/model/embed_tokens/Gather"
EMBEDDING_SCALE = "/model/embed_tokens/Mul"
TABLE_INPUTS = (7, 8)  # of GroupQueryAttention: cosines and sines


def repair(
    built: Path,
    out: Path,
    weights: Mapping[str, FrozenWeight],
    adapters: Mapping[str, Adapter],
    shared: bool,
    architecture: Architecture,
    turn: NDArray[np.float32] | None = None,
) -> None:
    """Write the repaired graph and its data file of the builder's folder `built` into `out`.

    weights: none for a float model. shared: the embedding reads the head's table, or is float as the builder left it.
    turn: (width, width), what the head's input is multiplied by; None for nothing.

    Raises:
        ExportError: the builder left a frozen matrix out, or stored it otherwise than asked.
    """
    model = graph_file.load_graph(built / names.MODEL_FILE)
    _check_matrices(model, weights)
    tensors = _shaped_scales(model, built) | _rotary_tables(model, architecture)
    tensors |= _embedding_scale(model, architecture.embedding_scale)
    _leave_unrotated(model, architecture.plain_layers)
    helper.set_model_props(model, metadata(architecture.fused))
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            width = weights[_module(node)].codes.shape[1]
            next(a for a in node.attribute if a.name == "K").i = width
    if not shared:
        tensors |= _quantized_embedding(model, weights[names.EMBEDDING])
    if turn is not None:
        tensors |= _turned_input(model, turn)
    tensors |= add_adapters(model, adapters)
    graph_file.save(model, tensors, built, out)


def _check_matrices(model: onnx.ModelProto, weights: Mapping[str, FrozenWeight]) -> None:
    nodes = {_module(node): node for node in model.graph.node if node.op_type == "MatMulNBits"}
    for name, weight in weights.items():
        if name == names.EMBEDDING:
            continue
        if name not in nodes:
            raise ExportError(
                f"onnx: the builder made no MatMulNBits node for {name}. The layer may be unknown to it: "
                "`pip show onnxruntime-genai` should say 0.18."
            )
        found = {a.name: a.i for a in nodes[name].attribute}
        asked = {"bits": weight.bits, "block_size": block_size(weight), "N": weight.codes.shape[0]}
        if asked.items() - found.items() or len(nodes[name].input) != 3:
            raise ExportError(
                f"onnx: the builder stored {name} as {found} with inputs {list(nodes[name].input)}; asked for {asked}."
            )


def _module(node: onnx.NodeProto) -> str:
    module = names.module_of_node(node.name)
    if module is None:
        raise ExportError(f"onnx: the builder made a quantized node '{node.name}' that no frozen layer answers to.")
    return module


def _shaped_scales(model: onnx.ModelProto, built: Path) -> dict[str, NDArray[Any]]:
    """Every MatMulNBits node's scales as (out, blocks); the flat form is one that the operator has deprecated."""
    initializers = {i.name: i for i in model.graph.initializer}
    shaped: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            codes, scales = (initializers[name] for name in node.input[1:3])
            shaped[scales.name] = graph_file.tensor(scales, built).reshape(tuple(codes.dims)[:2])
    return shaped


def _rotary_tables(model: onnx.ModelProto, architecture: Architecture) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for initializer in model.graph.initializer:
        kind, place = names.ROTARY_TABLES.get(initializer.name, (None, 0))
        if kind not in architecture.rotary:
            continue
        table = architecture.rotary[kind][place]
        if table.shape[1] != initializer.dims[1]:
            found_width, width = 2 * initializer.dims[1], 2 * table.shape[1]
            raise ExportError(f"onnx: the builder rotates {found_width} channels of a head, the model {width}.")
        found[initializer.name] = table
    return found


def _leave_unrotated(model: onnx.ModelProto, layers: Sequence[int]) -> None:
    attention = {f"/model/layers.{i}/attn/GroupQueryAttention" for i in layers}
    for node in model.graph.node:
        if node.name in attention:
            next(a for a in node.attribute if a.name == "do_rotary").i = 0
            for place in TABLE_INPUTS:
                node.input[place] = ""


def _embedding_scale(model: onnx.ModelProto, scale: float) -> dict[str, NDArray[Any]]:
    """The exact factor in a constant of its own: the builder's may serve other nodes too."""
    node = next((n for n in model.graph.node if n.name == EMBEDDING_SCALE), None)
    if (scale != 1) != (node is not None):
        raise ExportError(f"onnx: the model scales its embeddings by {scale:g}, the builder's graph otherwise.")
    if node is None:
        return {}
    name = f"{names.EMBEDDING}.scale"
    node.input[1] = name
    model.graph.initializer.add(name=name)
    return {name: np.array(scale, np.float32)}


def _turned_input(model: onnx.ModelProto, turn: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """One more product before the head's; nodes lie in the order of computation."""
    place, head = next((i, n) for i, n in enumerate(model.graph.node) if names.module_of_node(n.name) == names.HEAD)
    weight = f"{names.initializer_stem(names.TURN_NODE)}.weight"
    output = f"{names.TURN_NODE}/output_0"
    model.graph.node.insert(place, helper.make_node("MatMul", [head.input[0], weight], [output], name=names.TURN_NODE))
    head.input[0] = output
    model.graph.initializer.add(name=weight)
    return {weight: np.ascontiguousarray(turn.T)}  # (in, out)


def _quantized_embedding(model: onnx.ModelProto, table: FrozenWeight) -> dict[str, NDArray[Any]]:
    """Turn the float Gather into GatherBlockQuantized; an unsigned code stands for code - 2^(bits - 1)."""
    gather = next((n for n in model.graph.node if n.name == EMBEDDING_GATHER), None)
    if gather is None:
        raise ExportError(f"onnx: the builder made no node '{EMBEDDING_GATHER}' for an embedding of its own.")
    codes, ids = gather.input
    stem = f"{names.EMBEDDING}.GatherBlockQuantized"
    gather.CopyFrom(
        helper.make_node(
            "GatherBlockQuantized",
            [f"{stem}.qweight", ids, f"{stem}.scales"],
            list(gather.output),
            name=f"{EMBEDDING_GATHER}BlockQuantized",
            domain="com.microsoft",
            bits=table.bits,
            block_size=block_size(table),
            gather_axis=0,
            quantize_axis=1,
        )
    )
    next(i for i in model.graph.initializer if i.name == codes).name = f"{stem}.qweight"
    model.graph.initializer.add(name=f"{stem}.scales")
    width = table.codes.shape[1]
    return {
        f"{stem}.qweight": np.ascontiguousarray(packed_codes(table)[:, : width * table.bits // 8].numpy()),
        f"{stem}.scales": block_scales(table).numpy(),
    }
