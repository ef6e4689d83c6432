"""Read codes, scales and options back from the bytes of an encoder's ONNX folder, without ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import Artifact, FloatConstant, HeldOption
from qat_edge_exporters.onnx import encoder_check, graph_file, names, onnx_matrices, traced_names
from qat_edge_exporters.onnx.encoder_names import MAX_LENGTH, OUTPUT_WIDTH
from qat_edge_exporters.onnx.onnx_matrices import FLOAT_OPERATORS, TOKENIZER_FILES, FoundMatrices, OnnxGraph
from qat_edge_exporters.onnx.traced_names import LINEAR, TABLE
from qat_edge_exporters.targets import KV_CACHE_FLOAT

FEW = 8  # elements of integer constants that are shapes or axes; longer ones are indices
BITS_OF_A_BYTE = 8


def read(folder: Path) -> Artifact:
    """Read everything in an encoder's folder.

    Raises:
        ArtifactError: a file is missing, truncated or garbled.
    """
    graph = OnnxGraph.load(folder / names.MODEL_FILE)
    found = FoundMatrices()
    for node in graph.model.graph.node:
        if node.op_type == LINEAR:
            module = traced_names.module_of_node(node.name)
            onnx_matrices.read_linear(graph, node, module, "linears", found)
        elif node.op_type == TABLE:
            read_table(graph, node, found)
        elif node.op_type in FLOAT_OPERATORS:
            onnx_matrices.record_float_matrix(graph, node, "linears", found)

    found.faults += [f"{name}: missing." for name in TOKENIZER_FILES if not (folder / name).is_file()]
    found.faults += index_faults(graph)
    found.faults += encoder_check.graph_faults(graph.model)
    return Artifact(
        weights=found.weights,
        metadata=_metadata(graph),
        size_bytes=onnx_matrices.sizes(folder, found),
        faults=found.faults,
        floats=_float_constants(graph, found),
    )


def held_options(folder: Path) -> list[HeldOption]:
    """Return the options of an export folder.

    Raises:
        ArtifactError: the graph is missing or cannot be read, or does not say how long a text may be.
    """
    graph = OnnxGraph.load(folder / names.MODEL_FILE)
    longest = _setting(graph, MAX_LENGTH)
    file = names.MODEL_FILE
    return [
        # A text is no longer than the positions of an encoder.
        HeldOption("context_length", f"{MAX_LENGTH} in the metadata of {file}", longest, is_least=True),
        HeldOption("kv_cache", f"the type without a cache in {file}", KV_CACHE_FLOAT),
    ]


def read_table(graph: OnnxGraph, node: onnx.NodeProto, found: FoundMatrices) -> None:
    """Check and record the table of a traced graph's GatherBlockQuantized node."""
    module = traced_names.module_of_node(node.name)
    if module is None or module in found.weights:
        found.faults.append(
            f"node '{readers.shorten(node.name)}' reads the table of no layer, or of one that has a node."
        )
        return
    codes = graph.constant(node, 0).values
    if codes.ndim not in (2, 3):  # three are those of a head whose table it shares: (rows, blocks, bytes)
        raise graph.damaged(node, f"a table of {codes.ndim} dimensions")
    bits, row_bytes = onnx_matrices.integers(node).get("bits", 0), math.prod(codes.shape[1:])
    width = row_bytes * BITS_OF_A_BYTE // bits if bits in onnx_matrices.BITS else row_bytes
    onnx_matrices.read_table(graph, node, module, width, found)


def _metadata(graph: OnnxGraph) -> dict[str, Any]:
    """Return what a runtime or an app reads besides tensors."""
    model = graph.model
    return {
        **{name: _setting(graph, name) for name in (MAX_LENGTH, OUTPUT_WIDTH)},
        "ir_version": model.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "producer": model.producer_name,
    }


def _setting(graph: OnnxGraph, name: str) -> int:
    """Return a number of the graph's metadata.

    Raises:
        ArtifactError: it is missing or no number.
    """
    value = next((entry.value for entry in graph.model.metadata_props if entry.key == name), "")
    if not (value.isascii() and value.isdecimal() and 0 < len(value) < 10):
        raise ArtifactError(
            f"{graph.path}: its metadata has {name} {readers.show(value)}, expected a number. {graph_file.AGAIN}"
        )
    return int(value)


def index_faults(graph: OnnxGraph) -> list[str]:
    """Return a fault for each list of indices other than zeros, or 0, 1, 2, ...: positions, and types of tokens."""
    faults = []
    for name, initializer in graph.initializers.items():
        is_integer = initializer.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        if not is_integer or graph_file.size(initializer) <= FEW:
            continue
        values = graph_file.tensor(initializer, graph.path.parent).ravel()
        if values.any() and not (values == np.arange(len(values))).all():
            faults.append(
                f"{names.MODEL_FILE}: '{readers.shorten(name)}' has indices that the exporter does not write."
            )
    return faults


def _float_constants(graph: OnnxGraph, found: FoundMatrices) -> list[FloatConstant]:
    """Return every float32 initializer that is no scale of a matrix; the exporter names them as the checkpoint does."""
    return [
        FloatConstant(name, np.asarray(graph_file.tensor(initializer, graph.path.parent)), name)
        for name, initializer in graph.initializers.items()
        if name not in found.parts and initializer.data_type == onnx.TensorProto.FLOAT
    ]
