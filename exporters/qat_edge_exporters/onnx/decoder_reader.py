"""Read codes and scales back from the bytes of a traced decoder's ONNX folder, without ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from qat_edge.quant.rotated_norm import ROTATION
from qat_edge_exporters.artifact import Artifact, FloatConstant
from qat_edge_exporters.onnx import (
    adapter_check,
    decoder_check,
    encoder_reader,
    graph_file,
    names,
    onnx_matrices,
    onnx_reader,
    traced_names,
)
from qat_edge_exporters.onnx.onnx_matrices import FLOAT_OPERATORS, FoundMatrices, OnnxGraph
from qat_edge_exporters.onnx.traced_names import LINEAR, TABLE


def read(folder: Path) -> Artifact:
    """Read everything in the folder of a traced decoder.

    Raises:
        ArtifactError: a file is missing, truncated or garbled.
    """
    genai = onnx_reader.genai_config(folder / names.GENAI_CONFIG)
    graph = OnnxGraph.load(folder / names.MODEL_FILE)
    found = FoundMatrices()
    adapter_inputs = adapter_check.find_inputs(graph.model)
    adapter, adapter_faults = adapter_check.read_adapter(folder, adapter_inputs)
    head = decoder_check.head_of(graph.model, adapter_inputs)
    in_float = adapter_inputs.input_names | decoder_check.position_tables(graph.model)
    # The embedding first, which a shared table counts as.
    for node in sorted(graph.model.graph.node, key=lambda node: node.op_type != TABLE):
        if node.op_type == TABLE:
            encoder_reader.read_table(graph, node, found)
        elif node.op_type == LINEAR:
            module = traced_names.module_of_node(node.name)
            part = names.HEAD if head is not None and node.name == head.name else "linears"
            onnx_matrices.read_linear(graph, node, module, part, found)
        elif node.op_type in FLOAT_OPERATORS and not _reads_rotation(node):
            onnx_matrices.record_float_matrix(graph, node, "linears", found, in_float)

    found.faults += onnx_reader.config_faults(folder, graph, genai)
    found.faults += encoder_reader.index_faults(graph) + decoder_check.graph_faults(graph.model, adapter_inputs)
    found.faults += adapter_inputs.faults + adapter_faults
    return Artifact(
        weights=found.weights,
        metadata=onnx_reader.metadata(graph, genai),
        size_bytes=onnx_matrices.sizes(folder, found),
        faults=found.faults,
        floats=_float_constants(graph, found, adapter_inputs.input_names),
        adapter=adapter,
    )


def _reads_rotation(node: onnx.NodeProto) -> bool:
    return node.op_type == "MatMul" and any(name.endswith(f".{ROTATION}") for name in node.input)


def _float_constants(graph: OnnxGraph, found: FoundMatrices, adapter_inputs: set[str]) -> list[FloatConstant]:
    """Return every float32 initializer that is no scale of a matrix; the exporter names them as the checkpoint does.

    adapter_inputs: names of inputs for an adapter, whose defaults are empty.
    """
    constants = []
    for name, initializer in graph.initializers.items():
        if name in found.parts or name in adapter_inputs or initializer.data_type != onnx.TensorProto.FLOAT:
            continue
        values = np.asarray(graph_file.tensor(initializer, graph.path.parent))
        # The graph multiplies by the transposed rotation.
        stored = np.ascontiguousarray(values.T) if name.endswith(f".{ROTATION}") else values
        constants.append(FloatConstant(name, stored, name))
    return constants
