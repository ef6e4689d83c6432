"""What passes between the delegates of a .pte: a copy of its program with these values as outputs.

ExecuTorch's event tracer is not compiled into the Python wheel. But what delegates and attention hand on are values of
the program like its result, so a copy may return them, too; each gets memory of its own, as the plan reuses it. They
are, of every layer, what attention found (the input of o_proj) and the layer's output; of the last, the head's input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.exir._serialize._program import serialize_pte_binary
from executorch.exir.schema import DelegateCall, ExecutionPlan, KernelCall
from executorch.exir.schema import Tensor as TensorFact

from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import Exposed
from qat_edge_exporters.executorch.pte import delegates
from qat_edge_exporters.executorch.pte.pte_reader import LAYERS, MODEL, Layers, read_layers
from qat_edge_exporters.executorch.pte.runner_contract import FORWARD

ATTENTION = ("llama::custom_sdpa", "llama::custom_quantized_sdpa")
PROJECTION = ".o_proj"  # of what attention found
LAYER = ".self_attn"  # ends the name of a layer's attention
ALIGNMENT = 64  # bytes
TOKENS = 8  # of one call of the copy, at most


@dataclass(frozen=True)
class Place:
    """A value of the program, and what it is: the input or the output of a module."""

    value: int
    module: str
    at_input: bool


def expose(folder: Path, out: Path) -> Exposed:
    """Write a copy of the program into the folder `out`; each of its values is an output after the logits.

    Raises:
        ArtifactError: the .pte is damaged, or has no attention whose layers could be told.
    """
    pte, layers = delegates.open_pte(folder / MODEL), read_layers(folder / LAYERS)
    plan = next(plan for plan in pte.program.execution_plan if plan.name == FORWARD)
    found = list(places(plan, layers))
    if not any(place.at_input for place in found):
        raise ArtifactError(f"{folder / MODEL}: none of {', '.join(ATTENTION)} in it, so its layers cannot be told.")
    _expose(plan, [place.value for place in found])
    with (out / MODEL).open("wb") as file:
        serialize_pte_binary(pte).write_to_file(file)
    names = map(str, range(1, len(found) + 1))
    return Exposed({p.module: (n, []) if p.at_input else (None, [n]) for p, n in zip(found, names, strict=True)})


def places(plan: ExecutionPlan, layers: Layers) -> Iterator[Place]:
    """Every value that passes between layers, in the order of the program."""
    projections = [name for name in layers.linears if name.endswith(PROJECTION)]
    attended: dict[int, str] = {}  # what attention found -> its layer's projection
    written: set[int] = set()
    width = 0
    ordered = delegates.puts_in_order(plan)
    for call in (instruction.instr_args for instruction in plan.chains[0].instructions):
        if not isinstance(call, KernelCall | DelegateCall):
            continue
        new = [index for index in call.args if index not in written and _is_computed(plan, index)]
        operator = plan.operators[call.op_index].name if isinstance(call, KernelCall) else ""
        if operator in delegates.EMBEDDINGS:
            width = plan.values[new[-1]].val.sizes[-1]
            if not ordered:
                yield Place(new[-1], layers.embedding, at_input=False)
        elif operator == delegates.ORDERS:
            yield Place(new[-1], layers.embedding, at_input=False)
        elif operator in ATTENTION and len(attended) < len(projections):
            projection = projections[len(attended)]
            attended[call.args[-1]] = projection
            yield Place(call.args[-1], projection, at_input=True)
        elif found := next((attended[index] for index in call.args if index in attended), None):
            passed = [index for index in new if plan.values[index].val.sizes[2:] == [width]]
            is_last = found == projections[-1]
            if len(passed) == 1:
                yield Place(passed[0], layers.head if is_last else found.partition(LAYER)[0], at_input=is_last)
        written.update(new)


def _is_computed(plan: ExecutionPlan, index: int) -> bool:
    """Whether a value is a tensor that the program writes: no constant, and no input."""
    value = plan.values[index].val
    return isinstance(value, TensorFact) and value.allocation_info is not None and index not in plan.inputs


def _expose(plan: ExecutionPlan, values: Sequence[int]) -> None:
    """Return these values after the result, of `TOKENS` tokens at most, in memory that nothing else is put in."""
    for index in values:
        value: Any = plan.values[index].val
        value.sizes = [1, TOKENS, *value.sizes[2:]]
        place, pool = value.allocation_info, value.allocation_info.memory_id
        begin = -(-plan.non_const_buffer_sizes[pool] // ALIGNMENT) * ALIGNMENT
        place.memory_offset_low, place.memory_offset_high = begin & 0xFFFFFFFF, begin >> 32
        plan.non_const_buffer_sizes[pool] = begin + 4 * math.prod(value.sizes)
    plan.outputs = [*plan.outputs, *values]
