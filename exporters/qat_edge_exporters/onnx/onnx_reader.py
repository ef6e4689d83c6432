"""Read codes and scales back from the bytes of an ONNX folder, without ONNX Runtime.

MatMulNBits B: uint8 (out, blocks, block * bits // 8), lowest bits first, code + 2^(bits-1). Where the graph adds half a
step (`half_steps`), the odd codes of `seq` levels are returned, under half the scale. A table that embedding and head
share is returned under both names; its bytes count once, as the embedding's, as in a Hugging Face or GGUF file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.manifest import MANIFEST
from qat_edge.models import tokenizer
from qat_edge.quant.codebook import FEWEST, SEQ, codebook_of
from qat_edge.quant.packing import unpack_int2, unpack_int4
from qat_edge_exporters.artifact import Artifact, ArtifactWeight, FloatConstant
from qat_edge_exporters.onnx import graph_check, graph_file, names, onnx_options
from qat_edge_exporters.onnx.half_steps import has_half_step

BITS = (2, 4, 8)  # of codes
INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # without which text cannot be tokenized
_FINAL_NORM = re.compile(r"model\.layers\.\d+\.final_norm_layernorm\.weight")
_FLOAT_TENSOR = re.compile(r"(model\.layers\.\d+\.\w+(\.\w+)?|lm_head)\.(weight|bias)")
FLOAT_OPERATORS = ("MatMul", "Gemm", "Gather", "Transpose")  # that can read a matrix in float


class PartSize(NamedTuple):
    """The part of the artifact that an initializer belongs to, and its bytes."""

    name: str
    size_bytes: int


@dataclass
class _Found:
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
class _MatrixLocation:
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
class _Graph:
    """A graph with its initializers, and the producers of its values, by name."""

    path: Path
    model: onnx.ModelProto
    initializers: dict[str, onnx.TensorProto]
    producers: dict[str, onnx.NodeProto]

    @classmethod
    def load(cls, path: Path) -> _Graph:
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


def read(folder: Path) -> Artifact:
    """Read everything in an ONNX folder.

    Raises:
        ArtifactError: a file is missing, truncated or garbled.
    """
    genai = _genai_config(folder / names.GENAI_CONFIG)
    graph = _Graph.load(folder / names.MODEL_FILE)
    found = _Found()
    for node in graph.model.graph.node:
        if node.op_type == "MatMulNBits":
            _read_linear(graph, node, found)
        elif node.op_type == "GatherBlockQuantized":
            _read_embedding(graph, node, genai["model"]["decoder"]["hidden_size"], found)
        elif node.op_type in FLOAT_OPERATORS and node.name != names.ROTATION_NODE:
            _record_float_matrix(graph, node, found)

    # Before fused projections are joined: the configuration of the graph counts them separately.
    found.faults += _missing_matrices(found.weights, genai) + _config_faults(folder, graph, genai)
    found.faults += graph_check.graph_faults(graph.model)
    _join_fused(graph.model, found)
    return Artifact(
        weights=found.weights,
        metadata=_metadata(graph, genai),
        size_bytes=_sizes(folder, found),
        faults=found.faults,
        floats=_float_constants(graph, found),
    )


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Unpack rows of codes: uint8 (out, in * bits // 8) to int8 (out, in)."""
    if bits == FEWEST:
        return unpack_int2(packed).view(np.int8) + np.int8(codebook_of(bits).low)
    return unpack_int4(packed) if bits == 4 else _unpack_int8(packed)


def _unpack_int8(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Convert unsigned codes, code + 128, to int8: flipping the sign bit of two's complement does that."""
    return (packed ^ 0x80).view(np.int8)


def _read_linear(graph: _Graph, node: onnx.NodeProto, found: _Found) -> None:
    module = names.module_of_node(node.name)
    if module is None or module in found.weights:
        found.faults.append(f"node '{node.name}' multiplies by the matrix of no layer, or of one that has a node.")
        return

    # Names of initializers say which layer's codes a node should read.
    stem, attributes = names.initializer_stem(node.name), _integers(node)
    expected = (f"{stem}.qweight", f"{stem}.scales")
    if tuple(node.input[1:3]) != expected:
        found.faults.append(f"{module}: node '{node.name}' reads {list(node.input[1:3])} in place of {list(expected)}.")
    if attributes.get("accuracy_level") != INT8_ACTIVATIONS:
        found.faults.append(
            f"{module}: accuracy_level {attributes.get('accuracy_level')} leaves its input in float; it was trained "
            f"with an int8 input, which is level {INT8_ACTIVATIONS}."
        )

    shape = (attributes.get("N", 0), attributes.get("K", 0))
    part = names.HEAD if module == names.HEAD else "linears"
    _read_matrix(graph, node, _MatrixLocation(module, shape, part, 1, 2, 3), found)
    if attributes.get("bits") == FEWEST and has_half_step(node, graph.producers):
        weight = found.weights[module]
        # (n + 1/2) s = (2 n + 1) s / 2, exactly.
        codes, scales = 2 * weight.codes + np.int8(1), weight.scales * np.float32(0.5)
        found.weights[module] = replace(weight, codes=codes, scales=scales, levels=SEQ)


def _read_embedding(graph: _Graph, node: onnx.NodeProto, width: int, found: _Found) -> None:
    axes = (_integers(node).get("gather_axis", 0), _integers(node).get("quantize_axis", 1))
    if axes != (0, 1):
        raise graph.damaged(node, f"gathers and quantizes along axes {axes}, not (0, 1)")
    rows = graph.constant(node, 2).values.shape[0]
    _read_matrix(graph, node, _MatrixLocation(names.EMBEDDING, (rows, width), "embedding", 0, 2, 3), found)


def _read_matrix(graph: _Graph, node: onnx.NodeProto, matrix: _MatrixLocation, found: _Found) -> None:
    """Check the sizes of a matrix, unpack it and record it."""
    attributes = _integers(node)
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


def _record_float_matrix(graph: _Graph, node: onnx.NodeProto, found: _Found) -> None:
    """Record the size of a matrix in float as a fault: it would work, but it is not what was frozen."""
    for name in node.input:
        if name not in graph.initializers or len(graph.initializers[name].dims) != 2:
            continue
        size_bytes = graph_file.tensor(graph.initializers[name], graph.path.parent).nbytes
        found.parts.setdefault(name, PartSize(_part_of_float_matrix(node), size_bytes))
        found.faults.append(f"node '{node.name}' ({node.op_type}) reads '{name}', a matrix that is not quantized.")


def _part_of_float_matrix(node: onnx.NodeProto) -> str:
    if "/lora_" in node.name:
        return "adapters"
    if node.op_type in ("Gather", "Transpose"):  # a head that shares the embedding's table reads it transposed
        return "embedding"
    return names.HEAD if names.module_of_node(node.name) == names.HEAD else "linears"


def _float_constants(graph: _Graph, found: _Found) -> list[FloatConstant]:
    """Return every float32 initializer that is no scale of a matrix, under the checkpoint's name where it has one."""
    rotations = {node.input[1] for node in graph.model.graph.node if node.name == names.ROTATION_NODE}
    constants = []
    for name, initializer in graph.initializers.items():
        if name in found.parts or initializer.data_type != onnx.TensorProto.FLOAT:
            continue
        values = graph_file.tensor(initializer, graph.path.parent)
        # The graph multiplies by the transposed rotation.
        stored = np.ascontiguousarray(values.T) if name in rotations else np.asarray(values)
        constants.append(FloatConstant(name, stored, "" if name in rotations else _checkpoint_name(name)))
    return _join_fused_biases(graph.model, constants)


def _checkpoint_name(initializer: str) -> str:
    """Return the checkpoint's name of a norm or bias; empty for other initializers."""
    if _FINAL_NORM.fullmatch(initializer):
        return "model.norm.weight"
    name = initializer.replace(".attn.", ".self_attn.").replace(".layernorm.", ".").replace(".Add.bias", ".bias")
    return name if _FLOAT_TENSOR.fullmatch(name) else ""


def _join_fused_biases(model: onnx.ModelProto, constants: list[FloatConstant]) -> list[FloatConstant]:
    """Join the biases of the parts of fused projections, as the checkpoint stores them."""
    by_name = {constant.tensor: constant for constant in constants if constant.tensor}
    for name, part_names in _fused_parts(model).items():
        parts = [by_name.get(f"{part}.bias") for part in part_names]
        present = [part for part in parts if part is not None]
        if len(present) == len(part_names):
            joined = np.concatenate([part.values for part in present])
            constants = [each for each in constants if each not in present]
            constants.append(FloatConstant(f"{name}.bias", joined, f"{name}.bias"))
    return constants


def _fused_parts(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Return the parts of each fused projection, from the graph's metadata.

    Raises:
        ArtifactError: the metadata is garbled.
    """
    fused: dict[str, list[str]] = {}
    for entry in model.metadata_props:
        if entry.key != "fused":
            continue
        found = readers.parse_json(entry.value, f"{names.MODEL_FILE}, metadata 'fused'", ArtifactError)
        if not isinstance(found, dict) or not all(isinstance(p, list) and p for p in found.values()):
            raise ArtifactError(f"{names.MODEL_FILE}: its metadata 'fused' is garbled. {graph_file.AGAIN}")
        fused |= {name: [str(part) for part in parts] for name, parts in found.items()}
    return fused


def _join_fused(model: onnx.ModelProto, found: _Found) -> None:
    """Join the parts of fused projections by rows, according to the graph's metadata."""
    for name, part_names in _fused_parts(model).items():
        parts = [found.weights.pop(part) for part in part_names if part in found.weights]
        alike = {(part.bits, part.levels, part.codes.shape[1], part.scales.shape[1]) for part in parts}
        if len(alike) > 1:
            raise ArtifactError(
                f"{names.MODEL_FILE}: its metadata 'fused' joins unlike matrices into {readers.shorten(name)}. "
                f"{graph_file.AGAIN}"
            )
        if len(parts) == len(part_names):  # a missing part has been recorded as a fault
            codes = np.concatenate([part.codes for part in parts])
            scales = np.concatenate([part.scales for part in parts])
            found.weights[name] = replace(parts[0], codes=codes, scales=scales)


def _missing_matrices(weights: dict[str, ArtifactWeight], genai: dict[str, Any]) -> list[str]:
    """Return a fault for each matrix that other layers have and one lacks, and for a missing embedding or head."""
    layers = range(genai["model"]["decoder"]["num_hidden_layers"])
    linears = [name for name in weights if name not in (names.EMBEDDING, names.HEAD)]
    in_layer = sorted({name.split(".", 3)[3] for name in linears})  # "self_attn.q_proj" of "model.layers.0...."
    expected = [f"model.layers.{layer}.{name}" for layer in layers for name in in_layer]
    expected += [names.EMBEDDING, names.HEAD]
    absent = [f"{name}: no quantized matrix of that name." for name in expected if name not in weights]
    return absent or [f"{name}: no layer that the configuration knows." for name in linears if name not in expected]


def _config_faults(folder: Path, graph: _Graph, genai: dict[str, Any]) -> list[str]:
    """Return faults of genai_config.json, of the length of rotary tables and of missing tokenizer files."""
    faults = []
    model, longest = genai["model"], genai.get("search", {}).get("max_length")
    context = model.get("context_length")
    if context is None or longest != context:
        faults.append(f"{names.GENAI_CONFIG}: search.max_length {longest} is not model.context_length {context}.")
    if not model.get("eos_token_id"):
        faults.append(f"{names.GENAI_CONFIG}: no model.eos_token_id, so generation would never end.")
    filename = model["decoder"].get("filename")
    if filename != names.MODEL_FILE:
        faults.append(f"{names.GENAI_CONFIG}: names {filename}, not {names.MODEL_FILE}.")

    faults += onnx_options.rotary_faults(graph.model, genai)
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            faults.append(f"{name}: missing, so the text cannot be tokenized.")
    return faults


def _metadata(graph: _Graph, genai: dict[str, Any]) -> dict[str, Any]:
    """Return what a runtime reads besides tensors."""
    model = graph.model
    return {
        "genai_config": genai,
        "ir_version": model.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "producer": model.producer_name,
        "context_length": genai["model"].get("context_length"),
        "end_tokens": genai["model"].get("eos_token_id"),
    }


def _sizes(folder: Path, found: _Found) -> dict[str, int]:
    """Return bytes by part. "graph": nodes, norms, biases, rotary tables, padding and configuration."""
    sizes = dict.fromkeys(("linears", "scales", "embedding", "head", "graph", "tokenizer"), 0)
    for part in found.parts.values():
        name = "head" if part.name == names.HEAD else part.name
        sizes[name] = sizes.get(name, 0) + part.size_bytes
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST}
    sizes["tokenizer"] = sum(size for name, size in files.items() if name in tokenizer.TOKENIZER_FILES)
    # Everything that belongs to no other part.
    sizes["graph"] = sum(files.values()) - sum(sizes.values())
    return sizes


def _integers(node: onnx.NodeProto) -> dict[str, int]:
    """Return the integer attributes of a node."""
    return {attribute.name: attribute.i for attribute in node.attribute if attribute.type == onnx.AttributeProto.INT}


def _genai_config(path: Path) -> dict[str, Any]:
    """Read genai_config.json and check the values that the reader needs."""
    if not path.is_file():
        raise ArtifactError(f"{path}: missing. {graph_file.AGAIN}")
    try:
        genai = readers.read_object(path, ArtifactError)
        for key in ("hidden_size", "num_hidden_layers"):
            int(genai["model"]["decoder"][key])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: garbled ({type(error).__name__}: {error}). {graph_file.AGAIN}") from error
    return genai
