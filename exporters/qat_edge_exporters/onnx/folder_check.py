"""Check an ONNX folder before a runtime loads it, on this machine or on a device: it may come from anyone.

ONNX Runtime reads what the graph and genai_config.json name: operators of other libraries, compiled graphs, data files.
An export of ours needs the operators built into ONNX Runtime and one data file next to the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.onnx import adapter_check, genai_config, graph_file, names

DOMAINS = ("", "ai.onnx", "com.microsoft")  # of the operators in an export; both are built into ONNX Runtime
# Operators of these domains that run a compiled graph from a file, or Python code.
OTHER_CODE = ("EPContext", "PythonOp", "PythonOpGrad")


def check_folder(folder: Path) -> None:
    """Check genai_config.json, the graph's operators and the adapter; `load_graph` refuses tensors in other files.

    Raises:
        ArtifactError: The folder asks a runtime to load something that is not part of an export, or its adapter does
            not fit its graph.
    """
    genai_config.check_config(folder)
    model = _check_graph(folder / names.MODEL_FILE)
    adapter_check.check_adapter(folder, model)


def check_encoder_folder(folder: Path) -> None:
    """Check the graph of an encoder, which no configuration of a runtime goes with.

    Raises:
        ArtifactError: The folder asks a runtime to load something that is not part of an export.
    """
    _check_graph(folder / names.MODEL_FILE)


def _check_graph(path: Path) -> onnx.ModelProto:
    model = graph_file.load_graph(path)

    found = {opset.domain for opset in model.opset_import} | {function.domain for function in model.functions}
    for node in _nodes(model.graph):
        found.add(node.domain)
        if node.op_type in OTHER_CODE:
            raise ArtifactError(f"{path}: the operator {node.op_type} runs other code. Export again.")
    other = sorted(found - set(DOMAINS))
    if other:
        raise ArtifactError(
            f"{path}: operators of '{readers.shorten(other[0])}' need a native library that an export does not have. "
            f"Export again; the domains of an export are {' and '.join(filter(None, DOMAINS))}."
        )
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those inside its nodes, without recursion: protobuf nests up to 100 levels."""
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        for node in current.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for each in _graphs(graph):
        yield from each.node
