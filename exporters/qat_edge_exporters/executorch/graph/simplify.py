"""Remove operators that change nothing from an exported program.

At every token each operator costs time, and in small models that adds up. Two kinds are removed:

Transposes of heads and positions that undo each other. Transformers computes rotary embeddings on (batch, head,
position, channel), while ExecuTorch's attention and cache take (batch, position, head, channel). Operators in between
that work element by element, or along the channels, give the same result in either layout, so each transpose before
them can be moved next to the one behind them. In a .pte each transpose is a copy.

Factors of one. They are the weights of the norms if the hidden states were rotated (qat_edge.quant.rotation).
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
ALONG = {aten.cat.default, aten.slice.Tensor}  # work along one dimension, their second argument
CHANNELS = (-1, 3)  # the last dimension, which a swap of 1 and 2 leaves in its position


def simplify(program: ExportedProgram) -> None:
    """Remove operators that change nothing, in place."""
    graph = program.graph_module.graph
    _remove_factors_of_one(program, graph)
    _cancel_swaps(graph)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _remove_factors_of_one(program: ExportedProgram, graph: Graph) -> None:
    """Replace products with a parameter that is 1 everywhere by their other factor."""
    parameters = program.graph_signature.inputs_to_parameters
    for node in graph.nodes:
        if node.op != "placeholder" or node.name not in parameters or node.meta["val"].dim() != 1:
            continue
        # Read from the weights: a graph does not hold values.
        if not bool((program.state_dict[parameters[node.name]] == 1).all()):
            continue

        for user in list(node.users):
            other = next((n for n in user.all_input_nodes if n is not node), None)
            # A product that broadcasts, or changes the type, is not its other factor.
            if user.target is aten.mul.Tensor and other is not None and _have_same_shape_and_type(user, other):
                user.replace_all_uses_with(other)


def _have_same_shape_and_type(node: Node, other: Node) -> bool:
    one, two = node.meta["val"], other.meta["val"]
    return bool(one.dtype == two.dtype and one.dim() == two.dim()) and all(
        statically_known_true(a == b) for a, b in zip(one.shape, two.shape, strict=True)
    )


def _cancel_swaps(graph: Graph) -> None:
    """Remove pairs of swaps of dimensions 1 and 2, and compute everything in between in the swapped layout."""
    # Backwards: nodes all of whose users are swaps, or can be computed in the swapped layout themselves.
    movable: set[Node] = set()
    for node in reversed(graph.nodes):
        if _commutes_with_swap(node) and all(user in movable or _is_swap(user) for user in node.users):
            movable.add(node)

    # Forwards: `swapped` maps a node to one that holds the same tensor with dimensions 1 and 2 exchanged.
    swapped: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if _is_swap(node):
            # A swap of something that exists swapped is that; any other swap adds such a pair.
            if node.args[0] in swapped:
                node.replace_all_uses_with(swapped[node.args[0]])
            else:
                swapped[node] = node.args[0]
        elif node in movable and _can_follow(_operands(node), swapped):
            swapped[node] = _computed_swapped(graph, node, swapped)


def _is_swap(node: Node) -> bool:
    """Return whether a node exchanges dimensions 1 and 2 of a tensor with four."""
    if node.target is not aten.transpose.int or node.meta["val"].dim() != 4:
        return False
    return {dim % 4 for dim in node.args[1:] if isinstance(dim, int)} == {1, 2}


def _commutes_with_swap(node: Node) -> bool:
    """Return whether a node gives the same elements in either order of its operands' dimensions 1 and 2."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].dim() != 4:
        return False
    if node.target in ALONG:
        return len(node.args) > 1 and node.args[1] in CHANNELS
    if node.target is aten.linear.default:
        return True
    # With an operand of fewer dimensions, broadcasting would pair other elements after a swap.
    return node.target in ELEMENTWISE and all(operand.meta["val"].dim() == 4 for operand in _tensors(node))


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _operands(node: Node) -> list[Node]:
    """Return the inputs that have dimensions 1 and 2, which the matrix of a linear layer does not."""
    return [n for n in _tensors(node) if n.meta["val"].dim() == 4]


def _can_follow(operands: list[Node], swapped: dict[Node, Node]) -> bool:
    """Return whether some operand exists in the swapped layout, and a swap of each other one moves no element.

    A swap moves nothing where dimension 1 or 2 has length 1.
    """
    rest = [operand.meta["val"].shape[1:3] for operand in operands if operand not in swapped]
    return len(rest) < len(operands) and all(any(statically_known_true(d == 1) for d in shape) for shape in rest)


def _computed_swapped(graph: Graph, node: Node, swapped: dict[Node, Node]) -> Node:
    """Add a node that computes `node` in the swapped layout, and return it."""
    # An operand that exists in the original layout only has a dimension of length 1: its swap costs nothing.
    for operand in _operands(node):
        if operand in swapped:
            continue
        with graph.inserting_after(operand):
            swapped[operand] = _add_call(graph, aten.transpose.int, (operand, 1, 2), {})

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: swapped.get(n, n))
    with graph.inserting_before(node):
        return _add_call(graph, node.target, args, kwargs)


def _add_call(graph: Graph, target: Any, args: Any, kwargs: Any) -> Node:
    """Add a call with the fake tensor that it returns, which later passes read."""
    call = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    call.meta["val"] = target(*fake_args, **fake_kwargs)
    return call
