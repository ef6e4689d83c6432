"""Write a copy of a .pte that also returns the values passed between its delegates.

ExecuTorch's event tracer is not compiled into the Python wheel. However, what delegates and attention pass on are
values of the program like its result, so a copy may return them as well; each gets its own memory, because the original
reuses it. The values are, for every layer, the output of attention (the input of o_proj) and the output of the layer,
and for the last layer the input of the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import Exposed
from qat_edge_exporters.executorch.compat import (
    DelegateCall,
    ExecutionPlan,
    KernelCall,
    SchemaTensor,
    serialize_pte_binary,
)
from qat_edge_exporters.executorch.pte import delegates
from qat_edge_exporters.executorch.pte.pte_reader import LAYERS, MODEL, MatrixNames, read_layers
from qat_edge_exporters.executorch.pte.runner_contract import FORWARD

ATTENTION = ("llama::custom_sdpa", "llama::custom_quantized_sdpa")
PROJECTION = ".o_proj"  # ends the name of the layer that takes attention's output
LAYER = ".self_attn"  # follows the name of a decoder layer
ALIGNMENT_BYTES = 64
MOST_TOKENS = 8  # of one call of the copy


@dataclass(frozen=True)
class ExposedValue:
    """A value of the program that the copy returns.

    Attributes:
        index: of the value in the program.
        module: name of the module it passes through.
        at_input: whether it is the module's input, or its output.
    """

    index: int
    module: str
    at_input: bool


def expose(folder: Path, out: Path) -> Exposed:
    """Write a copy of the program into the folder `out`, with intermediate values as outputs after the logits.

    Raises:
        ArtifactError: the .pte is damaged, or its attention is unknown, so that its layers cannot be identified.
    """
    pte, names = delegates.open_pte(folder / MODEL), read_layers(folder / LAYERS)
    plan = next(plan for plan in pte.program.execution_plan if plan.name == FORWARD)
    values = list(exposed_values(plan, names))
    if not any(value.at_input for value in values):
        raise ArtifactError(
            f"{folder / MODEL}: none of {', '.join(ATTENTION)} in it, so its layers cannot be identified."
        )

    # Changed in the parsed program, which is then serialized again.
    _return_values(plan, [value.index for value in values])
    with (out / MODEL).open("wb") as file:
        serialize_pte_binary(pte).write_to_file(file)

    # The logits are output 0.
    numbers = map(str, range(1, len(values) + 1))
    return Exposed({v.module: (n, []) if v.at_input else (None, [n]) for v, n in zip(values, numbers, strict=True)})


def exposed_values(plan: ExecutionPlan, names: MatrixNames) -> Iterator[ExposedValue]:
    """Yield every value that passes between layers, in the order of the program."""
    projections = [name for name in names.linears if name.endswith(PROJECTION)]
    attended: dict[int, str] = {}  # output of attention -> name of its layer's projection
    written: set[int] = set()
    width = 0  # of the hidden states
    reorders = delegates.reorders_columns(plan)

    for call in (instruction.instr_args for instruction in plan.chains[0].instructions):
        if not isinstance(call, KernelCall | DelegateCall):
            continue
        # Values that this call is the first to mention: its outputs.
        new = [index for index in call.args if index not in written and _is_computed(plan, index)]
        operator = plan.operators[call.op_index].name if isinstance(call, KernelCall) else ""
        projected = next((attended[index] for index in call.args if index in attended), None)

        # The embedding's output is what is looked up, or that with its columns in order.
        if operator in delegates.EMBEDDINGS:
            width = plan.values[new[-1]].val.sizes[-1]
            if not reorders:
                yield ExposedValue(new[-1], names.embedding, at_input=False)
        elif operator == delegates.REORDER:
            yield ExposedValue(new[-1], names.embedding, at_input=False)

        # The n-th attention belongs to the n-th projection.
        elif operator in ATTENTION and len(attended) < len(projections):
            projection = projections[len(attended)]
            attended[call.args[-1]] = projection
            yield ExposedValue(call.args[-1], projection, at_input=True)

        # A delegate that takes attention's output computes the rest of the layer, and passes one tensor of hidden
        # states on: the layer's output, or, after the last layer, the head's input.
        elif projected is not None:
            hidden = [index for index in new if plan.values[index].val.sizes[2:] == [width]]
            is_last = projected == projections[-1]
            if len(hidden) == 1:
                module = names.head if is_last else projected.partition(LAYER)[0]
                yield ExposedValue(hidden[0], module, at_input=is_last)
        written.update(new)


def _is_computed(plan: ExecutionPlan, index: int) -> bool:
    """Return whether a value is a tensor that the program writes: neither a constant nor an input."""
    value = plan.values[index].val
    return isinstance(value, SchemaTensor) and value.allocation_info is not None and index not in plan.inputs


def _return_values(plan: ExecutionPlan, indices: Sequence[int]) -> None:
    """Add values to the outputs, for `MOST_TOKENS` tokens at most, in memory that nothing else uses."""
    for index in indices:
        value: Any = plan.values[index].val
        value.sizes = [1, MOST_TOKENS, *value.sizes[2:]]

        # At the end of the value's memory pool, which grows by its float32 numbers.
        allocation, pool = value.allocation_info, value.allocation_info.memory_id
        begin = -(-plan.non_const_buffer_sizes[pool] // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        allocation.memory_offset_low, allocation.memory_offset_high = begin & 0xFFFFFFFF, begin >> 32
        plan.non_const_buffer_sizes[pool] = begin + 4 * math.prod(value.sizes)
    plan.outputs = [*plan.outputs, *indices]
