"""Read matrices of codes and scales from the nodes of an ONNX graph, without ONNX Runtime.

MatMulNBits B: uint8 (out, blocks, block * bits // 8), lowest bits first, code + 2^(bits-1). Where the graph adds half a
step (`half_steps`), the odd codes of `seq` levels are returned, under half the scale. GatherBlockQuantized has the same
codes without padding.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError
from qat_edge.manifest import MANIFEST
from qat_edge.models import tokenizer
from qat_edge.quant.codebook import FEWEST, SEQ, codebook_of
from qat_edge.quant.packing import unpack_int2, unpack_int4
from qat_edge_exporters.artifact import ArtifactWeight
from qat_edge_exporters.onnx import graph_file, names
from qat_edge_exporters.onnx.half_steps import has_half_step

BITS = (2, 4, 8)  # of codes
INT8_ACTIVATIONS, TOKENIZER_FILES = names.INT8_ACTIVATIONS, names.TOKENIZER_FILES
FLOAT_OPERATORS = ("MatMul", "Gemm", "Gather", "Transpose")  # that can read a matrix in float


class PartSize(NamedTuple):
    """The part of the artifact that an initializer belongs to, and its bytes."""

    name: str
    size_bytes: int


@dataclass
class FoundMatrices:
    """Everything that the nodes have shown so far.

    Attributes:
        weights: matrices by module name.
        faults: one sentence each.
        parts: part of each initializer, by its name.
    """

    weights: dict[str, ArtifactWeight] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    parts: dict[str, PartSize] = field(default_factory=dict)


class _NamedTensor(NamedTuple):
    """An initializer: its name and its values."""

    name: str
    values: NDArray[Any]


@dataclass(frozen=True)
class MatrixLocation:
    """Location of a quantized matrix in the graph.

    Attributes:
        module: module it belongs to.
        shape: (out, in), without padding.
        part: part of the artifact that its codes count in.
        codes_input: input of the node with the codes.
        scales_input: input of the node with the scales.
        first_optional_input: input of the node from which on only zero points, orders and biases follow.
    """

    module: str
    shape: tuple[int, int]
    part: str
    codes_input: int
    scales_input: int
    first_optional_input: int


@dataclass(frozen=True)
class OnnxGraph:
    """A graph with its initializers, and the producers of its values, by name."""

    path: Path
    model: onnx.ModelProto
    initializers: dict[str, onnx.TensorProto]
    producers: dict[str, onnx.NodeProto]

    @classmethod
    def load(cls, path: Path) -> OnnxGraph:
        model = graph_file.load_graph(path)
        return cls(
            path,
            model,
            {initializer.name: initializer for initializer in model.graph.initializer},
            {output: node for node in model.graph.node for output in node.output},
        )

    def constant(self, node: onnx.NodeProto, index: int) -> _NamedTensor:
        """Return a node's constant input, or the one behind a Reshape of it.

        Raises:
            ArtifactError: the input is not a stored tensor.
        """
        name = node.input[index] if index < len(node.input) else ""
        if name not in self.initializers and name in self.producers:
            producer = self.producers[name]
            name = producer.input[0] if producer.op_type == "Reshape" else name
        if name not in self.initializers:
            raise self.damaged(node, f"input {index} ('{name}') is not a stored tensor")
        return _NamedTensor(name, graph_file.tensor(self.initializers[name], self.path.parent))

    def damaged(self, node: onnx.NodeProto, problem: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: node '{node.name}': {problem}. {graph_file.AGAIN}")


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Unpack rows of codes: uint8 (out, in * bits // 8) to int8 (out, in)."""
    if bits == FEWEST:
        return unpack_int2(packed).view(np.int8) + np.int8(codebook_of(bits).low)
    return unpack_int4(packed) if bits == 4 else _unpack_int8(packed)


def _unpack_int8(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Convert unsigned codes, code + 128, to int8: flipping the sign bit of two's complement does that."""
    return (packed ^ 0x80).view(np.int8)


def read_linear(graph: OnnxGraph, node: onnx.NodeProto, module: str | None, part: str, found: FoundMatrices) -> None:
    """Check and record the matrix of a MatMulNBits node, as that of a module and in a part of the artifact."""
    if module is None or module in found.weights:
        found.faults.append(f"node '{node.name}' multiplies by the matrix of no layer, or of one that has a node.")
        return

    # Names of initializers say which layer's codes a node should read.
    stem, attributes = names.initializer_stem(node.name), integers(node)
    expected = (f"{stem}.qweight", f"{stem}.scales")
    if tuple(node.input[1:3]) != expected:
        found.faults.append(f"{module}: node '{node.name}' reads {list(node.input[1:3])} in place of {list(expected)}.")
    if attributes.get("accuracy_level") != INT8_ACTIVATIONS:
        found.faults.append(
            f"{module}: accuracy_level {attributes.get('accuracy_level')} leaves its input in float; it was trained "
            f"with an int8 input, which is level {INT8_ACTIVATIONS}."
        )

    shape = (attributes.get("N", 0), attributes.get("K", 0))
    _read_matrix(graph, node, MatrixLocation(module, shape, part, 1, 2, 3), found)
    if attributes.get("bits") == FEWEST and has_half_step(node, graph.producers):
        weight = found.weights[module]
        # (n + 1/2) s = (2 n + 1) s / 2, exactly.
        codes, scales = 2 * weight.codes + np.int8(1), weight.scales * np.float32(0.5)
        found.weights[module] = replace(weight, codes=codes, scales=scales, levels=SEQ)


def read_table(graph: OnnxGraph, node: onnx.NodeProto, module: str, width: int, found: FoundMatrices) -> None:
    """Check and record the table of a GatherBlockQuantized node, whose rows have `width` numbers."""
    axes = (integers(node).get("gather_axis", 0), integers(node).get("quantize_axis", 1))
    if axes != (0, 1):
        raise graph.damaged(node, f"gathers and quantizes along axes {axes}, not (0, 1)")
    rows = graph.constant(node, 2).values.shape[0]
    _read_matrix(graph, node, MatrixLocation(module, (rows, width), "embedding", 0, 2, 3), found)


def _read_matrix(graph: OnnxGraph, node: onnx.NodeProto, matrix: MatrixLocation, found: FoundMatrices) -> None:
    """Check the sizes of a matrix, unpack it and record it."""
    attributes = integers(node)
    bits, block = attributes.get("bits", 4), attributes.get("block_size", 0)
    codes, scales = graph.constant(node, matrix.codes_input), graph.constant(node, matrix.scales_input)
    rows, width = matrix.shape

    # The last block of a row may be padded in MatMulNBits, and is not in GatherBlockQuantized.
    blocks = -(-width // block) if block > 0 else 0
    sizes = (rows * blocks * block * bits // 8, rows * width * bits // 8)
    packed = codes.values
    if bits not in BITS or not blocks or packed.size not in sizes or packed.dtype != np.uint8:
        problem = f"{packed.dtype} {packed.shape} cannot hold {bits}-bit codes of a {matrix.shape} matrix"
        raise graph.damaged(node, problem)
    if scales.values.size != rows * blocks or scales.values.dtype != np.float32:
        problem = f"scales {scales.values.dtype} {scales.values.shape}, expected float32 {(rows, blocks)}"
        raise graph.damaged(node, problem)
    optional = list(node.input[matrix.first_optional_input :])
    if any(optional):
        found.faults.append(f"{matrix.module}: zero points, a group order or a bias ({optional}) were added.")

    unpacked = unpack(np.asarray(packed).reshape(rows, -1), bits)[:, :width]
    by_block = np.array(scales.values).reshape(rows, blocks)
    if bits == 8 and (by_block == by_block[:, :1]).all():  # per channel, repeated for every block
        by_block = by_block[:, :1].copy()
    found.weights[matrix.module] = ArtifactWeight(unpacked, by_block, bits, block)

    # The gather comes first in the graph, so a shared table counts as the embedding's.
    found.parts.setdefault(codes.name, PartSize(matrix.part, packed.nbytes))
    scales_part = "scales" if matrix.part == "linears" else matrix.part
    found.parts.setdefault(scales.name, PartSize(scales_part, scales.values.nbytes))


def record_float_matrix(
    graph: OnnxGraph, node: onnx.NodeProto, part: str, found: FoundMatrices, permitted: Collection[str] = ()
) -> None:
    """Record the size of a matrix in float as a fault: it would work, but it is not what was frozen.

    Args:
        graph: the graph.
        node: that may read such a matrix.
        part: of the artifact, which the matrix counts in.
        found: gets the size and the fault.
        permitted: names of matrices that have to be in float.
    """
    for name in node.input:
        if name in permitted or name not in graph.initializers or len(graph.initializers[name].dims) != 2:
            continue
        size_bytes = graph_file.tensor(graph.initializers[name], graph.path.parent).nbytes
        found.parts.setdefault(name, PartSize(part, size_bytes))
        found.faults.append(f"node '{node.name}' ({node.op_type}) reads '{name}', a matrix that is not quantized.")


def sizes(folder: Path, found: FoundMatrices) -> dict[str, int]:
    """Return bytes by part. "graph": nodes, norms, biases, rotary tables, padding and configuration.

    An adapter is the file of its own, where the folder has one.
    """
    sizes = dict.fromkeys(("linears", "scales", "embedding", "head", "graph", "tokenizer"), 0)
    for part in found.parts.values():
        name = "head" if part.name == names.HEAD else part.name
        sizes[name] = sizes.get(name, 0) + part.size_bytes
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST}
    if names.ADAPTER_FILE in files:
        sizes["adapter"] = files[names.ADAPTER_FILE]
    sizes["tokenizer"] = sum(size for name, size in files.items() if name in tokenizer.TOKENIZER_FILES)
    # Everything that belongs to no other part.
    sizes["graph"] = sum(files.values()) - sum(sizes.values())
    return sizes


def integers(node: onnx.NodeProto) -> dict[str, int]:
    """Return the integer attributes of a node."""
    return {attribute.name: attribute.i for attribute in node.attribute if attribute.type == onnx.AttributeProto.INT}
