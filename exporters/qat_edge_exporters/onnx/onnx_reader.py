"""Read codes and scales back from the bytes of an ONNX folder, without ONNX Runtime.

`onnx_matrices` reads single matrices. A table that embedding and head share is returned under both names; its bytes
count once, as the embedding's, as in a Hugging Face or GGUF file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import Artifact, ArtifactAdapter, ArtifactWeight, FloatConstant
from qat_edge_exporters.onnx import adapter_check, graph_check, graph_file, names, onnx_matrices, onnx_options
from qat_edge_exporters.onnx.onnx_matrices import FLOAT_OPERATORS, TOKENIZER_FILES, FoundMatrices, OnnxGraph

_FINAL_NORM = re.compile(r"model\.layers\.\d+\.final_norm_layernorm\.weight")
_FLOAT_TENSOR = re.compile(r"(model\.layers\.\d+\.\w+(\.\w+)?|lm_head)\.(weight|bias)")


def read(folder: Path) -> Artifact:
    """Read everything in an ONNX folder.

    Raises:
        ArtifactError: a file is missing, truncated or garbled.
    """
    genai = genai_config(folder / names.GENAI_CONFIG)
    graph = OnnxGraph.load(folder / names.MODEL_FILE)
    found = FoundMatrices()
    adapter_inputs = adapter_check.find_inputs(graph.model)
    adapter, adapter_faults = adapter_check.read_adapter(folder, adapter_inputs)
    for node in graph.model.graph.node:
        if node.op_type == "MatMulNBits":
            module = names.module_of_node(node.name)
            part = names.HEAD if module == names.HEAD else "linears"
            onnx_matrices.read_linear(graph, node, module, part, found)
        elif node.op_type == "GatherBlockQuantized":
            width = genai["model"]["decoder"]["hidden_size"]
            onnx_matrices.read_table(graph, node, names.EMBEDDING, width, found)
        elif node.op_type in FLOAT_OPERATORS and node.name != names.ROTATION_NODE:
            part = _part_of_float_matrix(node)
            onnx_matrices.record_float_matrix(graph, node, part, found, adapter_inputs.input_names)

    # Before fused projections are joined: the configuration of the graph counts them separately.
    found.faults += _missing_matrices(found.weights, genai) + config_faults(folder, graph, genai)
    found.faults += graph_check.graph_faults(graph.model, adapter_inputs) + adapter_faults
    _join_fused(graph.model, found)
    if adapter is not None:
        _join_fused_adapters(graph.model, adapter, found.faults)
    return Artifact(
        weights=found.weights,
        metadata=metadata(graph, genai),
        size_bytes=onnx_matrices.sizes(folder, found),
        faults=found.faults,
        floats=_float_constants(graph, found, adapter_inputs.input_names),
        adapter=adapter,
    )


def _part_of_float_matrix(node: onnx.NodeProto) -> str:
    if node.op_type in ("Gather", "Transpose"):  # a head that shares the embedding's table reads it transposed
        return "embedding"
    return names.HEAD if names.module_of_node(node.name) == names.HEAD else "linears"


def _float_constants(graph: OnnxGraph, found: FoundMatrices, adapter_inputs: set[str]) -> list[FloatConstant]:
    """Return every float32 initializer that is no scale of a matrix, under the checkpoint's name where it has one.

    Args:
        graph: the graph.
        found: its matrices.
        adapter_inputs: names of inputs for an adapter, whose defaults are empty.
    """
    rotations = {node.input[1] for node in graph.model.graph.node if node.name == names.ROTATION_NODE}
    constants = []
    for name, initializer in graph.initializers.items():
        if name in found.parts or name in adapter_inputs or initializer.data_type != onnx.TensorProto.FLOAT:
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


def _join_fused(model: onnx.ModelProto, found: FoundMatrices) -> None:
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


def _join_fused_adapters(model: onnx.ModelProto, adapter: dict[str, ArtifactAdapter], faults: list[str]) -> None:
    """Join the adapters of the parts of fused projections: one A, and the rows of B."""
    for name, part_names in _fused_parts(model).items():
        parts = [adapter.pop(part) for part in part_names if part in adapter]
        if not parts:
            continue
        if len(parts) < len(part_names) or any(not np.array_equal(part.down, parts[0].down) for part in parts):
            faults.append(f"{names.ADAPTER_FILE}: the parts of {readers.shorten(name)} do not share a matrix A.")
        else:
            adapter[name] = ArtifactAdapter(parts[0].down, np.concatenate([part.up for part in parts]))


def _missing_matrices(weights: dict[str, ArtifactWeight], genai: dict[str, Any]) -> list[str]:
    """Return a fault for each matrix that other layers have and one lacks, and for a missing embedding or head."""
    layers = range(genai["model"]["decoder"]["num_hidden_layers"])
    linears = [name for name in weights if name not in (names.EMBEDDING, names.HEAD)]
    in_layer = sorted({name.split(".", 3)[3] for name in linears})  # "self_attn.q_proj" of "model.layers.0...."
    expected = [f"model.layers.{layer}.{name}" for layer in layers for name in in_layer]
    expected += [names.EMBEDDING, names.HEAD]
    absent = [f"{name}: no quantized matrix of that name." for name in expected if name not in weights]
    return absent or [f"{name}: no layer that the configuration knows." for name in linears if name not in expected]


def config_faults(folder: Path, graph: OnnxGraph, genai: dict[str, Any]) -> list[str]:
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


def metadata(graph: OnnxGraph, genai: dict[str, Any]) -> dict[str, Any]:
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


def genai_config(path: Path) -> dict[str, Any]:
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
