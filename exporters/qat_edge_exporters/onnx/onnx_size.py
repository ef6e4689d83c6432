"""Predicted size of an ONNX folder for onnxruntime-genai: tensors by the rules of their packing, and the graph by
measured constants.

Every block of a matrix has a float32 scale; an int8 row of one scale is cut into the largest blocks that divide it.
"""

from __future__ import annotations

import torch

from qat_edge_exporters.onnx import names
from qat_edge_exporters.onnx.architecture import read_architecture
from qat_edge_exporters.onnx.graph_file import ALIGNMENT
from qat_edge_exporters.onnx.olive_checkpoint import BLOCK_SIZES
from qat_edge_exporters.planned_size import (
    FLOAT_BYTES,
    FrozenOutline,
    PlannedFiles,
    WeightOutline,
    aligned,
    float_sizes,
)

# Bytes of model.onnx, measured on exports of one to three layers, 64 and 128 wide: Llama (the first two), Qwen 2
# (biases), Qwen 3 (norms of heads), Gemma 3 (norms after layers).
GRAPH, LAYER, BIAS, HEAD_NORM, EXTRA_NORM = 4_190, 8_997, 407, 1_378, 652
SETTINGS = 1_230  # of genai_config.json
NORMS = 2  # of a layer, which LAYER contains


def planned(outline: FrozenOutline, context_length: int) -> PlannedFiles:
    """Return the predicted files of an export.

    Args:
        outline: The checkpoint.
        context_length: Tokens of the rotary tables.

    Raises:
        ExportError: The rotary embedding changes within the context.
    """
    embedding, head = outline.weights[outline.embedding], outline.weights[outline.head]
    linears = sum(_matrix_bytes(weight) for weight in outline.linears.values())
    floats = sum(aligned(size, ALIGNMENT) for size in float_sizes(outline))
    tables = _table_bytes(outline, context_length)
    own_embedding = 0 if outline.tied else _matrix_bytes(embedding)
    counts = outline.count_floats()
    extra = max(0, counts.norms - NORMS * outline.layers - 1)
    graph = GRAPH + LAYER * outline.layers + BIAS * counts.biases + HEAD_NORM * counts.head_norms + EXTRA_NORM * extra
    read_bytes = linears + floats + _matrix_bytes(head)
    files = {
        names.MODEL_FILE: graph,
        names.DATA_FILE: read_bytes + own_embedding + tables,
        names.GENAI_CONFIG: SETTINGS,
        **outline.tokenizer_files(),
    }
    return PlannedFiles(files, read_bytes, outline.cache_values * FLOAT_BYTES)


def _table_bytes(outline: FrozenOutline, context_length: int) -> int:
    """Return the bytes of cosines and sines."""
    with torch.no_grad():
        rotary = read_architecture(outline.folder, context_length).rotary
    return sum(table.cosines.nbytes + table.sines.nbytes for table in rotary.values())


def _matrix_bytes(weight: WeightOutline) -> int:
    """Return the bytes of codes and scales of one matrix, with padding."""
    block = weight.group_size
    if block not in BLOCK_SIZES:
        block = max((size for size in BLOCK_SIZES if weight.width % size == 0), default=BLOCK_SIZES[0])
    blocks = -(-weight.width // block)
    codes = weight.rows * blocks * block * weight.bits // 8
    return aligned(codes, ALIGNMENT) + aligned(weight.rows * blocks * FLOAT_BYTES, ALIGNMENT)
