"""Codes and scales back out of programs for other backends than XNNPACK.

Vulkan's constants are read by the readers of XNNPACK's; CoreML's package through coremltools, whose own schema and
blob reader say what Apple's compiler will see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError, ExportError
from qat_edge_exporters.artifact import Artifact, ArtifactWeight
from qat_edge_exporters.executorch.backends import registry
from qat_edge_exporters.executorch.pte import delegates, pte_reader, runner_contract

DEQUANTIZE = "constexpr_blockwise_shift_scale"  # data (out, in), scale (out, groups)
CODES = {"INT4": 4, "INT8": 8}


def read_vulkan(folder: Path) -> Artifact:
    """Everything that an export folder with a Vulkan program holds.

    Raises:
        ArtifactError: the .pte or layers.json is missing or cannot be parsed.
    """
    artifact, layers = pte_reader.read(folder), pte_reader.read_layers(folder / pte_reader.LAYERS)
    linears = {name: _by_row(artifact.weights[name]) for name in layers.linears if name in artifact.weights}
    return replace(artifact, weights=artifact.weights | linears, floats=None)  # its layout of them is not ours


def _by_row(weight: ArtifactWeight) -> ArtifactWeight:
    """Vulkan keeps scales of int4 weights as (groups, out); int8 weights are XNNPACK's."""
    if weight.bits != 4:
        return weight
    out, groups = weight.scales.shape
    return replace(weight, scales=weight.scales.reshape(groups, out).T)


def read_coreml(folder: Path) -> Artifact:
    """Everything that an export folder with a CoreML program holds.

    Raises:
        ArtifactError: the .pte or layers.json is missing or cannot be parsed, or coremltools, which reads the
            package inside, is not installed.
    """
    path = folder / pte_reader.MODEL
    pte, layers = delegates.open_pte(path), pte_reader.read_layers(folder / pte_reader.LAYERS)
    try:
        registry.require_package(registry.BACKENDS["coreml"])
    except ExportError as error:
        raise ArtifactError(f"{path}: its codes cannot be read, nothing is proved. {error}") from error
    try:
        plans = {plan.name: plan for plan in pte.program.execution_plan}
        metadata = {name: pte_reader.constant(plan) for name, plan in plans.items() if name != runner_contract.FORWARD}
        forward = plans.get(runner_contract.FORWARD)
        packages = [] if forward is None else [b for i, b in delegates.blobs(pte, forward) if i == "CoreMLBackend"]
        stored = [matrix for package in packages for matrix in _matrices(package)]
    except delegates.DAMAGE as error:
        raise ArtifactError(f"{path}: damaged, its package cannot be parsed ({error}). Export again.") from error
    tables, linears = ([m for m in stored if m.is_table == table] for table in (True, False))
    faults = [
        f"{pte_reader.MODEL} has no method {name}, which runners ask for."
        for name in runner_contract.missing_methods(plans)
    ]
    names = [*layers.linears, layers.embedding]
    if (len(linears), len(tables)) != (len(layers.linears), 1):
        faults.append(
            f"{pte_reader.MODEL} holds {len(stored)} quantized matrices, {pte_reader.LAYERS} names {len(names)}."
        )
    named = dict(zip(names, [*linears, *tables], strict=False))
    weights = {name: matrix.weight for name, matrix in named.items()}
    return Artifact(weights, metadata, _sizes(folder, layers, named), faults)


@dataclass(frozen=True)
class _Matrix:
    """A weight of a CoreML program. place: of its codes in the package's weights, the same for what is stored once."""

    weight: ArtifactWeight
    place: int
    is_table: bool

    @property
    def sizes_bytes(self) -> tuple[int, int]:
        """Of codes and of scales."""
        return self.weight.codes.size * self.weight.bits // 8, self.weight.scales.nbytes


def _sizes(folder: Path, layers: pte_reader.Layers, named: dict[str, _Matrix]) -> dict[str, int]:
    """Bytes by part; a table that embedding and head share counts for the embedding."""
    sizes = pte_reader.sizes_by_part(folder, layers, {}, {}, 0)
    counted: set[int] = set()
    for name, matrix in [(layers.embedding, named.get(layers.embedding)), *named.items()]:
        if matrix is None or matrix.place in counted:
            continue
        counted.add(matrix.place)
        part = {layers.embedding: "embedding", layers.head: "head"}.get(name)
        for other, size in zip(("linears", "scales"), matrix.sizes_bytes, strict=True):
            sizes[part or other] += size
            sizes["graph"] -= size
    return sizes


def _matrices(package: bytes) -> Iterator[_Matrix]:
    """Weights that linear layers and embeddings of a CoreML program use, in the order it computes them."""
    with _opened(package) as (block, blob):
        made = {op.outputs[0].name: op for op in block.operations if op.type == DEQUANTIZE}
        for op in block.operations:
            argument = {"linear": "weight", "gather": "x"}.get(op.type)
            name = op.inputs[argument].arguments[0].name if argument else ""
            if name in made:
                data, scale = (made[name].inputs[part].arguments[0].value for part in ("data", "scale"))
                codes, bits = _array(data, blob)
                scales, _ = _array(scale, blob)
                weight = ArtifactWeight(codes.astype(np.int8), scales.astype(np.float32), bits)
                yield _Matrix(weight, data.blobFileValue.offset, op.type == "gather")


@contextmanager
def _opened(package: bytes) -> Iterator[tuple[Any, Any]]:
    """The program and the weights in the bytes of a CoreML delegate."""
    from coremltools.libmilstoragepython import _BlobStorageReader
    from coremltools.proto import Model_pb2
    from executorch.backends.apple.coreml import executorchcoreml

    with tempfile.TemporaryDirectory() as name:
        if not executorchcoreml.unflatten_directory_contents(package, name):
            raise ValueError("the delegate holds no CoreML package")
        model = Model_pb2.Model()
        model.ParseFromString(next(Path(name).rglob("*.mlmodel")).read_bytes())
        function = model.mlProgram.functions["main"]
        weights = next(Path(name).rglob("weight.bin"))
        yield function.block_specializations[function.opset], _BlobStorageReader(str(weights))


def _array(value: Any, blob: Any) -> tuple[NDArray[Any], int]:
    """A constant and the bits of its type; float32 where it is no integer."""
    from coremltools.proto import MIL_pb2

    kind = MIL_pb2.DataType.Name(value.type.tensorType.dataType)
    shape = [dimension.constant.size for dimension in value.type.tensorType.dimensions]
    if value.WhichOneof("value") != "blobFileValue":
        return np.array(value.immediateValue.tensor.floats.values, np.float32).reshape(shape), 32
    read = {"INT4": blob.read_int4_data, "INT8": blob.read_int8_data, "FLOAT32": blob.read_float_data}
    if kind not in read:
        raise ValueError(f"a weight in {kind}")
    return read[kind](value.blobFileValue.offset).reshape(shape), CODES.get(kind, 32)
