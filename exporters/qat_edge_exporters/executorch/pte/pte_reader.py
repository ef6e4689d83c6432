"""Codes and scales back out of a .pte, from its bytes alone, with what is wrong with them.

A constant's name in the file is the sha256 of its bytes. Which module a matrix belongs to follows from the order of
computation: layers.json lists the modules in that order, so two layers swapped come out under each other's names
and differ from the frozen checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from executorch.exir.schema import ExecutionPlan
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError
from qat_edge.models import tokenizer
from qat_edge_exporters.artifact import Artifact, ArtifactWeight
from qat_edge_exporters.executorch.pte import delegates, runner_contract, shared_table
from qat_edge_exporters.executorch.pte.delegates import Product

MODEL = "model.pte"
LAYERS = "layers.json"
NOT_COUNTED = ("manifest.json",)


@dataclass(frozen=True)
class Layers:
    """Module names as layers.json has them; `linears`, the rounded ones, in the order of computation, head included.

    float_bytes: of matrices that were exported in float, by part; empty where all were rounded.
    tables: an encoder's embeddings in the order of their use; empty for a program that generates text.
    """

    embedding: str
    head: str
    linears: list[str]
    float_bytes: dict[str, int] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)

    @property
    def embeddings(self) -> list[str]:
        return self.tables or [self.embedding]


def read(folder: Path) -> Artifact:
    """Everything that an executorch export folder holds.

    Raises:
        ArtifactError: the .pte or layers.json is missing or cannot be parsed.
    """
    path = folder / MODEL
    pte = delegates.open_pte(path)
    layers = read_layers(folder / LAYERS)
    try:
        plans = {plan.name: plan for plan in pte.program.execution_plan}
        metadata = {name: constant(plan) for name, plan in plans.items() if name != runner_contract.FORWARD}
        forward = plans.get(runner_contract.FORWARD)
        products = delegates.products(pte, forward) if forward else []
        tables = delegates.embedding_tables(pte, forward) if forward else []
        named, shared = delegates.constants(pte), shared_table.shared(path)
    except delegates.DAMAGE as error:
        raise ArtifactError(f"{path}: damaged, its graph cannot be parsed ({error}). Export again.") from error
    missing = runner_contract.missing_methods(
        plans, runner_contract.ENCODER if layers.tables else runner_contract.REQUIRED
    )
    faults = [f"{MODEL} has no method {name}, which runners ask for." for name in missing]
    faults += _count_faults(products, layers, len(tables))
    used = dict(zip(layers.linears, products, strict=False))
    faults += _hash_faults(named, used)
    weights, unreadable = _weights(used, named)
    for name, (shape, codes, scales) in zip(layers.embeddings, tables, strict=False):
        weights[name] = ArtifactWeight(_unpack(codes, shape), _unpack_scales(scales, shape), shape.bits)
    stored = {key: data for key, data in named.items() if key not in shared}
    sizes = sizes_by_part(folder, layers, used, stored, sum(len(c) + len(s) for _, c, s in tables))
    return Artifact(weights, metadata, sizes, faults + unreadable, frozenset(named))


def read_layers(path: Path) -> Layers:
    """The names of the matrices in a .pte, in the order in which it uses them.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    again = "Export again."
    if not path.is_file():
        raise ArtifactError(f"{path}: not there, so the matrices of {MODEL} have no names. {again}")
    try:
        found = Layers(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged ({error}). {again}") from error
    return found


def constant(plan: ExecutionPlan) -> Any:
    """What a constant method returns: a list where the runner reads one."""
    values: list[Any] = []
    for index in plan.outputs:
        value = plan.values[index].val
        values.append(next(iter(vars(value).values()), None))  # Int(int_val=...), Bool(bool_val=...), ...
    return values if len(values) != 1 or plan.name in runner_contract.LISTS else values[0]


def _count_faults(products: list[Product], layers: Layers, tables: int) -> list[str]:
    faults = []
    if len(products) != len(layers.linears):
        faults.append(
            f"{MODEL} computes {len(products)} quantized linear layers, {LAYERS} names {len(layers.linears)}."
        )
    if "embedding" not in layers.float_bytes:
        faults += [f"{name}: {MODEL} holds no quantized embedding." for name in layers.embeddings[tables:]]
    return faults


def _hash_faults(named: dict[str, bytes], used: dict[str, Product]) -> list[str]:
    """Constants whose bytes are not what their name says, and layers whose constants are not there."""
    owner = {p.codes_key: f"{name}: its codes" for name, p in used.items()}
    owner |= {p.scales_key: f"{name}: its scales" for name, p in used.items()}
    faults = [f"{owner[key]} are not in {MODEL}." for key in owner if key not in named]
    for key, data in named.items():
        wanted, found = key.removeprefix("scale_"), hashlib.sha256(data).hexdigest()
        if found != wanted:
            what = owner.get(key, "a float constant (norm, bias or rotation)")
            faults.append(f"{what} in {MODEL} were changed after export: sha256 {found[:12]}..., not {wanted[:12]}...")
    return faults


def _weights(used: dict[str, Product], named: dict[str, bytes]) -> tuple[dict[str, ArtifactWeight], list[str]]:
    weights, faults = {}, []
    for name, product in used.items():
        codes, scales = named.get(product.codes_key), named.get(product.scales_key)
        if codes is None or scales is None:
            continue
        try:
            weights[name] = ArtifactWeight(_unpack(codes, product), _unpack_scales(scales, product), product.bits)
        except ValueError as error:
            faults.append(f"{name}: {MODEL} holds a matrix of another shape than its graph says ({error}).")
    return weights, faults


def _unpack(data: bytes, product: Product) -> NDArray[np.int8]:
    """Codes (out, in): int8 as they are, int4 in pairs, low nibble first, each stored as code + 8."""
    if product.bits == 8:
        return np.frombuffer(data, np.int8).reshape(product.out, product.width)
    packed = np.frombuffer(data, np.uint8).reshape(product.out, product.width // 2)
    codes = np.empty((product.out, product.width), np.int8)
    codes[:, 0::2] = (packed & 15).astype(np.int8) - 8
    codes[:, 1::2] = (packed >> 4).astype(np.int8) - 8
    return codes


def _unpack_scales(data: bytes, product: Product) -> NDArray[np.float32]:
    """Scales (out, groups): XNNPACK keeps those of groups as bfloat16, the upper half of a float32."""
    if len(data) == 4 * product.out * product.groups:
        return np.frombuffer(data, np.float32).reshape(product.out, product.groups)
    wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(product.out, product.groups)


def sizes_by_part(
    folder: Path, layers: Layers, used: dict[str, Product], named: dict[str, bytes], embedding: int
) -> dict[str, int]:
    """Bytes by part; what the .pte holds beside the matrices, and the small files, are the graph.

    named: the delegates' constants, without those that are the program's: a shared table counts for the embedding.
    """
    parts = {"linears": 0, "scales": 0, "embedding": embedding, "head": 0}
    counted: set[str] = set()
    for name, product in used.items():
        for part, key in (("linears", product.codes_key), ("scales", product.scales_key)):
            if key not in counted:
                parts["head" if name == layers.head else part] += len(named.get(key, b""))
                counted.add(key)
    for part, size in layers.float_bytes.items():
        parts[part] = parts.get(part, 0) + size
    files = {p.name: p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix != ".log"}
    words = sum(size for name, size in files.items() if name in tokenizer.FILES)
    whole = sum(size for name, size in files.items() if name not in NOT_COUNTED)
    return {**parts, "graph": whole - words - sum(parts.values()), "tokenizer": words}
