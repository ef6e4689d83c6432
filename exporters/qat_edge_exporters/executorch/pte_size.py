"""Predicted size of a .pte for XNNPACK: packing rules for codes and scales, and measured constants for the graph.

int4 in groups has bfloat16 scales, int8 per channel float32 ones. A table that embedding and head share is stored once
(`pte.shared_table`).
"""

from __future__ import annotations

from qat_edge_exporters.planned_size import (
    FLOAT_BYTES,
    FrozenOutline,
    PlannedFiles,
    WeightOutline,
    aligned,
    float_sizes,
    json_bytes,
)
from qat_edge_exporters.targets import COPIED

ALIGNMENT = 16  # bytes, of constants
# Bytes of the program besides constants, measured on exports of one to three layers, 64 and 128 wide: Llama (the first
# two), Qwen 2 (biases), Qwen 3 (norms of heads), Gemma 3 (norms after layers). They do not depend on widths.
PROGRAM, LAYER, BIAS, HEAD_NORM, EXTRA_NORM = 12_400, 10_900, 277, 1_184, 4_160
NORMS = 2  # of a layer, which LAYER contains


def planned(outline: FrozenOutline, context_length: int, kv_cache: str = "float32") -> PlannedFiles:
    """Return the predicted files of an export.

    Args:
        outline: The checkpoint.
        context_length: Tokens of the KV cache, which the file has no bytes of.
        kv_cache: "float32" or "int8".
    """
    embedding, head = outline.weights[outline.embedding], outline.weights[outline.head]
    linears = sum(_matrix_bytes(weight) for weight in outline.linears.values())
    floats = sum(aligned(size, ALIGNMENT) for size in float_sizes(outline))
    own_head = 0 if outline.tied else _matrix_bytes(head)
    # The rotary embedding multiplies by a matrix that exchanges the halves of a head.
    exchange = outline.head_width**2 * FLOAT_BYTES
    counts = outline.count_floats()
    extra = max(0, counts.norms - NORMS * outline.layers - 1)
    graph = PROGRAM + LAYER * outline.layers + EXTRA_NORM * extra
    graph += BIAS * counts.biases + HEAD_NORM * counts.head_norms
    model = linears + floats + _matrix_bytes(embedding) + own_head + exchange + graph

    names = {"embedding": outline.embedding, "head": outline.head, "float_bytes": {}}
    layers = json_bytes({**names, "linears": [*outline.linears, outline.head]}, indent=1)
    files = {"model.pte": model, "layers.json": layers, **outline.file_sizes(*COPIED), **outline.tokenizer_files()}
    # An int8 cache has a float32 scale and zero point for each head.
    cache = outline.cache_values * FLOAT_BYTES
    if kv_cache == "int8":
        cache = outline.cache_values + outline.cache_values // outline.head_width * 2 * FLOAT_BYTES
    return PlannedFiles(files, linears + floats + _matrix_bytes(head), cache)


def _matrix_bytes(weight: WeightOutline) -> int:
    return aligned(weight.code_bytes, ALIGNMENT) + _scale_bytes(weight)


def _scale_bytes(weight: WeightOutline) -> int:
    return aligned(weight.groups * (FLOAT_BYTES if weight.bits == 8 else 2), ALIGNMENT)
