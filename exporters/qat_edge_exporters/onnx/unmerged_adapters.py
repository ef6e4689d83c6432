"""Add LoRA adapters to the graph without merging them: y = W x + s B (A x), with two more products per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qat_edge.errors import ExportError
from qat_edge_exporters.checkpoint import Adapter
from qat_edge_exporters.onnx import names


def add_adapters(model: onnx.ModelProto, adapters: Mapping[str, Adapter]) -> dict[str, NDArray[Any]]:
    """Add the nodes of every adapter to the graph.

    Args:
        model: the graph, changed in place.
        adapters: adapters by module name.

    Returns:
        Values of the new initializers, by name.

    Raises:
        ExportError: an adapter's layer has no node of its own in the graph.
    """
    nodes = {names.module_of_node(n.name): n for n in model.graph.node if n.op_type in ("MatMul", "MatMulNBits")}
    tensors: dict[str, NDArray[Any]] = {}
    added: dict[str, list[onnx.NodeProto]] = {}
    for module, adapter in adapters.items():
        node = nodes.get(module)
        if node is None:
            raise ExportError(
                f"onnx: the builder made no separate node for {module}, so its adapter cannot be added. "
                "Leave this target out with --target executorch."
            )
        stem = names.initializer_stem(node.name).rpartition(".")[0]
        weights = {
            f"{stem}.lora_A.MatMul.weight": adapter.down.T,  # (in, rank)
            f"{stem}.lora_B.MatMul.weight": adapter.up.T,  # (rank, out)
        }
        for name, weight in weights.items():
            model.graph.initializer.add(name=name)
            tensors[name] = np.ascontiguousarray(weight.numpy())
        added[node.name] = _adapter_nodes(node, list(weights))

    # Nodes must be in the order of computation, so each adapter's follow those of its layer. Copied before the list is
    # cleared, because that frees the originals.
    in_order = [part for node in model.graph.node for part in (node, *added.get(node.name, []))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in in_order]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return tensors


def _adapter_nodes(node: onnx.NodeProto, weights: list[str]) -> list[onnx.NodeProto]:
    """Return the nodes of an adapter, and rename the output of `node`: its old name goes to the sum of both."""
    stem, output = node.name.rpartition("/")[0], node.output[0]
    node.output[0] = f"{stem}/lora/base"
    down, up = f"{stem}/lora_A/MatMul", f"{stem}/lora_B/MatMul"
    return [
        helper.make_node("MatMul", [node.input[0], weights[0]], [f"{down}/output_0"], name=down),
        helper.make_node("MatMul", [f"{down}/output_0", weights[1]], [f"{up}/output_0"], name=up),
        helper.make_node("Add", [node.output[0], f"{up}/output_0"], [output], name=f"{stem}/lora/Add"),
    ]
