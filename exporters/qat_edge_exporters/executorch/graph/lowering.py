"""Exported program -> XNNPACK delegates -> .pte."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.canonical_partitioners.config_partitioner import is_constant_data
from executorch.exir.delegate import executorch_call_delegate
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.passes.infra.partitioner import Partition

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge_exporters.executorch.graph import passes
from qat_edge_exporters.executorch.graph.simplify import simplify

PRODUCTS = {"aten.linear.default": 1, "aten.mm.default": 1, "aten.addmm.default": 2}  # which argument is the weight
# Computed once a token, and better by the portable kernels: XNNPACK's are approximations for small angles.
NOT_DELEGATED = ("SinConfig", "CosConfig")


def lower(program: ExportedProgram, methods: dict[str, Any]) -> EdgeProgramManager:
    """`program` with what XNNPACK can compute in delegates, and `methods` as its constant methods.

    Raises:
        ExportError: ExecuTorch's compiler failed.
    """
    simplify(program)
    configs = [c for c in ALL_PARTITIONER_CONFIGS if c.__name__ not in NOT_DELEGATED]
    partitioner, done = Partitioner(configs=configs), itertools.count(1)
    with ExitStack() as stack:
        stack.enter_context(_shared_constants(program))

        def show() -> None:
            # The number of partitions is known once the first of them is lowered.
            count = next(done)
            if count == 1:
                shown.append(stack.enter_context(progress.bar("lowering partitions", partitioner.count)))
            shown[0].update(count)

        shown: list[progress.Bar] = []
        stack.enter_context(passes.xnnpack_where_they_act(show))
        return compile_for("XNNPACK", passes.Undecomposed.of(program), [partitioner], methods)


def compile_for(
    backend: str, program: ExportedProgram, partitioners: list[Any], methods: dict[str, Any]
) -> EdgeProgramManager:
    """`program` in delegates of the partitioners, the earlier ones first; backend: what a failure names.

    Raises:
        ExportError: ExecuTorch's compiler failed.
    """
    with _quiet(), passes.edge_operators_at_once():
        try:
            return to_edge_transform_and_lower(
                program,
                partitioner=partitioners,
                constant_methods=methods,
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            )
        except (RuntimeError, AssertionError, KeyError, ValueError, NotImplementedError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ExportError(f"ExecuTorch cannot lower this model to {backend}: {reason}") from error


def emit(edge: EdgeProgramManager) -> ExecutorchProgramManager:
    """The program as it is written into a .pte, delegates in segments of their own, a cache written in place."""
    with _quiet():
        return edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True, run_reinplace_pass=True))


def linear_order(edge: EdgeProgramManager) -> list[str]:
    """Buffers that hold linear layers' codes, in the order in which delegates and their nodes compute them."""
    found = []
    graph_module = edge.exported_program().graph_module
    for call in graph_module.graph.nodes:
        if call.target is not executorch_call_delegate:
            continue
        inner = getattr(graph_module, call.args[0].target).original_module
        buffers = inner.graph_signature.inputs_to_buffers
        for node in inner.graph.nodes:
            weight = PRODUCTS.get(getattr(node.target, "__name__", ""))
            source = None if weight is None else _undequantized(node.args[weight])
            if source is not None and source.name in buffers:
                found.append(buffers[source.name])
    return found


def table_order(edge: EdgeProgramManager) -> list[str]:
    """Buffers that hold embeddings' codes or scales, in the order in which the program looks their rows up."""
    program = edge.exported_program()
    buffers = program.graph_signature.inputs_to_buffers
    looked_up = [n.args[0] for n in program.graph.nodes if "embedding" in getattr(n.target, "__name__", "")]
    return [buffers[table.name] for table in looked_up if isinstance(table, Node) and table.name in buffers]


def _undequantized(weight: Node) -> Node:
    """The constant that a weight comes from."""
    while any(part in getattr(weight.target, "__name__", "") for part in ("permute", "dequantize")):
        weight = weight.all_input_nodes[0]
    return weight


class Partitioner(XnnpackPartitioner):
    """XNNPACK's own, remembering how many delegates it cut."""

    count = 0

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], None]:
        """Linear layers stay whole, all of them: without a condition on each, one tracing of three is not needed."""
        return [torch.ops.aten.linear.default], None

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """As few delegates as can be: what XNNPACK takes, cut only where a value leaves and comes back.

        The library's way merges greedily, pair by pair, and splits layers whose inputs are rounded once for all.
        """
        groups = self.get_matched_nodes_from_configs(ep)
        taken = {node for group in groups for node in group if node.op != "placeholder"}
        levels = _latest_levels(ep.graph_module.graph, taken)
        for group in groups:  # a linear layer stays with the rounding of its input, though neighbours share that
            earliest = min((levels[node] for node in group if node in taken), default=0)
            levels.update((node, earliest) for node in group if node in taken)
        members: dict[int, dict[Node, None]] = {}
        for node, level in levels.items():
            if node in taken:
                members.setdefault(level, {})[node] = None
        constant = {node for node in ep.graph.nodes if node.op == "placeholder" and is_constant_data(ep, node)}
        owned: set[Node] = set()
        for nodes in members.values():
            constants = [c for node in nodes for c in node.all_input_nodes if c in constant]
            nodes.update(dict.fromkeys(c for c in constants if c not in owned))
            owned.update(constants)
        return [Partition(id=i, nodes=members[level]) for i, level in enumerate(sorted(members))]

    def partition(self, exported_program: ExportedProgram) -> Any:
        result = super().partition(exported_program)
        self.count = len(result.partition_tags)
        return result


def _latest_levels(graph: Graph, taken: set[Node]) -> dict[Node, int]:
    """How many delegates come before each node at the latest, itself included.

    A level ends where a value goes from outside `taken` into it, so no path leaves a level's nodes and returns:
    together they can be one delegate.
    """

    def step(source: Node, user: Node) -> int:
        return int(source not in taken and user in taken)

    earliest: dict[Node, int] = {}
    for node in graph.nodes:
        earliest[node] = max((earliest[i] + step(i, node) for i in node.all_input_nodes), default=0)
    last = max(earliest.values())
    latest: dict[Node, int] = {}
    for node in reversed(graph.nodes):
        latest[node] = min((latest[user] - step(node, user) for user in node.users), default=last)
    return latest


@contextmanager
def _shared_constants(program: ExportedProgram) -> Iterator[None]:
    """Within the block, a copy of a part of the program holds the same constants: XNNPACK's backend changes none."""
    tensors = [t for t in (*program.state_dict.values(), *program.constants.values()) if isinstance(t, Tensor)]
    for tensor in tensors:
        vars(tensor)["__deepcopy__"] = partial(_first, tensor)
    try:
        yield
    finally:
        for tensor in tensors:
            vars(tensor).pop("__deepcopy__", None)  # once, though a tensor may be there twice


def _first(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    return tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """The compiler warns about its own calls, not about the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
