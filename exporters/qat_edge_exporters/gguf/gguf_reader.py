"""Read codes, scales and float tensors back from the bytes of a GGUF file, without llama.cpp.

Rows of queries and keys are returned in the order of transformers. A table that embedding and head share is returned
under both names; its bytes count once, as the embedding's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.manifest import MANIFEST
from qat_edge.models import tokenizer
from qat_edge_exporters.artifact import Artifact, ArtifactWeight, FloatConstant, HeldOption
from qat_edge_exporters.gguf import gguf_blocks, gguf_file
from qat_edge_exporters.gguf.gguf_families import (
    EMBEDDING,
    HEAD,
    Family,
    family_of_architecture,
    module_names,
    row_order,
)
from qat_edge_exporters.gguf.gguf_file import AGAIN, ARCHITECTURE, MODEL_FILE, GgufContents, StoredTensor
from qat_edge_exporters.gguf.vocabulary import END_KEYS

MOST_LAYERS = 1024  # of a model; the table of names grows with them
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # without which qat-edge cannot tokenize text


@dataclass(frozen=True)
class _Layout:
    """Structure that a file's metadata describes: its family, and transformers' module by llama.cpp's name."""

    family: Family
    modules: dict[str, str]
    metadata: dict[str, Any]


def read(folder: Path) -> Artifact:
    """Read everything in a folder with a GGUF file.

    Raises:
        ArtifactError: the file is missing, truncated or garbled, or of an architecture that exports do not have.
    """
    path = folder / MODEL_FILE
    contents = gguf_file.read(path)
    layout = _layout(path, contents)

    weights: dict[str, ArtifactWeight] = {}
    floats: list[FloatConstant] = []
    faults: list[str] = []
    for name, stored in contents.tensors.items():
        stem, _, kind = name.rpartition(".")
        module = layout.modules.get(stem, "")
        if stored.block is None:
            floats.append(_constant(path, layout, stored, module, kind))
        elif module and kind == "weight":
            weights[module] = _weight(path, layout, stored, module)
        else:
            faults.append(f"{MODEL_FILE}: the tensor {readers.shorten(name)} is none of llama.cpp's graph.")
    if EMBEDDING in weights and HEAD not in weights:
        # The head rounds its input, the embedding has none.
        weights[HEAD] = replace(weights[EMBEDDING], block=gguf_blocks.WIDTH)
    faults += [
        f"{name}: missing, so the text cannot be tokenized."
        for name in TOKENIZER_FILES
        if not (folder / name).is_file()
    ]
    return Artifact(weights, _metadata(contents, layout.family), _sizes(folder, contents), faults, floats)


def check_folder(folder: Path) -> None:
    """Refuse a file before llama.cpp gets it.

    Raises:
        ArtifactError: it cannot be read, or names other files, which llama.cpp would load as well.
    """
    path = folder / MODEL_FILE
    parts = sorted(key for key in gguf_file.read(path).metadata if key.startswith("split."))
    if parts:
        raise ArtifactError(f"{path}: {readers.shorten(parts[0])} says that there are further files. {AGAIN}")


def held_options(folder: Path) -> list[HeldOption]:
    """Return the options of an export as its file holds them.

    Raises:
        ArtifactError: the file cannot be read.
    """
    path = folder / MODEL_FILE
    contents = gguf_file.read(path)
    key = f"{_family(path, contents).architecture}.context_length"
    value = contents.metadata.get(key)
    if type(value) is not int:
        raise ArtifactError(f"{path}: {key} is {readers.show(value)}, no number of tokens. {AGAIN}")
    return [HeldOption("context_length", f"{key} of {MODEL_FILE}", value)]


def _family(path: Path, contents: GgufContents) -> Family:
    found = contents.metadata.get(ARCHITECTURE)
    family = family_of_architecture(found) if isinstance(found, str) else None
    if family is None:
        raise ArtifactError(f"{path}: its architecture is {readers.show(found)}, which no export has. {AGAIN}")
    return family


def _layout(path: Path, contents: GgufContents) -> _Layout:
    """Return the structure of a file.

    Raises:
        ArtifactError: its metadata lacks a number that the structure needs.
    """
    family, metadata = _family(path, contents), contents.metadata
    numbers: dict[str, int] = {}
    for name in ("block_count", "attention.head_count", "attention.head_count_kv"):
        key = f"{family.architecture}.{name}"
        value = metadata.get(key)
        if type(value) is not int or not 0 < value <= MOST_LAYERS:
            raise ArtifactError(f"{path}: {key} is {readers.show(value)}. {AGAIN}")
        numbers[name] = value
    names = module_names(family, numbers["block_count"])
    return _Layout(family, {name: module for module, name in names.items()}, metadata)


def _weight(path: Path, layout: _Layout, stored: StoredTensor, module: str) -> ArtifactWeight:
    """Return one matrix, unpacked, its rows in the order of transformers."""
    assert stored.block is not None
    codes, scales = gguf_blocks.unpack(stored.data, stored.block)
    codes, scales = _in_order(path, layout, module, codes), _in_order(path, layout, module, scales)
    # The input of a matrix is rounded by blocks; looked-up rows have none.
    return ArtifactWeight(codes, scales, stored.block.bits, None if module == EMBEDDING else stored.block.width)


def _constant(path: Path, layout: _Layout, stored: StoredTensor, module: str, kind: str) -> FloatConstant:
    """Return one float tensor; a tensor that belongs to no module has no name in the checkpoint."""
    values = stored.data.astype(np.float32)
    if not module or not values.ndim:
        return FloatConstant(stored.name, values)
    return FloatConstant(stored.name, _in_order(path, layout, module, values), f"{module}.{kind}")


def _in_order(path: Path, layout: _Layout, module: str, rows: Any) -> Any:
    """Return rows of a tensor in the order of transformers."""
    try:
        order = row_order(module, len(rows), layout.metadata, layout.family)
    except ValueError as error:
        raise ArtifactError(f"{path}: {module} has {len(rows)} rows, not those of whole heads. {AGAIN}") from error
    if order is None:
        return rows
    found = np.empty_like(rows)
    found[order] = rows
    return found


def end_tokens(folder: Path) -> list[int]:
    """Return the ids that end a generation, without unpacking a matrix.

    Raises:
        ArtifactError: the file is missing, truncated or garbled.
    """
    return _end_tokens(gguf_file.read(folder / MODEL_FILE))


def _end_tokens(contents: GgufContents) -> list[int]:
    return [contents.metadata[key] for key in END_KEYS if type(contents.metadata.get(key)) is int]


def _metadata(contents: GgufContents, family: Family) -> dict[str, Any]:
    """Return what a runtime reads besides tensors; long lists are given as their length."""
    shown = {key: len(value) if isinstance(value, list) else value for key, value in contents.metadata.items()}
    return {
        "gguf": shown,
        "context_length": contents.metadata.get(f"{family.architecture}.context_length"),
        "end_tokens": _end_tokens(contents),
    }


def _sizes(folder: Path, contents: GgufContents) -> dict[str, int]:
    """Return bytes by part. "graph": float tensors, metadata without the tokenizer, padding."""
    sizes = dict.fromkeys(("linears", "scales", "embedding", "head", "graph", "tokenizer"), 0)
    tables = {"token_embd.weight": "embedding", "output.weight": "head"}
    for name, stored in contents.tensors.items():
        if stored.block is not None:
            # Scales of a table count as the table.
            scales = stored.data.size // stored.block.size_bytes * gguf_blocks.SCALE_BYTES if name not in tables else 0
            sizes["scales"] += scales
            sizes[tables.get(name, "linears")] += stored.data.size - scales
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST}
    sizes["tokenizer"] = contents.tokenizer_bytes
    sizes["tokenizer"] += sum(size for name, size in files.items() if name in tokenizer.TOKENIZER_FILES)
    # Everything that belongs to no other part.
    sizes["graph"] = sum(files.values()) - sum(sizes.values())
    return sizes
