"""Exported program -> XNNPACK delegates -> .pte."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge_exporters.executorch import compat
from qat_edge_exporters.executorch.graph import passes
from qat_edge_exporters.executorch.graph.simplify import simplify

# Operators of a matrix product, and which of their arguments is the weight.
MATRIX_PRODUCTS = {"aten.linear.default": 1, "aten.mm.default": 1, "aten.addmm.default": 2}
# Computed once a token, and better by the portable kernels: XNNPACK's are approximations for small angles.
NOT_DELEGATED = ("SinConfig", "CosConfig")


def lower(program: ExportedProgram, methods: Mapping[str, Any]) -> EdgeProgramManager:
    """Put what XNNPACK can compute of `program` into delegates, and add `methods` as constant methods.

    Args:
        program: a traced model; it is simplified in place.
        methods: constant methods of the .pte, by name.

    Raises:
        ExportError: ExecuTorch's compiler failed.
    """
    simplify(program)
    partitioner = FewestDelegates(
        configs=[c for c in compat.ALL_PARTITIONER_CONFIGS if c.__name__ not in NOT_DELEGATED]
    )
    with (
        compat.share_constants(program),
        compat.delegate_slices_of_any_length(),
        PartitionProgress(partitioner) as shown,
        passes.xnnpack_where_they_act(shown.advance),
    ):
        return compile_for("XNNPACK", passes.DecomposedOnce.of(program), [partitioner], methods)


def compile_for(
    backend: str, program: ExportedProgram, partitioners: list[Any], methods: Mapping[str, Any]
) -> EdgeProgramManager:
    """Lower `program` into delegates of the partitioners.

    Args:
        backend: its name in the message of a failure.
        program: a traced model.
        partitioners: an earlier one takes its operators before a later one.
        methods: constant methods of the .pte, by name.

    Raises:
        ExportError: ExecuTorch's compiler failed.
    """
    with _no_warnings(), passes.edge_operators_at_once():
        # Whatever a pass or a backend raises on a graph it cannot handle: they have no common exception.
        try:
            return to_edge_transform_and_lower(
                program,
                partitioner=partitioners,
                constant_methods=dict(methods),
                compile_config=compat.edge_compile_config(),
            )
        except (RuntimeError, AssertionError, KeyError, ValueError, NotImplementedError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ExportError(f"ExecuTorch cannot lower this model to {backend}: {reason}") from error


def emit(edge: EdgeProgramManager) -> ExecutorchProgramManager:
    """Return the program as it is written into a .pte: delegates in separate segments, the cache updated in place."""
    with _no_warnings():
        return edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True, run_reinplace_pass=True))


def linear_order(edge: EdgeProgramManager) -> list[str]:
    """Return the buffers that hold linear layers' codes, in the order in which the delegates compute them."""
    found = []
    graph_module = edge.exported_program().graph_module
    for call in graph_module.graph.nodes:
        if call.target is not compat.executorch_call_delegate:
            continue

        # The program inside the delegate, before XNNPACK compiled it.
        inner = getattr(graph_module, call.args[0].target).original_module
        buffers = inner.graph_signature.inputs_to_buffers
        for node in inner.graph.nodes:
            # Float weights, and constants of rewritten calls, are not buffers.
            weight = MATRIX_PRODUCTS.get(getattr(node.target, "__name__", ""))
            source = None if weight is None else _stored_constant(node.args[weight])
            if source is not None and source.name in buffers:
                found.append(buffers[source.name])
    return found


def table_order(edge: EdgeProgramManager) -> list[str]:
    """Return the buffers that hold embeddings' codes or scales, in the order in which rows are looked up."""
    program = edge.exported_program()
    buffers = program.graph_signature.inputs_to_buffers
    looked_up = [n.args[0] for n in program.graph.nodes if "embedding" in getattr(n.target, "__name__", "")]
    return [buffers[table.name] for table in looked_up if isinstance(table, Node) and table.name in buffers]


def _stored_constant(weight: Node) -> Node:
    """Return the input of the program that a weight is transposed and dequantized from."""
    # Every weight is dequantized; those of mm and addmm are transposed as well.
    while any(part in getattr(weight.target, "__name__", "") for part in ("permute", "dequantize")):
        weight = weight.all_input_nodes[0]
    return weight


class FewestDelegates(XnnpackPartitioner):
    """XNNPACK's partitioner with as few delegates as possible.

    Attributes:
        count: delegates that the last call of `partition` made.
    """

    count = 0

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], None]:
        """Keep all linear layers whole. The library's condition on each layer would cost one tracing more."""
        return [torch.ops.aten.linear.default], None

    def generate_partitions(self, ep: ExportedProgram) -> list[compat.Partition]:
        """Split a partition only where a value leaves XNNPACK and re-enters.

        The library merges greedily, pair by pair, and separates layers whose inputs are quantized once for all.
        """
        groups = self.get_matched_nodes_from_configs(ep)
        taken = {node for group in groups for node in group if node.op != "placeholder"}
        levels = _latest_levels(ep.graph_module.graph, taken)

        # A linear layer stays with the quantization of its input, even if its neighbours share that.
        for group in groups:
            earliest = min((levels[node] for node in group if node in taken), default=0)
            levels.update((node, earliest) for node in group if node in taken)

        # One partition a level. Dictionaries serve as ordered sets: the order of nodes reaches the file.
        members: dict[int, dict[Node, None]] = {}
        for node, level in levels.items():
            if node in taken:
                members.setdefault(level, {})[node] = None
        self._assign_constants(ep, members)
        return [compat.Partition(id=i, nodes=members[level]) for i, level in enumerate(sorted(members))]

    def _assign_constants(self, ep: ExportedProgram, members: dict[int, dict[Node, None]]) -> None:
        """Add each weight to the first partition that uses it."""
        constant = {node for node in ep.graph.nodes if node.op == "placeholder" and compat.is_constant_data(ep, node)}
        owned: set[Node] = set()
        for nodes in members.values():
            constants = [c for node in nodes for c in node.all_input_nodes if c in constant]
            nodes.update(dict.fromkeys(c for c in constants if c not in owned))
            owned.update(constants)

    def partition(self, exported_program: ExportedProgram) -> Any:
        """Partition as the library does, and count the delegates."""
        result = super().partition(exported_program)
        self.count = len(result.partition_tags)
        return result


def _latest_levels(graph: Graph, taken: set[Node]) -> dict[Node, int]:
    """Return, for each node, how many delegates come before it at the latest, its own included.

    A level ends where a value goes from outside `taken` into it, so no path leaves the nodes of a level and returns to
    them: together they can be one delegate. Longest path from the inputs, then the latest level that does not delay a
    user, as in scheduling by critical path (ASAP and ALAP levels).
    """

    # A new delegate begins where a value enters `taken`.
    def step(source: Node, user: Node) -> int:
        return int(source not in taken and user in taken)

    # Forwards: the longest path, counted in delegates.
    earliest: dict[Node, int] = {}
    for node in graph.nodes:
        earliest[node] = max((earliest[i] + step(i, node) for i in node.all_input_nodes), default=0)

    # Backwards: as late as all users allow.
    last = max(earliest.values())
    latest: dict[Node, int] = {}
    for node in reversed(graph.nodes):
        latest[node] = min((latest[user] - step(node, user) for user in node.users), default=last)
    return latest


class PartitionProgress:
    """Progress bar over delegates. It opens with the first one, as their number is not known before.

    Args:
        partitioner: counts its delegates when it has made them all.
    """

    def __init__(self, partitioner: FewestDelegates) -> None:
        self._partitioner = partitioner
        self._opened = ExitStack()
        self._bar: progress.Bar | None = None
        self._done = 0

    def __enter__(self) -> PartitionProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def advance(self) -> None:
        """Show that lowering of the next delegate begins."""
        if self._bar is None:
            self._bar = self._opened.enter_context(progress.bar("lowering partitions", self._partitioner.count))
        self._done += 1
        self._bar.update(self._done)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Inside the block, ignore warnings: the compiler's are about its own calls, not about the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
