"""What a graph need not compute: at every token each operator costs time, and in small models that adds up.

Transposes of heads and positions are taken out where they undo each other. Transformers computes rotary embeddings on
(batch, head, position, channel), and ExecuTorch's attention and cache take (batch, position, head, channel). What is
computed in between, element by element or along the channels, is the same either way round, so each transpose before it
meets the one behind it. In a .pte each is a copy.

Factors of one are taken out as well: they are the norms' weights where the hidden states were turned
(qat_edge.quant.rotation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
ELEMENTWISE = {
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default, aten.rsqrt.default,
    aten.pow.Tensor_Scalar,
}  # fmt: skip
ALONG = {aten.cat.default, aten.slice.Tensor}  # a dimension, the second argument
CHANNELS = (-1, 3)


def simplify(program: ExportedProgram) -> None:
    """Take out, in place, what changes nothing."""
    graph = program.graph_module.graph
    _drop_ones(program, graph)
    _cancel_swaps(graph)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _drop_ones(program: ExportedProgram, graph: Graph) -> None:
    """Products with a parameter that is one everywhere are the other factor."""
    named = program.graph_signature.inputs_to_parameters
    for node in graph.nodes:
        if node.op != "placeholder" or node.name not in named or node.meta["val"].dim() != 1:
            continue
        if not bool((program.state_dict[named[node.name]] == 1).all()):
            continue
        for user in list(node.users):
            other = next((n for n in user.all_input_nodes if n is not node), None)
            if user.target is aten.mul.Tensor and other is not None and _alike(user, other):
                user.replace_all_uses_with(other)


def _alike(node: Node, other: Node) -> bool:
    """Whether two tensors have the same shape and type."""
    one, two = node.meta["val"], other.meta["val"]
    return bool(one.dtype == two.dtype and one.dim() == two.dim()) and all(
        statically_known_true(a == b) for a, b in zip(one.shape, two.shape, strict=True)
    )


def _cancel_swaps(graph: Graph) -> None:
    """Compute between two transposes of dimensions 1 and 2 as if neither were there."""
    movable: set[Node] = set()
    for node in reversed(graph.nodes):
        if _computes_alike(node) and all(user in movable or _is_swap(user) for user in node.users):
            movable.add(node)
    swapped: dict[Node, Node] = {}  # by node: what holds it with its dimensions 1 and 2 exchanged
    for node in list(graph.nodes):
        if _is_swap(node):
            if node.args[0] in swapped:
                node.replace_all_uses_with(swapped[node.args[0]])
            else:
                swapped[node] = node.args[0]
        elif node in movable and _can_follow(_operands(node), swapped):
            swapped[node] = _computed_swapped(graph, node, swapped)


def _is_swap(node: Node) -> bool:
    if node.target is not aten.transpose.int or node.meta["val"].dim() != 4:
        return False
    return {dim % 4 for dim in node.args[1:] if isinstance(dim, int)} == {1, 2}


def _computes_alike(node: Node) -> bool:
    """Whether it gives the same elements whichever way round its operands' dimensions 1 and 2 lie."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].dim() != 4:
        return False
    if node.target in ALONG:
        return len(node.args) > 1 and node.args[1] in CHANNELS
    return node.target is aten.linear.default or (
        node.target in ELEMENTWISE and all(operand.meta["val"].dim() == 4 for operand in _tensors(node))
    )


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _operands(node: Node) -> list[Node]:
    """What of a node's inputs has dimensions 1 and 2: not a product's matrix."""
    return [n for n in _tensors(node) if n.meta["val"].dim() == 4]


def _can_follow(operands: list[Node], swapped: dict[Node, Node]) -> bool:
    """Whether some operand is there the other way round, and each other one moves nothing: a dimension of it is 1."""
    rest = [operand.meta["val"].shape[1:3] for operand in operands if operand not in swapped]
    return len(rest) < len(operands) and all(any(statically_known_true(d == 1) for d in shape) for shape in rest)


def _computed_swapped(graph: Graph, node: Node, swapped: dict[Node, Node]) -> Node:
    for operand in _operands(node):
        if operand in swapped:
            continue
        with graph.inserting_after(operand):
            swapped[operand] = _called(graph, aten.transpose.int, (operand, 1, 2), {})
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: swapped.get(n, n))
    with graph.inserting_before(node):
        return _called(graph, node.target, args, kwargs)


def _called(graph: Graph, target: Any, args: Any, kwargs: Any) -> Node:
    made = graph.call_function(target, args, kwargs)
    given = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    made.meta["val"] = target(*given[0], **given[1])
    return made
