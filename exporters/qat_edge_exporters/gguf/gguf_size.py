"""Predicted size of a GGUF file, exactly: its metadata is written for it, and its tensors are blocks and floats."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qat_edge.quant.rotated_norm import ROTATION
from qat_edge_exporters.gguf import export_gguf, gguf_file
from qat_edge_exporters.gguf.gguf_blocks import BY_BITS, WIDTH
from qat_edge_exporters.gguf.gguf_families import module_names
from qat_edge_exporters.gguf.gguf_file import ALIGNMENT, LENGTH_BYTES, MODEL_FILE
from qat_edge_exporters.gguf.gguf_rope import rotary_settings
from qat_edge_exporters.planned_size import FLOAT_BYTES, FrozenOutline, PlannedFiles, WeightOutline, aligned

CACHE_BYTES = 2  # of a key or value: llama.cpp's default is float16
NUMBER_BYTES = 4  # of the count of dimensions, and of the type


def planned(outline: FrozenOutline, context_length: int) -> PlannedFiles:
    """Return the predicted files of an export.

    Raises:
        ExportError: llama.cpp does not compute this model, or a GGUF file cannot hold it exactly.
    """
    shapes = {name: (weight.bits, weight.width, weight.group_size) for name, weight in outline.weights.items()}
    rotations = [f"{name}.{ROTATION}" for name in outline.rotated_norms]
    checked = export_gguf.check_outline(
        outline.folder, context_length, shapes, [*outline.floats, *rotations], outline.tied
    )
    names = module_names(checked.family, outline.layers)
    skipped = {outline.head} if outline.tied else set()

    sizes = {f"{names[m]}.weight": (2, _blocks_bytes(w)) for m, w in outline.weights.items() if m not in skipped}
    for name, elements in outline.floats.items():
        module, _, kind = name.rpartition(".")
        sizes[f"{names[module]}.{kind}"] = (1, elements * FLOAT_BYTES)
    for name, values in rotary_settings(checked.config, checked.family.architecture).factors.items():
        sizes[name] = (1, values.nbytes)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        gguf_file.write(path, checked.family.architecture, checked.metadata, {})
        metadata = path.stat().st_size
    entries = sum(
        LENGTH_BYTES + len(name.encode()) + NUMBER_BYTES + dimensions * LENGTH_BYTES + NUMBER_BYTES + LENGTH_BYTES
        for name, (dimensions, _) in sizes.items()
    )
    tensors = sum(aligned(size, ALIGNMENT) for _, size in sizes.values())
    files = {MODEL_FILE: aligned(metadata + entries, ALIGNMENT) + tensors, **outline.tokenizer_files()}
    embedding = 0 if outline.tied else _blocks_bytes(outline.weights[outline.embedding])
    return PlannedFiles(files, tensors - embedding, outline.cache_values * CACHE_BYTES)


def _blocks_bytes(weight: WeightOutline) -> int:
    return weight.rows * (weight.width // WIDTH) * BY_BITS[weight.bits].size_bytes
