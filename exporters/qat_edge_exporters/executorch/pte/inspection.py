"""List the contents of a .pte from its bytes: methods, constant methods, operators, delegates, sizes.

Nothing is executed; `runtime_probe.py` loads the file.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch

from qat_edge.errors import ArtifactError
from qat_edge_exporters.executorch.compat import (
    ExecutionPlan,
    KernelCall,
    PTEFile,
    ScalarType,
    SchemaTensor,
    TensorShapeDynamism,
)
from qat_edge_exporters.executorch.pte import delegates, runner_contract, shared_table
from qat_edge_exporters.executorch.pte.delegates import MatrixProduct
from qat_edge_exporters.executorch.pte.program_info import CacheInfo, MethodInfo, ProgramInfo, TensorInfo
from qat_edge_exporters.executorch.pte.pte_reader import constant

DTYPES = {  # names in torch that are not the schema's in lower case
    ScalarType.BYTE: "uint8", ScalarType.CHAR: "int8", ScalarType.SHORT: "int16", ScalarType.INT: "int32",
    ScalarType.LONG: "int64", ScalarType.HALF: "float16", ScalarType.FLOAT: "float32", ScalarType.DOUBLE: "float64",
}  # fmt: skip
# Operators that write into a cache, and which argument of each that is.
UPDATE, INDEX_PUT = "llama::update_cache", "aten::index_put_"
CACHE_WRITES = {UPDATE: 1, INDEX_PUT: 0}


def inspect(path: Path) -> ProgramInfo:
    """Return the contents of the .pte at `path`.

    Raises:
        ArtifactError: missing, truncated, damaged, or not a .pte of this format.
    """
    pte = delegates.open_pte(path)
    try:
        return _program_info(pte, path.stat().st_size, shared_table.shared(path))
    except delegates.PARSE_ERRORS as error:
        raise ArtifactError(
            f"{path}: damaged, its graph cannot be parsed ({error}). Export or copy it again."
        ) from error


def _program_info(pte: PTEFile, file_bytes: int, shared: set[str]) -> ProgramInfo:
    """Collect the contents; shared: names of the delegates' constants that are the program's own."""
    # A constant method has no inputs, and runs nothing.
    computing, constants = [], {}
    for plan in pte.program.execution_plan:
        if plan.inputs or any(chain.instructions for chain in plan.chains):
            computing.append(plan)
        else:
            constants[plan.name] = constant(plan)

    # Parsed once: flatc takes most of the time.
    graphs = [graph for plan in computing for graph in delegates.delegate_graphs(pte, plan)]
    forward = next((plan for plan in computing if plan.name == "forward"), None)
    methods = [_method_info(plan) for plan in computing]
    return ProgramInfo(
        methods=methods,
        constants=constants,
        operators=dict(Counter(name for plan in computing for name in _operator_names(plan)).most_common()),
        delegates=dict(Counter(name for plan in computing for name in _backend_names(plan)).most_common()),
        nodes=sum(len(graph["xnodes"]) for graph in graphs),
        size_bytes=_sizes(pte, graphs, shared, _head_rows(methods, constants), file_bytes),
        shared_bytes=sum(len(data) for key, data in delegates.named_constants(pte).items() if key in shared),
        memory_bytes=sum(sum(plan.non_const_buffer_sizes) for plan in computing),
        cache=None if forward is None else cache_info(forward),
    )


def _method_info(plan: ExecutionPlan) -> MethodInfo:
    inputs, outputs = (tuple(_tensor_info(plan.values[i].val) for i in ids) for ids in (plan.inputs, plan.outputs))
    return MethodInfo(plan.name, inputs, outputs)


def _tensor_info(value: Any) -> TensorInfo:
    if not isinstance(value, SchemaTensor):
        return TensorInfo(type(value).__name__.lower())
    dtype = DTYPES.get(value.scalar_type, value.scalar_type.name.lower())
    return TensorInfo(dtype, tuple(value.sizes), value.shape_dynamism != TensorShapeDynamism.STATIC)


def _operator_names(plan: ExecutionPlan) -> list[str]:
    used = [plan.operators[call.op_index] for call in delegates.kernel_calls(plan)]
    return [f"{op.name}.{op.overload}" if op.overload else op.name for op in used]


def _backend_names(plan: ExecutionPlan) -> list[str]:
    return [plan.delegates[call.delegate_index].id for call in delegates.delegate_calls(plan)]


def cache_info(plan: ExecutionPlan) -> CacheInfo | None:
    """Describe the tensors that keys and values are written into; None where a program has none outside delegates."""
    # By tensor: keys and values may be written by more than one call.
    written: dict[int, int] = {}
    for call in delegates.kernel_calls(plan):
        argument = CACHE_WRITES.get(plan.operators[call.op_index].name)
        if argument is not None:
            written[call.args[argument]] = _token_dimension(plan, call)
    tensors = [plan.values[index].val for index in written]
    if not tensors:
        return None
    tokens = min(tensor.sizes[dimension] for tensor, dimension in zip(tensors, written.values(), strict=True))

    # Scales and zero points are smaller than the keys and values they belong to.
    largest = max(tensors, key=lambda t: prod(t.sizes))
    size_bytes = sum(prod(t.sizes) * getattr(torch, DTYPES[t.scalar_type]).itemsize for t in tensors)
    return CacheInfo(DTYPES[largest.scalar_type], size_bytes, tokens)


def _token_dimension(plan: ExecutionPlan, call: KernelCall) -> int:
    """Return the dimension of a cache that has an entry for each token."""
    if plan.operators[call.op_index].name == UPDATE:
        return 1  # (1, tokens, heads, channels)
    # index_put_ takes an index for each dimension, and -1 for those that are written as a whole.
    indices = plan.values[call.args[1]].val.items
    return next(dimension for dimension, index in enumerate(indices) if index >= 0)


def _head_rows(methods: list[MethodInfo], constants: dict[str, Any]) -> int | None:
    """Return the rows of the head; None for an encoder, whose program does not show which layer is its head."""
    generates = not set(runner_contract.ENCODER) <= constants.keys()
    shape = methods[0].outputs[0].shape if generates and methods and methods[0].outputs else ()
    return shape[-1] if shape else None


def _sizes(
    pte: PTEFile, graphs: list[dict[str, Any]], shared: set[str], head_rows: int | None, file_bytes: int
) -> dict[str, int]:
    """Return bytes by part. The head is the last matrix, if it has as many rows as the output is wide."""
    forward = next((plan for plan in pte.program.execution_plan if plan.name == "forward"), None)
    tables = [] if forward is None else delegates.embedding_tables(pte, forward)
    embedding_bytes = sum(table.size_bytes for table in tables)
    stored = {key: data for key, data in delegates.named_constants(pte).items() if key not in shared}
    products: list[MatrixProduct] = [product for graph in graphs for product in delegates.graph_products(graph)]
    head = products[-1] if products and products[-1].out == head_rows else None

    # Backwards, so that constants that the head shares with a layer are the head's.
    parts = {"embedding": embedding_bytes, "head": 0, "linears": 0, "scales": 0}
    counted: set[str] = set()
    for product in reversed(products):
        for part, key in (("linears", product.codes_key), ("scales", product.scales_key)):
            if key not in counted:
                parts["head" if product is head else part] += len(stored.get(key, b""))
                counted.add(key)

    # Norms, biases and rotary frequencies, in delegates and in the program.
    parts["other constants"] = sum(len(data) for key, data in stored.items() if key not in counted)
    parts["other constants"] += sum(len(b.storage) for b in pte.program.constant_buffer) - embedding_bytes
    return {**parts, "program": file_bytes - sum(parts.values())}
