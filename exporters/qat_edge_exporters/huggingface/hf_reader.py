"""Read codes, scales and float tensors back from the bytes of a Hugging Face folder, without compressed-tensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.manifest import MANIFEST
from qat_edge.models import tokenizer
from qat_edge.models.tokenizer import EOS, GENERATION_CONFIG
from qat_edge.quant.frozen_config import QUANTIZER
from qat_edge.quant.packing import unpack_int32
from qat_edge_exporters.artifact import Artifact, ArtifactWeight, FloatConstant
from qat_edge_exporters.huggingface import compressed_config
from qat_edge_exporters.huggingface.compressed_config import HEAD_GROUP, LayerGroup
from qat_edge_exporters.huggingface.hf_settings import CONFIG, CONTEXT, MODEL_FILE

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # without which text cannot be tokenized


def read(folder: Path) -> Artifact:
    """Read everything in a folder.

    Raises:
        ArtifactError: a file is missing or damaged, or the tensors are not those of its configuration.
    """
    settings = readers.read_object(folder / CONFIG, ArtifactError).get(QUANTIZER)
    settings = settings if isinstance(settings, dict) else {}
    groups = compressed_config.read_groups(settings, f"{folder / CONFIG}: {QUANTIZER}")
    tensors = _tensors(folder / MODEL_FILE)

    weights: dict[str, ArtifactWeight] = {}
    sizes: Counter[str] = Counter()
    for group in groups:
        for layer in group.layers:
            stored = {part: tensors.pop(layer + part, None) for part in (PACKED, SCALE, SHAPE)}
            weights[layer] = _weight(folder / MODEL_FILE, layer, group, stored)
            sizes.update(_part_sizes(group, stored))

    tables = _tables(folder, settings, tensors)
    for part, name in zip(("embedding", HEAD_GROUP), tables, strict=False):
        sizes[part] += tensors[f"{name}.weight"].nbytes
    metadata = {**_metadata(folder), "in_float": tables}
    return Artifact(weights, metadata, _sizes(folder, sizes), _faults(folder, tensors), _constants(tensors))


def _tables(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Return the tables in float that a configuration names, the embedding first.

    Raises:
        ArtifactError: it names none, or one that the file does not have.
    """
    names = settings.get("ignore")
    if not isinstance(names, list) or not names or any(f"{name}.weight" not in tensors for name in names):
        raise ArtifactError(
            f"{folder / CONFIG}: 'ignore' of {QUANTIZER} is {readers.show(names)}, and names no tables of "
            f"{MODEL_FILE}. Export it again."
        )
    return names


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping: no __iter__)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = readers.shorten(str(error), 200)
        raise ArtifactError(f"{path}: missing or damaged ({reason}). Export it again.") from error


def _weight(path: Path, layer: str, group: LayerGroup, stored: dict[str, Tensor | None]) -> ArtifactWeight:
    """Return one matrix, unpacked.

    Raises:
        ArtifactError: its tensors are missing, or have another type or shape than the configuration says.
    """
    packed, scales, shape = (stored[part] for part in (PACKED, SCALE, SHAPE))
    if packed is None or scales is None or shape is None:
        part = next(part for part, tensor in stored.items() if tensor is None)
        raise ArtifactError(f"{path}: no {readers.shorten(layer)}{part}, which {CONFIG} has. Export it again.")
    if shape.dtype != torch.int64 or tuple(shape.shape) != (2,) or bool((shape < 1).any()):
        raise ArtifactError(f"{path}: {layer}{SHAPE} is {readers.shorten(shape.tolist())}. Export it again.")

    rows, width = shape.tolist()
    columns = 1 if group.group_size is None else width // group.group_size
    expected = {
        PACKED: (torch.int32, (rows, -(-width * group.bits // 32))),
        SCALE: (torch.bfloat16, (rows, columns)),
    }
    for part, (dtype, size) in expected.items():
        found = stored[part]
        assert found is not None
        if (found.dtype, tuple(found.shape)) != (dtype, size):
            raise ArtifactError(
                f"{path}: {layer}{part} is {found.dtype} {tuple(found.shape)}, and {CONFIG} says {dtype} {size}. "
                "Export it again."
            )
    codes = unpack_int32(packed.numpy(), group.bits, width)
    return ArtifactWeight(codes, scales.float().numpy(), group.bits)


def _part_sizes(group: LayerGroup, stored: dict[str, Tensor | None]) -> dict[str, int]:
    """Return the bytes of a matrix by part of the artifact. Scales of the head count as the head."""
    packed, scales = (tensor.nbytes if tensor is not None else 0 for tensor in (stored[PACKED], stored[SCALE]))
    return {"head": packed + scales} if group.name == HEAD_GROUP else {"linears": packed, "scales": scales}


def _faults(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    faults = [
        f"{MODEL_FILE}: {readers.shorten(name)} is {str(tensor.dtype).removeprefix('torch.')}, and no layer with codes "
        "has it."
        for name, tensor in tensors.items()
        if not tensor.is_floating_point() or name.endswith((PACKED, SCALE, SHAPE))
    ]
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    return faults + [f"{name}: missing, so the text cannot be tokenized." for name in missing]


def _constants(tensors: dict[str, Tensor]) -> list[FloatConstant]:
    return [
        FloatConstant(name, tensor.float().numpy(), tensor=name)
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    ]


def end_tokens(folder: Path) -> list[int]:
    """Return the ids that end a generation, without reading a tensor.

    Raises:
        ArtifactError: they are no ids.
    """
    ends: list[int] = _metadata(folder)["end_tokens"]
    return ends


def _metadata(folder: Path) -> dict[str, Any]:
    """Return what transformers reads besides tensors.

    Raises:
        ArtifactError: the end tokens are no ids.
    """
    settings = readers.read_object(folder / GENERATION_CONFIG, ArtifactError)
    ends = settings.get(EOS)
    if not isinstance(ends, list) or not ends or not all(type(token) is int for token in ends):
        raise ArtifactError(
            f"{folder / GENERATION_CONFIG}: {EOS} is {readers.show(ends)}, no list of token ids. Export it again."
        )
    return {"generation_config": settings, "context_length": settings.get(CONTEXT), "end_tokens": ends}


def _sizes(folder: Path, tensors: Counter[str]) -> dict[str, int]:
    """Return bytes by part. "graph": float tensors other than tables, configurations, names of tensors."""
    sizes = {part: tensors[part] for part in ("linears", "scales", "embedding", "head")}
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST}
    sizes["tokenizer"] = sum(size for name, size in files.items() if name in tokenizer.TOKENIZER_FILES)
    # Everything that belongs to no other part.
    sizes["graph"] = sum(files.values()) - sum(sizes.values())
    return sizes
