"""Read codes and scales back out of programs for Vulkan and CoreML.

Vulkan's constants are read as XNNPACK's are; CoreML's package through coremltools, whose schema and blob reader are
those of Apple's compiler.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError, ExportError
from qat_edge_exporters.artifact import Artifact, ArtifactWeight
from qat_edge_exporters.executorch import compat
from qat_edge_exporters.executorch.backends import registry
from qat_edge_exporters.executorch.pte import delegates, program_check, pte_reader, runner_contract

DEQUANTIZE = "constexpr_blockwise_shift_scale"  # data (out, in), scale (out, groups)
# Operators of a CoreML program that use a weight, and the name of that input.
USES_WEIGHT = {"linear": "weight", "gather": "x"}
CODE_BITS = {"INT4": 4, "INT8": 8}


def read_vulkan(folder: Path) -> Artifact:
    """Read an export folder with a Vulkan program.

    Raises:
        ArtifactError: the .pte or layers.json is missing or cannot be parsed.
    """
    names = pte_reader.read_layers(folder / pte_reader.LAYERS)
    # int8 weights are XNNPACK's.
    artifact = pte_reader.read(folder, (delegates.VULKAN, delegates.XNNPACK))
    linears = {name: _scales_by_row(artifact.weights[name]) for name in names.linears if name in artifact.weights}
    # Vulkan stores float constants in a layout of its own, so their hashes mean nothing.
    return replace(artifact, weights=artifact.weights | linears, floats=None)


def _scales_by_row(weight: ArtifactWeight) -> ArtifactWeight:
    """Transpose the scales of int4 weights, which Vulkan stores as (groups, out); int8 weights are XNNPACK's."""
    if weight.bits != 4:
        return weight
    # The reader took the bytes for (out, groups).
    out, groups = weight.scales.shape
    return replace(weight, scales=weight.scales.reshape(groups, out).T)


def read_coreml(folder: Path) -> Artifact:
    """Read an export folder with a CoreML program.

    Raises:
        ArtifactError: the .pte or layers.json is missing or cannot be parsed, or coremltools, which reads the
            package inside, is not installed.
    """
    path = folder / pte_reader.MODEL
    # A damaged file is reported even if coremltools is not installed.
    pte, names = delegates.open_pte(path), pte_reader.read_layers(folder / pte_reader.LAYERS)
    try:
        registry.require_package(registry.BACKENDS["coreml"])
    except ExportError as error:
        raise ArtifactError(f"{path}: its codes cannot be read, so nothing is verified. {error}") from error

    # Weights of all delegates; there is one, unless CoreML left an operator out.
    try:
        plans = {plan.name: plan for plan in pte.program.execution_plan}
        metadata = pte_reader.constant_values(plans)
        forward = plans.get(runner_contract.FORWARD)
        blobs = [] if forward is None else delegates.delegate_blobs(pte, forward)
        packages = [blob.data for blob in blobs if blob.backend == registry.BACKENDS["coreml"].delegate]
        stored = [matrix for package in packages for matrix in _matrices(package)]
    except delegates.PARSE_ERRORS as error:
        raise ArtifactError(f"{path}: damaged, its package cannot be parsed ({error}). Export again.") from error

    # Linear layers in the order of computation, as layers.json names them, then the embedding.
    tables, linears = ([m for m in stored if m.is_table == is_table] for is_table in (True, False))
    faults = pte_reader.method_faults(list(plans))
    coreml = (registry.BACKENDS["coreml"].delegate,)
    faults += [f"{pte_reader.MODEL}: {fault}" for fault in program_check.program_faults(plans, [], coreml)]
    expected = [*names.linears, names.embedding]
    if (len(linears), len(tables)) != (len(names.linears), 1):
        faults.append(
            f"{pte_reader.MODEL} holds {len(stored)} quantized matrices, {pte_reader.LAYERS} names {len(expected)}."
        )
    named = dict(zip(expected, [*linears, *tables], strict=False))
    weights = {name: matrix.weight for name, matrix in named.items()}
    return Artifact(weights, metadata, _sizes(folder, names, named), faults)


@dataclass(frozen=True)
class _CoreMLMatrix:
    """A weight of a CoreML program.

    Attributes:
        weight: codes and scales.
        offset: of its codes in the package's weights; equal for two matrices that are stored once.
        is_table: whether rows of it are looked up.
    """

    weight: ArtifactWeight
    offset: int
    is_table: bool

    @property
    def code_bytes(self) -> int:
        """Bytes of its codes in the file."""
        return self.weight.codes.size * self.weight.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of its scales in the file."""
        return self.weight.scales.nbytes


def _sizes(folder: Path, names: pte_reader.MatrixNames, named: dict[str, _CoreMLMatrix]) -> dict[str, int]:
    """Return bytes by part; a table that embedding and head share is the embedding's."""
    sizes = pte_reader.sizes_by_part(folder, names, {}, {}, 0)
    counted: set[int] = set()
    # The embedding first, so that it is counted before the head.
    for name in (names.embedding, *named):
        matrix = named.get(name)
        if matrix is None or matrix.offset in counted:
            continue
        counted.add(matrix.offset)
        table = {names.embedding: "embedding", names.head: "head"}.get(name)
        for part, size in (("linears", matrix.code_bytes), ("scales", matrix.scale_bytes)):
            sizes[table or part] += size
            sizes["graph"] -= size
    return sizes


def _matrices(package: bytes) -> Iterator[_CoreMLMatrix]:
    """Yield the weights of a CoreML program's linear layers and embeddings, in the order of computation."""
    with _opened(package) as program:
        # Weights by the name of the value that dequantizes them.
        dequantized = {op.outputs[0].name: op for op in program.block.operations if op.type == DEQUANTIZE}
        for op in program.block.operations:
            argument = USES_WEIGHT.get(op.type)
            source = dequantized.get(op.inputs[argument].arguments[0].name) if argument else None
            if source is None:
                continue
            # A head that shares the embedding's table refers to the same offset.
            data, scale = (source.inputs[part].arguments[0].value for part in ("data", "scale"))
            codes, scales = _read_constant(data, program.weights), _read_constant(scale, program.weights)
            weight = ArtifactWeight(codes.array.astype(np.int8), scales.array.astype(np.float32), codes.bits)
            yield _CoreMLMatrix(weight, data.blobFileValue.offset, op.type == "gather")


class _CoreMLProgram(NamedTuple):
    """The main function's block, a protobuf message, and the reader of the package's weights."""

    block: Any
    weights: Any


@contextmanager
def _opened(package: bytes) -> Iterator[_CoreMLProgram]:
    """Unpack and parse the bytes of a CoreML delegate."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not compat.unpack_coreml_package(package, folder):
            raise ValueError("the delegate holds no CoreML package")
        model = compat.parse_coreml_model(next(folder.rglob("*.mlmodel")).read_bytes())
        function = model.mlProgram.functions["main"]
        weights = compat.open_coreml_weights(next(folder.rglob("weight.bin")))
        yield _CoreMLProgram(function.block_specializations[function.opset], weights)


class _Constant(NamedTuple):
    """A constant of a CoreML program, and the bits of its type."""

    array: NDArray[Any]
    bits: int


def _read_constant(value: Any, weights: Any) -> _Constant:
    """Read a constant of the types INT4, INT8 or FLOAT32.

    Args:
        value: the protobuf message.
        weights: reader of the package's weights.
    """
    kind = compat.read_coreml_type(value.type.tensorType.dataType)
    shape = [dimension.constant.size for dimension in value.type.tensorType.dimensions]
    # A small constant is in the message itself.
    if value.WhichOneof("value") != "blobFileValue":
        return _Constant(np.array(value.immediateValue.tensor.floats.values, np.float32).reshape(shape), 32)

    readers = {"INT4": weights.read_int4_data, "INT8": weights.read_int8_data, "FLOAT32": weights.read_float_data}
    if kind not in readers:
        raise ValueError(f"a weight in {kind}")
    return _Constant(readers[kind](value.blobFileValue.offset).reshape(shape), CODE_BITS.get(kind, 32))
