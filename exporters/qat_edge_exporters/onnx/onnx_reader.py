"""ONNX folder -> the codes and scales it holds, read from the bytes themselves: ONNX Runtime has no part in it.

MatMulNBits B: uint8 (out, blocks, block * bits // 8), low nibble first, q + 2^(bits-1). A table that embedding and head
share is given under both names; its bytes count once, as the embedding's, as a Hugging Face or GGUF file has it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError
from qat_edge.models import tokenizer
from qat_edge.run import MANIFEST
from qat_edge_exporters.artifact import Artifact, ArtifactWeight
from qat_edge_exporters.onnx import graph_file, names

INT8_ACTIVATIONS = 4  # accuracy_level of MatMulNBits
NEEDED = ("tokenizer.json", "tokenizer_config.json")


@dataclass
class _Found:
    """What the nodes have shown so far. parts: initializer name -> the part it counts in, and its bytes."""

    weights: dict[str, ArtifactWeight] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    parts: dict[str, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Graph:
    """A graph with its initializers and the producers of its values by name."""

    path: Path
    model: onnx.ModelProto
    initializers: dict[str, onnx.TensorProto]
    producers: dict[str, onnx.NodeProto]

    def constant(self, node: onnx.NodeProto, index: int) -> tuple[str, NDArray[Any]]:
        """Name and values of a node's constant input, looking through a Reshape of it."""
        name = node.input[index] if index < len(node.input) else ""
        if name not in self.initializers and name in self.producers:
            producer = self.producers[name]
            name = producer.input[0] if producer.op_type == "Reshape" else name
        if name not in self.initializers:
            raise self.damaged(node, f"input {index} ('{name}') is no stored tensor")
        return name, graph_file.tensor(self.initializers[name], self.path.parent)

    def damaged(self, node: onnx.NodeProto, what: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: node '{node.name}': {what}. {graph_file.AGAIN}")


def read(folder: Path) -> Artifact:
    """Everything an ONNX folder holds.

    Raises:
        ArtifactError: a file is missing, truncated or garbled.
    """
    genai = _genai_config(folder / names.GENAI_CONFIG)
    model = graph_file.load_graph(folder / names.MODEL_FILE)
    graph = _Graph(
        folder / names.MODEL_FILE,
        model,
        {i.name: i for i in model.graph.initializer},
        {output: node for node in model.graph.node for output in node.output},
    )
    found = _Found()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            _read_linear(graph, node, found)
        elif node.op_type == "GatherBlockQuantized":
            _read_embedding(graph, node, genai["model"]["decoder"]["hidden_size"], found)
        elif node.op_type in ("MatMul", "Gemm", "Gather", "Transpose") and node.name != names.TURN_NODE:
            _float_matrix(graph, node, found)
    found.faults += _missing(found.weights, genai) + _config_faults(folder, graph, genai)
    _join_fused(model, found)
    return Artifact(found.weights, _metadata(graph, genai), _sizes(folder, found), found.faults, _turns(graph))


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Codes of rows packed low nibble first: uint8 (out, in * bits // 8) to int8 (out, in)."""
    if bits == 8:
        return (packed ^ 0x80).view(np.int8)
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    codes[:, 0::2] = packed & 0xF
    codes[:, 1::2] = packed >> 4
    codes -= 8
    return codes


def _read_linear(graph: _Graph, node: onnx.NodeProto, found: _Found) -> None:
    module = names.module_of_node(node.name)
    if module is None or module in found.weights:
        found.faults.append(f"node '{node.name}' multiplies by the matrix of no layer, or of one that has a node.")
        return
    stem, facts = names.initializer_stem(node.name), _integers(node)
    named = (f"{stem}.qweight", f"{stem}.scales")
    if tuple(node.input[1:3]) != named:
        found.faults.append(f"{module}: node '{node.name}' reads {list(node.input[1:3])} in place of {list(named)}.")
    if facts.get("accuracy_level") != INT8_ACTIVATIONS:
        found.faults.append(
            f"{module}: accuracy_level {facts.get('accuracy_level')} leaves its input in float; it was trained "
            f"with an int8 input, which is level {INT8_ACTIVATIONS}."
        )
    shape = (facts.get("N", 0), facts.get("K", 0))
    part = names.HEAD if module == names.HEAD else "linears"
    _read_matrix(graph, node, (1, 2, 3), module, shape, part, found)


def _read_embedding(graph: _Graph, node: onnx.NodeProto, width: int, found: _Found) -> None:
    axes = (_integers(node).get("gather_axis", 0), _integers(node).get("quantize_axis", 1))
    if axes != (0, 1):
        raise graph.damaged(node, f"gathers and quantizes along axes {axes}, not (0, 1)")
    rows = graph.constant(node, 2)[1].shape[0]
    _read_matrix(graph, node, (0, 2, 3), names.EMBEDDING, (rows, width), "embedding", found)


def _read_matrix(
    graph: _Graph,
    node: onnx.NodeProto,
    inputs: tuple[int, int, int],
    module: str,
    shape: tuple[int, int],
    part: str,
    found: _Found,
) -> None:
    """Unpack the matrix (out, in) of `shape`. inputs: where the node takes codes, scales and zero points."""
    facts = _integers(node)
    bits, block = facts.get("bits", 4), facts.get("block_size", 0)
    (codes_name, packed), (scales_name, scales) = graph.constant(node, inputs[0]), graph.constant(node, inputs[1])
    blocks = -(-shape[1] // block) if block > 0 else 0
    whole = packed.size == shape[0] * blocks * block * bits // 8 or packed.size == shape[0] * shape[1] * bits // 8
    if bits not in (4, 8) or not blocks or not whole or packed.dtype != np.uint8:
        raise graph.damaged(node, f"{packed.dtype} {packed.shape} cannot hold {bits}-bit codes of a {shape} matrix")
    if scales.size != shape[0] * blocks or scales.dtype != np.float32:
        raise graph.damaged(node, f"scales {scales.dtype} {scales.shape}, expected float32 {(shape[0], blocks)}")
    if any(node.input[inputs[2] :]):
        found.faults.append(
            f"{module}: zero points, a group order or a bias ({list(node.input[inputs[2] :])}) were added."
        )
    codes = unpack(np.asarray(packed).reshape(shape[0], -1), bits)[:, : shape[1]]
    scales_bytes = scales.nbytes
    scales = np.array(scales).reshape(shape[0], blocks)
    if bits == 8 and (scales == scales[:, :1]).all():  # per channel, repeated for every block
        scales = scales[:, :1].copy()
    found.weights[module] = ArtifactWeight(codes, scales, bits, block)
    # The gather comes first in the graph, so a shared table keeps the embedding's name.
    found.parts.setdefault(codes_name, (part, packed.nbytes))
    found.parts.setdefault(scales_name, ("scales" if part == "linears" else part, scales_bytes))


def _float_matrix(graph: _Graph, node: onnx.NodeProto, found: _Found) -> None:
    """A matrix in float would work, and would not be what was frozen: its size counts, and it is named."""
    for name in node.input:
        if name not in graph.initializers or len(graph.initializers[name].dims) != 2:
            continue
        if "/lora_" in node.name:
            part = "adapters"
        elif node.op_type in ("Gather", "Transpose"):  # a head's table is turned where the embedding shares it
            part = "embedding"
        else:
            part = names.HEAD if names.module_of_node(node.name) == names.HEAD else "linears"
        found.parts.setdefault(name, (part, graph_file.tensor(graph.initializers[name], graph.path.parent).nbytes))
        found.faults.append(f"node '{node.name}' ({node.op_type}) reads '{name}', a matrix that is not quantized.")


def _turns(graph: _Graph) -> frozenset[str]:
    """sha256 of what turns the head's input, if anything does."""
    stored = [graph.constant(node, 1)[1] for node in graph.model.graph.node if node.name == names.TURN_NODE]
    return frozenset(hashlib.sha256(np.ascontiguousarray(turn.T).tobytes()).hexdigest() for turn in stored)


def _join_fused(model: onnx.ModelProto, found: _Found) -> None:
    """Put projections together that the model has in one, by what the graph's metadata says of them."""
    for entry in model.metadata_props:
        fused = json.loads(entry.value) if entry.key == "fused" else {}
        for name, parts in fused.items():
            pieces = [found.weights.pop(part) for part in parts if part in found.weights]
            if len(pieces) == len(parts):
                codes, scales = (np.concatenate([getattr(p, what) for p in pieces]) for what in ("codes", "scales"))
                found.weights[name] = ArtifactWeight(codes, scales, pieces[0].bits, pieces[0].block)


def _missing(weights: dict[str, ArtifactWeight], genai: dict[str, Any]) -> list[str]:
    """A matrix that other layers have and one has not; an absent embedding or head."""
    layers = range(genai["model"]["decoder"]["num_hidden_layers"])
    linears = [name for name in weights if name not in (names.EMBEDDING, names.HEAD)]
    kinds = {name.split(".", 3)[3] for name in linears}
    wanted = [f"model.layers.{i}.{kind}" for i in layers for kind in sorted(kinds)] + [names.EMBEDDING, names.HEAD]
    absent = [f"{name}: no quantized matrix of that name." for name in wanted if name not in weights]
    return absent or [f"{name}: no layer that the configuration knows." for name in linears if name not in wanted]


def _config_faults(folder: Path, graph: _Graph, genai: dict[str, Any]) -> list[str]:
    faults = []
    model, longest = genai["model"], genai.get("search", {}).get("max_length")
    context = model.get("context_length")
    if context is None or longest != context:
        faults.append(f"{names.GENAI_CONFIG}: search.max_length {longest} is not model.context_length {context}.")
    if not model.get("eos_token_id"):
        faults.append(f"{names.GENAI_CONFIG}: no model.eos_token_id, so no answer would ever end.")
    if model["decoder"].get("filename") != names.MODEL_FILE:
        faults.append(f"{names.GENAI_CONFIG}: names {model['decoder'].get('filename')}, not {names.MODEL_FILE}.")
    positions = [i.dims[0] for name, i in graph.initializers.items() if name in names.ROTARY_TABLES]
    if context is not None and positions and min(positions) < context:
        faults.append(f"{names.MODEL_FILE}: rotary tables for {min(positions)} positions, but a context of {context}.")
    faults += [f"{name}: missing, so the text cannot be tokenized." for name in NEEDED if not (folder / name).is_file()]
    return faults


def _metadata(graph: _Graph, genai: dict[str, Any]) -> dict[str, Any]:
    model = graph.model
    return {
        "genai_config": genai,
        "ir_version": model.ir_version,
        "opsets": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "producer": model.producer_name,
        "context_length": genai["model"].get("context_length"),
        "end_tokens": genai["model"].get("eos_token_id"),
    }


def _sizes(folder: Path, found: _Found) -> dict[str, int]:
    """Bytes by part. graph: nodes, norms, biases, rotary tables, padding and configuration."""
    sizes = dict.fromkeys(("linears", "scales", "embedding", "head", "graph", "tokenizer"), 0)
    for part, size in found.parts.values():
        part = "head" if part == names.HEAD else part
        sizes[part] = sizes.get(part, 0) + size
    files = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file() and p.name != MANIFEST}
    sizes["tokenizer"] = sum(size for name, size in files.items() if name in tokenizer.FILES)
    sizes["graph"] = sum(files.values()) - sum(sizes.values())
    return sizes


def _integers(node: onnx.NodeProto) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}


def _genai_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArtifactError(f"{path}: missing. {graph_file.AGAIN}")
    try:
        genai: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("hidden_size", "num_hidden_layers"):
            int(genai["model"]["decoder"][key])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: garbled ({type(error).__name__}: {error}). {graph_file.AGAIN}") from error
    return genai
