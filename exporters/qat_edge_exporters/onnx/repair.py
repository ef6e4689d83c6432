"""What the builder leaves to be put right in its graph before it is the frozen function.

- A head that shares its table with the embedding has flat scales, and onnxruntime then refuses the model:
  GatherBlockQuantized wants them as (vocabulary, blocks).
- An embedding of its own would be a float table: it becomes GatherBlockQuantized over the frozen codes.
- A row whose width no block divides counts its padding in K.
- Adapters that are to stay beside their layers have no place yet.
- The rotary tables cover the longest context the model knows; what lies past the context length goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qat_edge.errors import ExportError
from qat_edge.quant.frozen import FrozenWeight
from qat_edge_exporters.checkpoint import Adapter
from qat_edge_exporters.onnx import names, storage
from qat_edge_exporters.onnx.adapters import add_adapters
from qat_edge_exporters.onnx.layout import block_scales, block_size, packed_codes

EMBEDDING_GATHER = "/model/embed_tokens/Gather"


def repair(
    built: Path,
    out: Path,
    weights: Mapping[str, FrozenWeight],
    adapters: Mapping[str, Adapter],
    shared: bool,
    context_length: int,
) -> None:
    """Write the repaired graph and its data file of the builder's folder `built` into `out`.

    weights: none for a float model. shared: the embedding reads the head's table, or is float as the builder left it.

    Raises:
        ExportError: the builder left a frozen matrix out, or stored it otherwise than asked.
    """
    model = storage.load_graph(built / names.MODEL_FILE)
    _check_matrices(model, weights)
    tensors = _shaped_scales(model, built) | _shorter_rotary_tables(model, built, context_length)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            width = weights[_module(node)].codes.shape[1]
            next(a for a in node.attribute if a.name == "K").i = width
    if not shared:
        tensors |= _quantized_embedding(model, weights[names.EMBEDDING])
    tensors |= add_adapters(model, adapters)
    storage.save(model, tensors, built, out)


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
            shaped[scales.name] = storage.tensor(scales, built).reshape(tuple(codes.dims)[:2])
    return shaped


def _shorter_rotary_tables(model: onnx.ModelProto, built: Path, context_length: int) -> dict[str, NDArray[Any]]:
    return {
        i.name: storage.tensor(i, built)[:context_length]
        for i in model.graph.initializer
        if i.name in names.ROTARY_TABLES and i.dims[0] > context_length
    }


def _quantized_embedding(model: onnx.ModelProto, table: FrozenWeight) -> dict[str, NDArray[Any]]:
    """Turn the float Gather into GatherBlockQuantized; a uint8 code stands for code - 128 there."""
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
        f"{stem}.qweight": np.ascontiguousarray(packed_codes(table)[:, :width].numpy()),
        f"{stem}.scales": block_scales(table).numpy(),
    }
