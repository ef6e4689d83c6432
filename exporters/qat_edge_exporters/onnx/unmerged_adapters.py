"""Adapters that were not merged, as two more products beside each layer's own: y = W x + s B (A x)."""

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
    """Put every adapter into the graph; the new initializers' values by name.

    Raises:
        ExportError: the graph has no product of its own for an adapter's layer, or one of another shape.
    """
    nodes = {names.module_of_node(n.name): n for n in model.graph.node if n.op_type in ("MatMul", "MatMulNBits")}
    tensors: dict[str, NDArray[Any]] = {}
    added: dict[str, list[onnx.NodeProto]] = {}
    for module, adapter in adapters.items():
        node = nodes.get(module)
        if node is None:
            raise ExportError(
                f"onnx: the builder made no product of its own for {module}, so its adapter has no place. "
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
        added[node.name] = _beside(node, list(weights))
    nodes_in_order = [part for node in model.graph.node for part in (node, *added.get(node.name, []))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes_in_order]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return tensors


def _beside(node: onnx.NodeProto, weights: list[str]) -> list[onnx.NodeProto]:
    """The adapter's nodes; `node` hands its output on to their sum, which takes the output's name."""
    stem, output = node.name.rpartition("/")[0], node.output[0]
    node.output[0] = f"{stem}/lora/base"
    down, up = f"{stem}/lora_A/MatMul", f"{stem}/lora_B/MatMul"
    return [
        helper.make_node("MatMul", [node.input[0], weights[0]], [f"{down}/output_0"], name=down),
        helper.make_node("MatMul", [f"{down}/output_0", weights[1]], [f"{up}/output_0"], name=up),
        helper.make_node("Add", [node.output[0], f"{up}/output_0"], [output], name=f"{stem}/lora/Add"),
    ]
