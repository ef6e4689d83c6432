"""Read codes and scales back out of a .pte, from its bytes alone, and list what is wrong with them.

A constant's name in the file is the sha256 of its bytes. The module that a matrix belongs to follows from the order of
computation: layers.json lists the modules in that order, so two swapped layers are returned under each other's names
and differ from the frozen checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.field_types import check_types
from qat_edge.models import tokenizer
from qat_edge.quant.packing import unpack_int4
from qat_edge_exporters.artifact import Artifact, ArtifactWeight, FloatConstant
from qat_edge_exporters.executorch.compat import ExecutionPlan
from qat_edge_exporters.executorch.pte import delegates, program_check, runner_contract, shared_table
from qat_edge_exporters.executorch.pte.delegates import EmbeddingTable, MatrixProduct

MODEL = "model.pte"
LAYERS = "layers.json"
NOT_COUNTED = ("manifest.json",)


@dataclass(frozen=True)
class MatrixNames:
    """Module names of a .pte's matrices. The fields are the keys of layers.json.

    Attributes:
        embedding: of the token embedding.
        head: of the output head.
        linears: frozen linear layers in the order of computation, head included. Layers that are computed as one
            product have one name.
        float_bytes: bytes of matrices that were exported in float, by part; empty if all were frozen.
        tables: an encoder's embeddings in the order of their use; empty for a program that generates text.
        fused: rows of each layer of such a product, from above, by the product's name and the layer's.
    """

    embedding: str
    head: str
    linears: list[str]
    float_bytes: dict[str, int] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    fused: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def embeddings(self) -> list[str]:
        """Names of all embeddings, in the order of their use."""
        return self.tables or [self.embedding]


@dataclass(frozen=True)
class _PteContents:
    """Parts of the parsed file that the reader uses.

    Attributes:
        methods: names of all methods.
        metadata: values of the constant methods.
        products: quantized matrix products in the order of computation.
        tables: quantized embeddings in the order of their use.
        named: the delegates' constants by name.
        shared: names of those that are the program's constants as well.
        floats: float32 constants of operators outside delegates, without those of embeddings.
        faults: sentences about what the exporter does not write.
    """

    methods: list[str]
    metadata: dict[str, Any]
    products: list[MatrixProduct]
    tables: list[EmbeddingTable]
    named: dict[str, bytes]
    shared: set[str]
    floats: list[FloatConstant]
    faults: list[str]


def read(folder: Path, backends: Collection[str] = (delegates.XNNPACK,)) -> Artifact:
    """Read an executorch export folder.

    Args:
        folder: the export folder.
        backends: names of the delegates that the target has.

    Raises:
        ArtifactError: the .pte or layers.json is missing or cannot be parsed.
    """
    contents = _read_contents(folder / MODEL, backends)
    names = read_layers(folder / LAYERS)
    required = runner_contract.ENCODER if names.tables else runner_contract.REQUIRED

    # What callers need, and as many matrices as layers.json has names for.
    faults = method_faults(contents.methods, required)
    faults += _count_faults(contents.products, names, len(contents.tables)) + contents.faults

    # The n-th product belongs to the n-th name.
    used = dict(zip(names.linears, contents.products, strict=False))
    faults += _hash_faults(contents.named, used)
    products, shape_faults = _weights(used, contents.named)
    weights, split_faults = _split(products, names.fused)

    # Embeddings are constants of the program itself, so they have no hash in their name.
    for name, table in zip(names.embeddings, contents.tables, strict=False):
        codes, scales = _unpack(table.codes, table.shape), _unpack_scales(table.scales, table.shape)
        weights[name] = ArtifactWeight(codes, scales, table.shape.bits)

    # A shared table is in the file once, as the embedding.
    stored = {key: data for key, data in contents.named.items() if key not in contents.shared}
    sizes = sizes_by_part(folder, names, used, stored, sum(table.size_bytes for table in contents.tables))
    floats = [*_float_constants(contents, used, names.fused), *contents.floats]
    return Artifact(weights, contents.metadata, sizes, faults + shape_faults + split_faults, floats)


def _float_constants(
    contents: _PteContents, used: dict[str, MatrixProduct], fused: dict[str, dict[str, int]]
) -> list[FloatConstant]:
    """Return the delegates' constants that no quantized matrix uses; their names do not tell what they are.

    The bias of a fused product is split into those of its layers.
    """
    taken = {key for product in contents.products for key in (product.codes_key, product.scales_key)}
    named = {key: np.frombuffer(data, np.float32) for key, data in contents.named.items() if len(data) % 4 == 0}
    found = []
    for title, product in used.items():
        if title in fused and product.bias_key in named:
            parts = _by_layer(named[product.bias_key], fused[title])
            found += [FloatConstant(name, part, f"{name}.bias") for name, part in parts.items()]
            taken.add(product.bias_key)
    return found + [FloatConstant(key, values) for key, values in named.items() if key not in taken]


def _read_contents(path: Path, backends: Collection[str]) -> _PteContents:
    pte = delegates.open_pte(path)
    try:
        plans = {plan.name: plan for plan in pte.program.execution_plan}
        forward = plans.get(runner_contract.FORWARD)
        graphs = delegates.delegate_graphs(pte, forward) if forward else []
        return _PteContents(
            methods=list(plans),
            metadata=constant_values(plans),
            products=[product for graph in graphs for product in delegates.graph_products(graph)],
            tables=delegates.embedding_tables(pte, forward) if forward else [],
            named=delegates.named_constants(pte),
            shared=shared_table.shared(path),
            floats=delegates.float_constants(pte, forward) if forward else [],
            faults=[f"{MODEL}: {fault}" for fault in program_check.program_faults(plans, graphs, backends)],
        )
    except delegates.PARSE_ERRORS as error:
        raise ArtifactError(f"{path}: damaged, its graph cannot be parsed ({error}). Export again.") from error


def read_layers(path: Path) -> MatrixNames:
    """Read layers.json.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: not there, so the matrices of {MODEL} have no names. Export again.")
    try:
        names = MatrixNames(**readers.read_object(path, ArtifactError))
        check_types(names, MatrixNames, path.name, lambda *_: None)
        return names
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged ({error}). Export again.") from error


def constant_values(plans: Mapping[str, ExecutionPlan]) -> dict[str, Any]:
    """Return the values of all methods except forward."""
    return {name: constant(plan) for name, plan in plans.items() if name != runner_contract.FORWARD}


def constant(plan: ExecutionPlan) -> Any:
    """Return the value of a constant method: a list if the runner reads one, and None for an empty value."""
    values: list[Any] = []
    for index in plan.outputs:
        # A dataclass with one field: Int(int_val=...), Bool(bool_val=...), ...
        value = plan.values[index].val
        values.append(next(iter(vars(value).values()), None))
    return values if len(values) != 1 or plan.name in runner_contract.LISTS else values[0]


def method_faults(methods: Sequence[str], required: Sequence[str] = runner_contract.REQUIRED) -> list[str]:
    """Return a fault for each method that callers need and the program lacks."""
    missing = runner_contract.missing_methods(methods, required)
    return [f"{MODEL} has no method {name}, which runners look for." for name in missing]


def _count_faults(products: list[MatrixProduct], names: MatrixNames, tables: int) -> list[str]:
    faults = []
    if len(products) != len(names.linears):
        faults.append(
            f"{MODEL} computes {len(products)} quantized matrix products, {LAYERS} names {len(names.linears)}."
        )
    if "embedding" not in names.float_bytes:
        faults += [f"{name}: {MODEL} holds no quantized embedding." for name in names.embeddings[tables:]]
    return faults


def _hash_faults(named: dict[str, bytes], used: dict[str, MatrixProduct]) -> list[str]:
    """Return faults of constants whose bytes have another hash than their name, and of layers that lack constants."""
    # By key: the layer whose codes or scales it should be.
    owner = {p.codes_key: f"{name}: its codes" for name, p in used.items()}
    owner |= {p.scales_key: f"{name}: its scales" for name, p in used.items()}
    faults = [f"{owner[key]} are not in {MODEL}." for key in owner if key not in named]

    for key, data in named.items():
        # XNNPACK prefixes the names of scales.
        expected, found = key.removeprefix("scale_"), hashlib.sha256(data).hexdigest()
        if found != expected:
            what = owner.get(key, "a float constant (norm, bias or rotation)")
            faults.append(
                f"{what} in {MODEL} were changed after export: sha256 {found[:12]}..., not {expected[:12]}..."
            )
    return faults


def _weights(used: dict[str, MatrixProduct], named: dict[str, bytes]) -> tuple[dict[str, ArtifactWeight], list[str]]:
    """Unpack the weights of all products; return them, and faults of those that cannot be unpacked."""
    weights, faults = {}, []
    for name, product in used.items():
        codes, scales = named.get(product.codes_key), named.get(product.scales_key)
        if codes is None or scales is None:
            continue  # a fault of its own
        try:
            weights[name] = ArtifactWeight(_unpack(codes, product), _unpack_scales(scales, product), product.bits)
        except ValueError as error:
            faults.append(f"{name}: the matrix in {MODEL} has another shape than its graph says ({error}).")
    return weights, faults


def _split(
    products: dict[str, ArtifactWeight], fused: dict[str, dict[str, int]]
) -> tuple[dict[str, ArtifactWeight], list[str]]:
    """Split the weights of fused products into those of their layers; return all weights, and faults."""
    weights: dict[str, ArtifactWeight] = {}
    faults = []
    for title, weight in products.items():
        rows = fused.get(title, {title: len(weight.codes)})
        if sum(rows.values()) != len(weight.codes):
            faults.append(f"{title}: {MODEL} has {len(weight.codes)} rows of it, {LAYERS} has {sum(rows.values())}.")
            continue
        codes, scales = _by_layer(weight.codes, rows), _by_layer(weight.scales, rows)
        weights |= {name: ArtifactWeight(codes[name], scales[name], weight.bits) for name in rows}
    return weights, faults


def _by_layer(values: NDArray[Any], rows: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Split the rows of a product into those of its layers."""
    return dict(zip(rows, np.split(values, list(accumulate(rows.values()))[:-1]), strict=True))


def _unpack(data: bytes, product: MatrixProduct) -> NDArray[np.int8]:
    """Return codes (out, in)."""
    if product.bits == 8:
        return np.frombuffer(data, np.int8).reshape(product.out, product.width)
    return unpack_int4(np.frombuffer(data, np.uint8).reshape(product.out, product.width // 2))


def _unpack_scales(data: bytes, product: MatrixProduct) -> NDArray[np.float32]:
    """Return scales (out, groups). XNNPACK keeps those of groups as bfloat16, the upper half of a float32."""
    # The graph does not give their type, but their length does.
    if len(data) == 4 * product.out * product.groups:
        return np.frombuffer(data, np.float32).reshape(product.out, product.groups)
    wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(product.out, product.groups)


def sizes_by_part(
    folder: Path,
    names: MatrixNames,
    used: dict[str, MatrixProduct],
    stored: dict[str, bytes],
    embedding_bytes: int,
) -> dict[str, int]:
    """Return bytes by part of an export folder.

    Args:
        folder: the export folder. Its small files, and everything in the .pte except the matrices, are the "graph".
        names: of the matrices.
        used: products by module name.
        stored: the delegates' constants, without those that are the program's: a shared table is the embedding's.
        embedding_bytes: of all embeddings in the program.
    """
    parts = {"linears": 0, "scales": 0, "embedding": embedding_bytes, "head": 0}

    # Two layers with equal bytes share one constant.
    counted: set[str] = set()
    for name, product in used.items():
        for part, key in (("linears", product.codes_key), ("scales", product.scales_key)):
            if key not in counted:
                parts["head" if name == names.head else part] += len(stored.get(key, b""))
                counted.add(key)
    for part, size in names.float_bytes.items():
        parts[part] = parts.get(part, 0) + size

    # The graph is the remainder, so that all parts sum to the folder.
    files = {p.name: p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix != ".log"}
    tokenizer_bytes = sum(size for name, size in files.items() if name in tokenizer.TOKENIZER_FILES)
    whole = sum(size for name, size in files.items() if name not in NOT_COUNTED)
    return {**parts, "graph": whole - tokenizer_bytes - sum(parts.values()), "tokenizer": tokenizer_bytes}
