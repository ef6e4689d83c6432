"""Predicted size of a Hugging Face folder: every tensor by its shape, and the header of the file that names them."""

from __future__ import annotations

import json
from typing import NamedTuple

from qat_edge.models import tokenizer
from qat_edge_exporters.huggingface import hf_settings
from qat_edge_exporters.huggingface.hf_settings import CONFIG, MODEL_FILE
from qat_edge_exporters.planned_size import FLOAT_BYTES, FrozenOutline, PlannedFiles, aligned, json_bytes

HEADER_ALIGNMENT, LENGTH_BYTES = 8, 8  # of safetensors
SIZES = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2}


class _Tensor(NamedTuple):
    """Type and shape of one tensor of the file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * SIZES[self.dtype]


def planned(outline: FrozenOutline, context_length: int) -> PlannedFiles:
    """Return the predicted files of an export.

    Args:
        outline: The checkpoint.
        context_length: Tokens at which a generation ends.
    """
    # The embedding, and a head whose input would be rotated, are stored in float.
    in_float = [outline.embedding, *([outline.head] if outline.rotated_norms else [])]
    tensors: dict[str, _Tensor] = {}
    for name, weight in outline.weights.items():
        if name in in_float:
            tensors[f"{name}.weight"] = _Tensor("F32", (weight.rows, weight.width))
            continue
        tensors[f"{name}.weight_packed"] = _Tensor("I32", (weight.rows, -(-weight.width * weight.bits // 32)))
        tensors[f"{name}.weight_scale"] = _Tensor("BF16", (weight.rows, weight.width // weight.group_size))
        tensors[f"{name}.weight_shape"] = _Tensor("I64", (2,))
    tensors |= {name: _Tensor("F32", (elements,)) for name, elements in outline.floats.items()}

    total = sum(tensor.size_bytes for tensor in tensors.values())
    config = hf_settings.config_of(outline.folder, in_float)
    generation = hf_settings.expected_generation(outline.folder, context_length)
    files = {
        MODEL_FILE: LENGTH_BYTES + _header_bytes(tensors) + total,
        CONFIG: json_bytes(config, indent=2),
        tokenizer.GENERATION_CONFIG: json_bytes(generation, indent=2),
        **outline.tokenizer_files(),
    }
    table = tensors[f"{outline.embedding}.weight"].size_bytes
    return PlannedFiles(files, total - table, outline.cache_values * FLOAT_BYTES)


def _header_bytes(tensors: dict[str, _Tensor]) -> int:
    """Return the size of the header of a safetensors file, which has the widest types first."""
    ordered = sorted(tensors.items(), key=lambda item: (-SIZES[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.size_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return aligned(len(json.dumps(header, separators=(",", ":")).encode()), HEADER_ALIGNMENT)
