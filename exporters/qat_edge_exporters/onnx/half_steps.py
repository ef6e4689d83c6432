"""Nodes that make 2-bit weights with levels -1.5 -0.5 0.5 1.5 of MatMulNBits, whose fast kernels have levels -2 -1 0 1.

With integer levels n, scales s (out, blocks) and b(x) the sums of x over each block of s:

    W = s (n + 1/2)        W x = s n x  +  1/2 s b(x)

The first product is MatMulNBits. The second has one factor for each block of 32 to 128 weights, and reads the scales of
the first, so that it adds no bytes. The operator could hold 1.5 as a zero point, too, but computes that in a scalar
loop: at 2048 x 2048 in blocks of 64, one row and one thread of an x86 processor with AVX-512, 22.7 ms; MatMulNBits with
these nodes took 0.088 ms, without them 0.081 ms (onnxruntime 1.31.1).

The sums are of the float input, which MatMulNBits rounds to int8: the second product has no rounding error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
from onnx import helper

from qat_edge.quant.codebook import SEQ
from qat_edge.quant.frozen import FrozenWeight
from qat_edge_exporters.onnx import names

HALF = 0.5


def add_half_steps(
    model: onnx.ModelProto,
    weights: Mapping[str, FrozenWeight],
    module_of: Callable[[str], str | None] = names.module_of_node,
) -> None:
    """Add the nodes behind every MatMulNBits node of a weight with `seq` levels, in place.

    Args:
        model: The graph.
        weights: Matrices by module name.
        module_of: Returns the module whose matrix a node of that name reads.
    """
    sums: dict[tuple[str, int], str] = {}  # layers that share an input and a block size share its sums
    added: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        module = module_of(node.name) if node.op_type == "MatMulNBits" else None
        if module is None or weights[module].levels != SEQ:
            continue
        block = int(_attributes(node)["block_size"])
        key = (node.input[0], block)
        added[node.name] = []
        if key not in sums:
            sums[key] = f"{names.half_step_stem(node.name)}/sums"
            added[node.name] = _sum_nodes(node.input[0], block, sums[key])
        added[node.name] += _product_nodes(node, sums[key])

    insert_behind(model, added)


def has_half_step(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Return whether the graph adds half a step to a MatMulNBits node's levels, exactly as `add_half_steps` does.

    Args:
        node: The MatMulNBits node.
        producers: Nodes by their outputs.
    """
    stem, block = names.half_step_stem(node.name), _attributes(node).get("block_size")
    by_name = {each.name: each for each in producers.values()}
    add, product = by_name.get(f"{stem}/Add"), by_name.get(f"{stem}/FusedMatMul")
    total = None if product is None else producers.get(_input(product, 0))
    blocks = None if total is None else producers.get(_input(total, 0))
    if add is None or product is None or total is None or blocks is None:
        return False

    # Nothing but the sums of this node's own input, by its own blocks, counted half.
    operators = [each.op_type for each in (add, product, total, blocks)]
    return (
        operators == ["Add", "FusedMatMul", "ReduceSum", "Reshape"]
        and _input(add, 0) in node.output
        and _input(add, 1) in product.output
        and _input(product, 1) == _input(node, 2)
        and _input(blocks, 0) == _input(node, 0)
        and _constant(blocks, producers) == [0, 0, -1, block]
        and _constant(total, producers) == [-1]
        and _attributes(total) == {"keepdims": 0}
        and _attributes(product) == {"alpha": HALF, "transB": 1}
    )


def last_of_product(node: onnx.NodeProto, nodes: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto:
    """Return the node whose output is the whole product of a MatMulNBits node, half steps included.

    Args:
        node: The MatMulNBits node.
        nodes: The nodes of the graph by name.
    """
    return nodes.get(f"{names.half_step_stem(node.name)}/Add", node)


def _sum_nodes(source: str, block: int, output: str) -> list[onnx.NodeProto]:
    """Return the nodes that sum an input (batch, tokens, in) over its blocks: (batch, tokens, blocks)."""
    # Nodes, not initializers: shapes in a data file are unknown to onnxruntime's shape inference, which refuses them.
    shape, axis, blocks = f"{output}/shape", f"{output}/axis", f"{output}/blocks"
    return [
        helper.make_node("Constant", [], [shape], name=f"{output}/Constant", value_ints=[0, 0, -1, block]),
        helper.make_node("Reshape", [source, shape], [blocks], name=f"{output}/Reshape"),
        helper.make_node("Constant", [], [axis], name=f"{output}/Constant_1", value_ints=[-1]),
        helper.make_node("ReduceSum", [blocks, axis], [output], name=f"{output}/ReduceSum", keepdims=0),
    ]


def _product_nodes(node: onnx.NodeProto, sums: str) -> list[onnx.NodeProto]:
    """Return the nodes that add half of scales times sums; they get the name of the output of `node`."""
    stem, output = names.half_step_stem(node.name), node.output[0]
    node.output[0] = f"{stem}/integer"
    return [
        helper.make_node(
            "FusedMatMul", [sums, node.input[2]], [f"{stem}/half"], name=f"{stem}/FusedMatMul", domain="com.microsoft",
            transB=1, alpha=HALF,
        ),
        helper.make_node("Add", [node.output[0], f"{stem}/half"], [output], name=f"{stem}/Add"),
    ]  # fmt: skip


def insert_behind(model: onnx.ModelProto, added: Mapping[str, list[onnx.NodeProto]]) -> None:
    """Insert nodes behind those of the given names: nodes must be in the order of computation."""
    in_order = [part for node in model.graph.node for part in (node, *added.get(node.name, []))]
    # Copied before the list is cleared, because that frees the originals.
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in in_order]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _input(node: onnx.NodeProto, index: int) -> str:
    """Return the name of an input; empty where the node of a garbled graph has none."""
    return node.input[index] if index < len(node.input) else ""


def _constant(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> list[int] | None:
    """Return the whole numbers that a Constant node gives a node's second input; None where no such node does."""
    producer = producers.get(_input(node, 1))
    if producer is None or producer.op_type != "Constant" or len(producer.attribute) != 1:
        return None
    return list(producer.attribute[0].ints) if producer.attribute[0].name == "value_ints" else None


def _attributes(node: onnx.NodeProto) -> dict[str, float]:
    """Return the numeric attributes of a node; whole numbers compare equal to their type's."""
    return {each.name: each.i if each.type == onnx.AttributeProto.INT else each.f for each in node.attribute}
