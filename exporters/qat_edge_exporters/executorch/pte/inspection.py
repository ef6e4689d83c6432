"""Bytes of a .pte -> what is in it: methods, constant methods, operators, delegates, sizes.

Nothing is executed; `probe.py` loads the file for real.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from executorch.exir._serialize._program import PTEFile
from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import DelegateCall, ExecutionPlan, KernelCall
from executorch.exir.schema import Tensor as TensorFact
from executorch.exir.tensor import TensorShapeDynamism

from qat_edge.errors import ArtifactError
from qat_edge_exporters.executorch.pte import delegates, runner_contract, shared_table
from qat_edge_exporters.executorch.pte.delegates import Product
from qat_edge_exporters.executorch.pte.program_info import Cache, Method, Port, Program
from qat_edge_exporters.executorch.pte.pte_reader import constant

DTYPES = {  # by torch's names, where they are not the schema's in lower case
    ScalarType.BYTE: "uint8", ScalarType.CHAR: "int8", ScalarType.SHORT: "int16", ScalarType.INT: "int32",
    ScalarType.LONG: "int64", ScalarType.HALF: "float16", ScalarType.FLOAT: "float32", ScalarType.DOUBLE: "float64",
}  # fmt: skip
WRITES = {"llama::update_cache": 1, "aten::index_put_": 0}  # which argument of an operator is the cache it writes into


def inspect(path: Path) -> Program:
    """What the .pte at `path` says about itself.

    Raises:
        ArtifactError: missing, cut short, no .pte, one of another format, or damaged.
    """
    pte = delegates.open_pte(path)
    try:
        return _program(pte, path.stat().st_size, shared_table.shared(path))
    except delegates.DAMAGE as error:
        raise ArtifactError(
            f"{path}: damaged, its graph cannot be parsed ({error}). Export or copy it again."
        ) from error


def _program(pte: PTEFile, size_bytes: int, shared: set[str]) -> Program:
    """shared: names of the delegates' constants that are the program's own."""
    computing, constants = [], {}
    for plan in pte.program.execution_plan:
        if plan.inputs or any(chain.instructions for chain in plan.chains):
            computing.append(plan)
        else:
            constants[plan.name] = constant(plan)
    graphs = [graph for plan in computing for graph in delegates.graphs(pte, plan)]
    forward = next((plan for plan in computing if plan.name == "forward"), None)
    tables = [] if forward is None else delegates.embedding_tables(pte, forward)
    products = [product for graph in graphs for product in delegates.products_of(graph)]
    methods = [_method(plan) for plan in computing]
    named = delegates.constants(pte)
    stored = {key: data for key, data in named.items() if key not in shared}
    # An embedding is as wide as many layers; which of an encoder's is its head, its program does not say.
    generates = not set(runner_contract.ENCODER) <= constants.keys()
    width = methods[0].outputs[0].shape[-1:] if generates and methods and methods[0].outputs else ()
    return Program(
        methods=methods,
        constants=constants,
        operators=dict(Counter(name for plan in computing for name in _kernels(plan)).most_common()),
        delegates=dict(Counter(name for plan in computing for name in _delegates(plan)).most_common()),
        nodes=sum(len(graph["xnodes"]) for graph in graphs),
        size_bytes=_sizes(pte, products, stored, sum(len(c) + len(s) for _, c, s in tables), width, size_bytes),
        shared_bytes=sum(len(named[key]) for key in shared),
        memory_bytes=sum(sum(plan.non_const_buffer_sizes) for plan in computing),
        cache=None if forward is None else _cache(forward),
    )


def _method(plan: ExecutionPlan) -> Method:
    inputs, outputs = (tuple(_port(plan.values[i].val) for i in ports) for ports in (plan.inputs, plan.outputs))
    return Method(plan.name, inputs, outputs)


def _port(value: Any) -> Port:
    if not isinstance(value, TensorFact):
        return Port(type(value).__name__.lower())
    dtype = DTYPES.get(value.scalar_type, value.scalar_type.name.lower())
    return Port(dtype, tuple(value.sizes), value.shape_dynamism != TensorShapeDynamism.STATIC)


def _kernels(plan: ExecutionPlan) -> list[str]:
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    used = [plan.operators[call.op_index] for call in calls if isinstance(call, KernelCall)]
    return [f"{op.name}.{op.overload}" if op.overload else op.name for op in used]


def _cache(plan: ExecutionPlan) -> Cache | None:
    """The tensors that keys and values are written into."""
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    written = {
        call.args[WRITES[plan.operators[call.op_index].name]]
        for call in calls
        if isinstance(call, KernelCall) and plan.operators[call.op_index].name in WRITES
    }
    tensors = [plan.values[index].val for index in written]
    if not tensors:
        return None
    largest = max(tensors, key=lambda t: prod(t.sizes))
    size_bytes = sum(prod(t.sizes) * getattr(torch, DTYPES[t.scalar_type]).itemsize for t in tensors)
    return Cache(DTYPES[largest.scalar_type], size_bytes)


def _delegates(plan: ExecutionPlan) -> list[str]:
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    return [plan.delegates[call.delegate_index].id for call in calls if isinstance(call, DelegateCall)]


def _sizes(
    pte: PTEFile, products: list[Product], named: dict[str, bytes], embedding: int, width: tuple[int, ...], whole: int
) -> dict[str, int]:
    """Bytes by part. The head is the last matrix, where it has as many rows as the output is wide.

    named: the delegates' constants that are not the program's as well.
    """
    parts = {"embedding": embedding, "head": 0, "linears": 0, "scales": 0}
    head = products[-1] if products and (products[-1].out,) == width else None
    counted: set[str] = set()
    for product in reversed(products):
        for part, key in (("linears", product.codes_key), ("scales", product.scales_key)):
            if key not in counted:
                parts["head" if product is head else part] += len(named.get(key, b""))
                counted.add(key)
    parts["other constants"] = sum(len(data) for key, data in named.items() if key not in counted)
    parts["other constants"] += sum(len(b.storage) for b in pte.program.constant_buffer) - embedding
    return {**parts, "program": whole - sum(parts.values())}
