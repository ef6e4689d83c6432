"""Read an ONNX graph of any tool, without its tensors and without ONNX Runtime.

`graph_file` reads graphs of ours, whose tensors are in one data file; here they may be in any files of the folder. A
graph may have cycles, subgraphs and functions of its own, and names that are not UTF-8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters import file_diagnosis
from qat_edge_exporters.file_diagnosis import GraphValue, QuantizedMatrices

MOST_BYTES = 2**31 - 1  # of a protobuf message
STANDARD = "ai.onnx"  # the domain that graphs may also leave empty
MICROSOFT = "com.microsoft"
INT4_TYPES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
DAMAGED = "Copy or download the file again."


@dataclass(frozen=True)
class ForeignGraph:
    """A parsed graph.

    Attributes:
        path: of the file.
        model: its contents; tensors in other files are not loaded.
    """

    path: Path
    model: onnx.ModelProto

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        """Nodes of the graph, of graphs inside them and of functions."""
        found: list[onnx.NodeProto] = []
        for graph in self.graphs:
            found.extend(graph.node)
        for function in self.model.functions:
            found.extend(function.node)
        return found

    @cached_property
    def graphs(self) -> list[onnx.GraphProto]:
        """The graph and those inside its nodes and functions."""
        found = [self.model.graph, *_inner_graphs(node for f in self.model.functions for node in f.node)]
        for graph in found:  # grows while it is read; protobuf nests up to 100 levels
            found.extend(_inner_graphs(graph.node))
        return found

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Stored tensors of the outermost graph, by name."""
        return {text(tensor.name): tensor for tensor in self.model.graph.initializer}

    @cached_property
    def inputs(self) -> list[GraphValue]:
        """Inputs that a caller has to give: those with a stored value have a default."""
        return [_value(entry) for entry in self.model.graph.input if text(entry.name) not in self.initializers]

    @cached_property
    def outputs(self) -> list[GraphValue]:
        """Outputs of the graph."""
        return [_value(entry) for entry in self.model.graph.output]

    @property
    def opsets(self) -> dict[str, int]:
        """Versions of operators, by domain."""
        return {text(entry.domain) or STANDARD: entry.version for entry in self.model.opset_import}

    @property
    def operators(self) -> dict[str, int]:
        """Number of nodes by operator, those of other domains than ONNX's own with the domain in front."""
        counts = Counter(operator_name(text(node.domain), text(node.op_type)) for node in self.nodes)
        return dict(sorted(counts.items()))

    @property
    def functions(self) -> set[str]:
        """Operators that the file itself defines."""
        return {operator_name(text(function.domain), text(function.name)) for function in self.model.functions}

    @property
    def matrices(self) -> list[QuantizedMatrices]:
        """Quantized matrices of MatMulNBits nodes, by the way of multiplying."""
        counts: Counter[tuple[int, int, int, bool]] = Counter()
        for node in self.nodes:
            if node.op_type == "MatMulNBits":
                values = integers(node)
                zero_points = len(node.input) > 3 and bool(node.input[3])
                key = (values.get("bits", 4), values.get("block_size", 0), values.get("accuracy_level", 0), zero_points)
                counts[key] += 1
        return [QuantizedMatrices("MatMulNBits", *key, count) for key, count in sorted(counts.items())]


def load(path: Path) -> ForeignGraph:
    """Parse a graph.

    Raises:
        ArtifactError: the file cannot be read, or is no ONNX graph.
    """
    file_diagnosis.require_file(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ArtifactError(
            f"{path}: {size} bytes, and a graph of ONNX has {MOST_BYTES} at most. Save it with its tensors in a data "
            "file (external data)."
        )
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ArtifactError(
            f"{path}: no readable ONNX graph of {size} bytes ({file_diagnosis.one_line(error)}). {DAMAGED}"
        ) from error
    if not model.graph.node:
        raise ArtifactError(f"{path}: no ONNX graph: {size} bytes without a node. {DAMAGED}")
    return ForeignGraph(path, model)


def operator_name(domain: str, name: str) -> str:
    """Return the name of an operator with its domain, which ONNX's own ones do without."""
    return name if domain in ("", STANDARD) else f"{domain}::{name}"


def text(name: str | bytes) -> str:
    """Return a name as text of limited length; names that are not UTF-8 are read as bytes."""
    return readers.shorten(name if isinstance(name, str) else repr(name), 200)


def type_name(number: int) -> str:
    """Return ONNX's name of a type of tensors in lower case."""
    known = number in onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(number).lower() if known else f"type {number}"


def integers(node: onnx.NodeProto) -> dict[str, int]:
    """Return the integer attributes of a node."""
    return {text(entry.name): entry.i for entry in node.attribute if entry.type == onnx.AttributeProto.INT}


def _inner_graphs(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _value(entry: onnx.ValueInfoProto) -> GraphValue:
    tensor = entry.type.tensor_type
    sizes = (size.dim_value if size.HasField("dim_value") else text(size.dim_param) or "?" for size in tensor.shape.dim)
    return GraphValue(text(entry.name), type_name(tensor.elem_type), tuple(sizes))
