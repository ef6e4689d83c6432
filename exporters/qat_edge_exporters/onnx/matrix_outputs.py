"""Copy an ONNX folder with the inputs and outputs of every matrix as additional outputs of the graph."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import onnx

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import Exposed
from qat_edge_exporters.onnx import decoder_signature, graph_file, names
from qat_edge_exporters.onnx.half_steps import last_of_product


class MatrixValues(NamedTuple):
    """Names of the values that go into and come out of one matrix."""

    input: str
    outputs: list[str]


def expose(folder: Path, out: Path) -> Exposed:
    """Write a copy of the graph into the folder `out`, with symbolic links to the other files.

    Raises:
        ArtifactError: `folder` is not a readable ONNX folder.
    """
    graph = graph_file.load_graph(folder / names.MODEL_FILE)
    matrices: dict[str, MatrixValues] = {}
    nodes = {node.name: node for node in graph.graph.node}
    module_of = decoder_signature.module_of_node(graph)
    for node in graph.graph.node:
        module = module_of(node.name) if node.op_type in ("MatMulNBits", "MatMul") else None
        if module is not None:
            last = nodes.get(names.adapter_names(node.name).sum_node, last_of_product(node, nodes))
            matrices[module] = MatrixValues(node.input[0], [last.output[0]])

    # Layers share inputs, and an output may be exposed already: each name is added once, in order.
    existing = {output.name for output in graph.graph.output}
    wanted = dict.fromkeys(name for values in matrices.values() for name in (values.input, *values.outputs))
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in existing)

    (out / names.MODEL_FILE).write_bytes(graph.SerializeToString())
    for path in folder.iterdir():
        if path.name != names.MODEL_FILE:
            (out / path.name).symlink_to(path.resolve())
    return Exposed(_join_fused(graph, matrices))


def _join_fused(graph: onnx.ModelProto, matrices: dict[str, MatrixValues]) -> dict[str, tuple[str | None, list[str]]]:
    """Replace the parts of fused projections by the projection, according to the graph's metadata."""
    fused: dict[str, list[str]] = next(
        (
            readers.parse_json(entry.value, names.MODEL_FILE, ArtifactError)
            for entry in graph.metadata_props
            if entry.key == "fused"
        ),
        {},
    )
    is_part = {part for parts in fused.values() for part in parts}
    joined: dict[str, tuple[str | None, list[str]]] = {
        name: (values.input, values.outputs) for name, values in matrices.items() if name not in is_part
    }
    for name, parts in fused.items():
        joined[name] = (matrices[parts[0]].input, [matrices[part].outputs[0] for part in parts])
    return joined
