"""Inputs of the graph for LoRA adapters that stay unmerged: y = W x + s B (A x), with two more products per layer.

A transposed (in, rank) and s B transposed (rank, out) of every adapted layer are inputs of the graph with a default, a
matrix of rank 0 whose product is zero. So the graph alone computes the base, and is the same for every adapter of the
same layers. `adapter_format` holds the matrices of one adapter, of any rank, by the names of these inputs:

    onnxruntime          RunOptions.add_active_adapter(LoraAdapter)
    onnxruntime-genai    Generator.set_active_adapter(Adapters, name)

Measured with onnxruntime 1.31.1: products over a rank of 0 are exactly zero, so the base's outputs are those of a graph
without these inputs, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qat_edge.errors import ExportError
from qat_edge.quant.frozen_adapters import Adapter
from qat_edge_exporters.onnx import names
from qat_edge_exporters.onnx.half_steps import insert_behind, last_of_product
from qat_edge_exporters.onnx.names import AdapterNames

LAYERS = ("MatMul", "MatMulNBits")  # operators of the layers that an adapter can be added to


def split_fused_adapters(adapters: Mapping[str, Adapter], fused: Mapping[str, Mapping[str, int]]) -> dict[str, Adapter]:
    """Split the adapters of fused projections: each part has all of A, and its own rows of B.

    Args:
        adapters: by module name.
        fused: for each fused projection, the rows of its parts in order, by name of the part.
    """
    found: dict[str, Adapter] = {}
    for module, adapter in adapters.items():
        start = 0
        for part, rows in fused.get(module, {module: len(adapter.up)}).items():
            found[part] = replace(adapter, up=adapter.up[start : start + rows])
            start += rows
    return found


def add_adapter_inputs(
    model: onnx.ModelProto,
    adapters: Mapping[str, Adapter],
    module_of: Callable[[str], str | None] = names.module_of_node,
) -> dict[str, NDArray[np.float32]]:
    """Add the inputs and nodes of every adapter to the graph, in place.

    Args:
        model: the graph.
        adapters: by module name, those of fused projections split.
        module_of: returns the module whose matrix a node of that name reads.

    Returns:
        The adapter's matrices by name of their input.

    Raises:
        ExportError: an adapter's layer has no node of its own in the graph, or another shape.
    """
    nodes = {node.name: node for node in model.graph.node}
    layers = {module_of(name): node for name, node in nodes.items() if node.op_type in LAYERS}
    parameters: dict[str, NDArray[np.float32]] = {}
    added: dict[str, list[onnx.NodeProto]] = {}
    for module, adapter in adapters.items():
        node = layers.get(module)
        if node is None:
            raise ExportError(
                f"onnx: the graph has no separate node for {module}, so its adapter cannot be added. "
                "Leave this target out with --target executorch."
            )
        _check_shape(model, node, module, adapter)
        found = names.adapter_names(node.name)
        _add_input(model, found.down, (adapter.down.shape[1], 0))
        _add_input(model, found.up, (0, adapter.up.shape[0]))
        parameters |= {found.down: adapter.down.T.numpy(), found.up: adapter.up.T.numpy()}

        last = last_of_product(node, nodes)
        added[last.name] = _adapter_nodes(node, last, found)

    insert_behind(model, added)
    return parameters


def _check_shape(model: onnx.ModelProto, node: onnx.NodeProto, module: str, adapter: Adapter) -> None:
    """Require that an adapter is for a matrix of its layer's shape, where the node shows it."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    stored = next((tensor for tensor in model.graph.initializer if tensor.name == node.input[1]), None)
    if node.op_type == "MatMulNBits":
        expected = (sizes["N"], sizes["K"])
    elif stored is not None:
        expected = (stored.dims[1], stored.dims[0])
    else:
        return
    shape = (adapter.up.shape[0], adapter.down.shape[1])
    if shape != expected:
        raise ExportError(f"onnx: the adapter of {module} is for a weight of {shape}, not {expected}.")


def _add_input(model: onnx.ModelProto, name: str, shape: tuple[int, int]) -> None:
    """Add an input whose rank is free, and whose default has the given shape, of rank 0."""
    sizes = [size or f"{name}.rank" for size in shape]
    model.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes))
    # In the graph: a data file has no bytes for it.
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))


def _adapter_nodes(node: onnx.NodeProto, last: onnx.NodeProto, found: AdapterNames) -> list[onnx.NodeProto]:
    """Return the nodes of an adapter, and rename the layer's product: its old name goes to the sum of both.

    Args:
        node: that multiplies by the layer's matrix.
        last: whose output is the layer's product.
        found: names of the adapter.
    """
    output, last.output[0] = last.output[0], found.base
    down, up = f"{found.down_node}/output_0", f"{found.up_node}/output_0"
    return [
        helper.make_node("MatMul", [node.input[0], found.down], [down], name=found.down_node),
        helper.make_node("MatMul", [down, found.up], [up], name=found.up_node),
        helper.make_node("Add", [found.base, up], [output], name=found.sum_node),
    ]
