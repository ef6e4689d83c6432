"""Correct the builder's graph until it computes the frozen model.

The builder leaves these differences:

- A head that shares its table with the embedding has flat scales, and onnxruntime then rejects the model:
  GatherBlockQuantized needs them as (vocabulary, blocks).
- An embedding with its own table is stored in float; it becomes GatherBlockQuantized over the frozen codes.
- For a row whose width no block size divides, K includes the padding.
- A head whose input is rotated (`quant.rotated_norm`) is built without the rotation.
- Inputs for unmerged adapters are missing.
- Two bits have levels -2 -1 0 1 only (`half_steps`).
- Rotary tables are of the default type, for the longest context that the model supports. The model's own tables, up to
  the context length, replace them.
- Layers whose queries and keys are not rotated (SmolLM3) are built as if they were.
- The factor of scaled embeddings (Gemma) is rounded to two decimals.
- Fused projections are built separately; the graph's metadata records that for its reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qat_edge.errors import ExportError
from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.frozen_adapters import Adapter
from qat_edge_exporters.onnx import adapter_format, graph_file, names
from qat_edge_exporters.onnx.architecture import EMBEDDING_SCALE as SCALE_INITIALIZER
from qat_edge_exporters.onnx.architecture import Architecture, fused_metadata
from qat_edge_exporters.onnx.half_steps import add_half_steps
from qat_edge_exporters.onnx.olive_checkpoint import block_scales, block_size, packed_codes
from qat_edge_exporters.onnx.unmerged_adapters import add_adapter_inputs, split_fused_adapters

EMBEDDING_GATHER = "/model/embed_tokens/Gather"
EMBEDDING_SCALE = "/model/embed_tokens/Mul"
ROTARY_INPUTS = (7, 8)  # of GroupQueryAttention: cosines and sines

Tensors = dict[str, NDArray[Any]]  # new values of initializers, by name


@dataclass(frozen=True)
class FrozenModel:
    """Contents of the checkpoint that the graph has to compute.

    Attributes:
        weights: quantized matrices by module name; empty for a float model.
        adapters: unmerged adapters by module name.
        is_table_shared: the embedding reads the head's table, or is in float and stays as the builder made it.
        architecture: properties that the builder does not read, or reads wrongly.
        rotation: matrix (width, width) that the head's input is multiplied by; None for none.
    """

    weights: Mapping[str, FrozenWeight]
    adapters: Mapping[str, Adapter]
    is_table_shared: bool
    architecture: Architecture
    rotation: NDArray[np.float32] | None = None


def repair(built: Path, out: Path, frozen: FrozenModel) -> None:
    """Read the graph of the builder's folder `built`, and write the repaired graph and its data file into `out`.

    The matrices of an adapter become a file next to them.

    Raises:
        ExportError: the builder left a frozen matrix out, or stored it differently than requested; an adapter fits no
            layer.
    """
    model = graph_file.load_graph(built / names.MODEL_FILE)
    architecture = frozen.architecture
    _check_matrices(model, frozen.weights)

    # Each step changes the graph and returns the values of the initializers that it changed or added.
    tensors = _shaped_scales(model, built) | _rotary_tables(model, architecture)
    tensors |= _exact_embedding_scale(model, architecture.embedding_scale)
    _remove_rotation(model, architecture.unrotated_layers)
    helper.set_model_props(model, fused_metadata(architecture.fused))
    _set_widths(model, frozen.weights)
    if not frozen.is_table_shared:
        tensors |= _quantize_embedding(model, frozen.weights[names.EMBEDDING])
    if frozen.rotation is not None:
        tensors |= _rotate_head_input(model, frozen.rotation)
    add_half_steps(model, frozen.weights)
    parameters = add_adapter_inputs(model, split_fused_adapters(frozen.adapters, architecture.fused))

    graph_file.save(model, tensors, built, out, inline=parameters.keys())
    if parameters:
        adapter_format.write(out / names.ADAPTER_FILE, parameters)


def _check_matrices(model: onnx.ModelProto, weights: Mapping[str, FrozenWeight]) -> None:
    """Require a node for every matrix, with the bits and blocks that were requested."""
    nodes = {_module(node): node for node in model.graph.node if node.op_type == "MatMulNBits"}
    for name, weight in weights.items():
        if name == names.EMBEDDING:
            continue
        if name not in nodes:
            raise ExportError(
                f"onnx: the builder made no MatMulNBits node for {name}. The layer may be unknown to it: "
                "`pip show onnxruntime-genai` should say 0.18."
            )
        found = {attribute.name: attribute.i for attribute in nodes[name].attribute}
        requested = {"bits": weight.bits, "block_size": block_size(weight), "N": weight.codes.shape[0]}
        if requested.items() - found.items() or len(nodes[name].input) != 3:
            raise ExportError(
                f"onnx: the builder stored {name} as {found} with inputs {list(nodes[name].input)}; requested was "
                f"{requested}."
            )


def _module(node: onnx.NodeProto) -> str:
    module = names.module_of_node(node.name)
    if module is None:
        raise ExportError(f"onnx: the builder made a quantized node '{node.name}' that matches no frozen layer.")
    return module


def _shaped_scales(model: onnx.ModelProto, built: Path) -> Tensors:
    """Reshape every MatMulNBits node's scales to (out, blocks); the flat form is deprecated by the operator."""
    initializers = {initializer.name: initializer for initializer in model.graph.initializer}
    shaped: Tensors = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            codes, scales = (initializers[name] for name in node.input[1:3])
            shaped[scales.name] = graph_file.tensor(scales, built).reshape(tuple(codes.dims)[:2])
    return shaped


def _set_widths(model: onnx.ModelProto, weights: Mapping[str, FrozenWeight]) -> None:
    """Set K of every MatMulNBits node to the width of its matrix without padding."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            _attribute(node, "K").i = weights[_module(node)].codes.shape[1]


def _rotary_tables(model: onnx.ModelProto, architecture: Architecture) -> Tensors:
    """Return the model's own rotary tables for the initializers that hold such tables."""
    found: Tensors = {}
    for initializer in model.graph.initializer:
        table_name = names.ROTARY_TABLES.get(initializer.name)
        if table_name is None or table_name.layer_type not in architecture.rotary:
            continue
        tables = architecture.rotary[table_name.layer_type]
        table = tables.sines if table_name.is_sine else tables.cosines
        if table.shape[1] != initializer.dims[1]:
            built_width, width = 2 * initializer.dims[1], 2 * table.shape[1]
            raise ExportError(f"onnx: the builder rotates {built_width} channels of a head, the model {width}.")
        found[initializer.name] = table
    return found


def _remove_rotation(model: onnx.ModelProto, layers: Sequence[int]) -> None:
    """Remove the rotary embedding from the attention of `layers`."""
    attention = {f"/model/layers.{i}/attn/GroupQueryAttention" for i in layers}
    for node in model.graph.node:
        if node.name in attention:
            _attribute(node, "do_rotary").i = 0
            for index in ROTARY_INPUTS:
                node.input[index] = ""


def _exact_embedding_scale(model: onnx.ModelProto, scale: float) -> Tensors:
    """Give the embedding's factor a constant of its own with the exact value: the builder's may serve other nodes."""
    node = next((node for node in model.graph.node if node.name == EMBEDDING_SCALE), None)
    if (scale != 1) != (node is not None):
        raise ExportError(f"onnx: the model scales its embeddings by {scale:g}, but the builder's graph does not.")
    if node is None:
        return {}
    node.input[1] = SCALE_INITIALIZER
    model.graph.initializer.add(name=SCALE_INITIALIZER)
    return {SCALE_INITIALIZER: np.array(scale, np.float32)}


def _rotate_head_input(model: onnx.ModelProto, rotation: NDArray[np.float32]) -> Tensors:
    """Insert a product with `rotation` before the head."""
    # Directly before the head, because nodes must be in the order of computation.
    index, head = next(
        (index, node) for index, node in enumerate(model.graph.node) if names.module_of_node(node.name) == names.HEAD
    )
    weight = f"{names.initializer_stem(names.ROTATION_NODE)}.weight"
    output = f"{names.ROTATION_NODE}/output_0"
    product = helper.make_node("MatMul", [head.input[0], weight], [output], name=names.ROTATION_NODE)
    model.graph.node.insert(index, product)
    head.input[0] = output
    model.graph.initializer.add(name=weight)
    return {weight: np.ascontiguousarray(rotation.T)}  # (in, out)


def _quantize_embedding(model: onnx.ModelProto, table: FrozenWeight) -> Tensors:
    """Replace the float Gather by GatherBlockQuantized; an unsigned code stands for code - 2^(bits - 1)."""
    gather = next((node for node in model.graph.node if node.name == EMBEDDING_GATHER), None)
    if gather is None:
        raise ExportError(f"onnx: the builder made no node '{EMBEDDING_GATHER}' for an embedding with its own table.")
    float_table, ids = gather.input
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
    # The float table's initializer is reused for the codes.
    next(i for i in model.graph.initializer if i.name == float_table).name = f"{stem}.qweight"
    model.graph.initializer.add(name=f"{stem}.scales")

    # GatherBlockQuantized has no padding, unlike MatMulNBits.
    row_bytes = table.codes.shape[1] * table.bits // 8
    return {
        f"{stem}.qweight": np.ascontiguousarray(packed_codes(table)[:, :row_bytes].numpy()),
        f"{stem}.scales": block_scales(table).numpy(),
    }


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)
