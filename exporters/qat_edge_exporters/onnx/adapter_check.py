"""Check the inputs of a graph that take the matrices of a LoRA adapter, and that each reaches its two products alone.

A default that an input has can be replaced by whoever runs the graph, so only adapters may have one. Which matrices an
adapter file replaces them by is checked against these inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import ArtifactAdapter
from qat_edge_exporters.onnx import adapter_format, decoder_signature, names
from qat_edge_exporters.onnx.decoder_names import INPUTS, PAST
from qat_edge_exporters.onnx.half_steps import last_of_product
from qat_edge_exporters.onnx.names import AdapterNames
from qat_edge_exporters.onnx.unmerged_adapters import LAYERS


@dataclass(frozen=True)
class AdapterInputs:
    """Inputs for the adapter of one layer.

    Attributes:
        named: names of the inputs, and of the nodes that read them.
        shape: (out, in) of the layer.
        output: value that holds the sum of the layer's own product and the adapter's.
    """

    named: AdapterNames
    shape: tuple[int, int]
    output: str


@dataclass(frozen=True)
class FoundInputs:
    """Inputs for adapters, as a graph has them.

    Attributes:
        by_module: those that reach the two products of their layer and nothing else.
        faults: one sentence for each other input that an export does not have.
    """

    by_module: dict[str, AdapterInputs] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def sums(self) -> set[str]:
        """Values that hold the sum of a product and an adapter's."""
        return {each.output for each in self.by_module.values()}

    @property
    def input_names(self) -> set[str]:
        """Names of all inputs for adapters."""
        return {name for each in self.by_module.values() for name in each.named[:2]}


def find_inputs(model: onnx.ModelProto) -> FoundInputs:
    """Return the inputs for adapters, and a fault for every input that an export does not have."""
    graph, found = model.graph, FoundInputs()
    defaults = {tensor.name: tensor for tensor in graph.initializer}
    declared = {entry.name: entry for entry in graph.input}
    nodes = {node.name: node for node in graph.node}
    others, module_of = {}, decoder_signature.module_of_node(model)
    for name in declared:
        # A name that is not UTF-8 is read as bytes.
        if not isinstance(name, str) or not (name in INPUTS or name.startswith(f"{PAST}.")):
            others[name] = f"the input '{readers.shorten(name)}' is not one that the exporter writes."
        elif name in defaults:
            found.faults.append(f"the input '{readers.shorten(name)}' has a default, which only adapters have.")

    for node in graph.node:
        module = module_of(node.name) if node.op_type in LAYERS else None
        named = names.adapter_names(node.name) if module is not None else None
        if module is None or named is None or others.keys().isdisjoint(named[:2]):
            continue
        for name in named[:2]:
            others.pop(name, None)
        shape = _shape(declared, defaults, named)
        if shape is None:
            found.faults.append(f"{module}: the inputs for its adapter have no default of rank 0.")
        elif not _reaches_products_alone(graph, node, nodes, named):
            found.faults.append(f"{module}: the inputs for its adapter reach something else than its two products.")
        else:
            found.by_module[module] = AdapterInputs(named, shape, nodes[named.sum_node].output[0])
    found.faults.extend(others.values())
    return found


def _shape(
    declared: Mapping[str, onnx.ValueInfoProto], defaults: Mapping[str, onnx.TensorProto], named: AdapterNames
) -> tuple[int, int] | None:
    """Return (out, in) of an adapter's layer; None where its inputs are not as the exporter writes them."""
    sizes: dict[str, list[int]] = {}
    for name in (named.down, named.up):
        if name not in declared or name not in defaults:
            return None
        default, kind = defaults[name], declared[name].type.tensor_type
        # A size that is free, such as the rank, has a name in place of a number.
        sizes[name] = [size.dim_value for size in kind.shape.dim]
        is_float = default.data_type == kind.elem_type == onnx.TensorProto.FLOAT
        if not is_float or sizes[name] != list(default.dims):
            return None
    (width, rank), (other_rank, rows) = (sizes[each] if len(sizes[each]) == 2 else (0, -1) for each in sizes)
    return (rows, width) if rank == other_rank == 0 and width > 0 and rows > 0 else None


def _reaches_products_alone(
    graph: onnx.GraphProto, node: onnx.NodeProto, nodes: Mapping[str, onnx.NodeProto], named: AdapterNames
) -> bool:
    """Return whether the nodes of an adapter are exactly those that the exporter adds.

    Args:
        graph: of all nodes.
        node: that multiplies by the layer's matrix.
        nodes: by name.
        named: names of the adapter.
    """
    down, up, total = (nodes.get(name) for name in (named.down_node, named.up_node, named.sum_node))
    if down is None or up is None or total is None:
        return False
    product = last_of_product(node, nodes)
    chain = [down, up, total]
    as_written = (
        [(each.op_type, each.domain, len(each.attribute), len(each.output)) for each in chain]
        == [("MatMul", "", 0, 1), ("MatMul", "", 0, 1), ("Add", "", 0, 1)]
        and list(down.input) == [node.input[0], named.down]
        and list(up.input) == [down.output[0], named.up]
        and list(total.input) == [product.output[0], up.output[0]]
    )
    if not as_written:
        return False

    # Nothing else may read what is inside, and it may not leave the graph.
    inside = {named.down, named.up, down.output[0], up.output[0], product.output[0]}
    reading = [each.name for each in graph.node if not inside.isdisjoint(each.input)]
    returned = inside & {output.name for output in graph.output}
    return len(reading) == len(chain) and set(reading) == {each.name for each in chain} and not returned


def read_adapter(folder: Path, found: FoundInputs) -> tuple[dict[str, ArtifactAdapter] | None, list[str]]:
    """Read the adapter of a folder by module name, and name what its file has wrong, a sentence each.

    Args:
        folder: of the artifact.
        found: inputs of its graph.

    Returns:
        The adapters, None where the folder has no adapter file and its graph no inputs for one; and the faults.

    Raises:
        ArtifactError: the file is truncated or garbled.
    """
    path = folder / names.ADAPTER_FILE
    if not path.is_file():
        return ({} if found.by_module else None), []
    parameters = adapter_format.read(path)
    extra = sorted(parameters.keys() - found.input_names)
    faults = [f"'{readers.shorten(name)}' is no input for an adapter of {names.MODEL_FILE}." for name in extra]

    adapters = {}
    for module, inputs in found.by_module.items():
        matrices = [parameters.get(name) for name in inputs.named[:2]]
        fault = _fault(inputs, *matrices)
        if fault:
            faults.append(fault)
        down, up = matrices
        if down is not None and up is not None:
            adapters[module] = ArtifactAdapter(np.ascontiguousarray(down.T), np.ascontiguousarray(up.T))
    return adapters, [f"{names.ADAPTER_FILE}: {fault}" for fault in faults]


def _fault(inputs: AdapterInputs, down: NDArray[np.float32] | None, up: NDArray[np.float32] | None) -> str:
    """Return what is wrong with the matrices of one layer, as a sentence; empty where nothing is."""
    for name, values in ((inputs.named.down, down), (inputs.named.up, up)):
        if values is None:
            return f"no parameter '{name}', which {names.MODEL_FILE} has an input for."
        if not np.isfinite(values).all():
            return f"'{name}' has numbers that are not finite."
    assert down is not None and up is not None
    rows, width = inputs.shape
    rank = down.shape[1]
    if down.shape[0] != width or up.shape != (rank, rows) or not rank:
        return (
            f"'{inputs.named.down}' {down.shape} and '{inputs.named.up}' {up.shape} are no adapter of a layer with "
            f"{width} inputs and {rows} outputs."
        )
    return ""


def check_adapter(folder: Path, model: onnx.ModelProto) -> None:
    """Check the adapter file of a folder before a runtime loads it.

    Raises:
        ArtifactError: it is garbled, does not fit the graph, or holds numbers that are not finite.
    """
    if (folder / names.ADAPTER_FILE).is_file():
        _, faults = read_adapter(folder, find_inputs(model))
        if faults:
            raise ArtifactError(f"{folder}: {faults[0]} {adapter_format.AGAIN}")
