"""Find float tensors of an ONNX graph whose numbers are not finite or too large: every answer would be wrong.

Infinite numbers are right in masks, so only those that nodes multiply by are faults. One that is not a number is wrong
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qat_edge.readers import counted
from qat_edge_exporters import file_diagnosis
from qat_edge_exporters.file_diagnosis import LARGEST_FACTOR
from qat_edge_exporters.onnx.data_files import DataFiles, stored_range
from qat_edge_exporters.onnx.foreign_graph import ForeignGraph, text

FLOATS = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")}
# Operators that multiply by a stored tensor: matrices with their scales, tables and norms.
TABLE_LOOKUP = "Gather"
MULTIPLYING = (
    "DequantizeLinear", "GatherBlockQuantized", "Gemm", "LayerNormalization", "MatMul", "MatMulNBits",
    "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
)  # fmt: skip
CHUNK = 2**24  # numbers that are read at once
DAMAGED = "Export again, or copy the file again."


def value_faults(graph: ForeignGraph, data: DataFiles) -> list[str]:
    """Return a fault for each float tensor with numbers that are not finite, or too large to multiply by.

    Args:
        graph: of any tool.
        data: its data files; tensors that are not in them as described have faults there.
    """
    multiplied = {text(name) for node in graph.nodes if node.op_type in MULTIPLYING for name in node.input}
    # A gathered table may be a mask, whose lowest numbers are near the end of float32.
    factors = multiplied | {text(name) for node in graph.nodes if node.op_type == TABLE_LOOKUP for name in node.input}
    found = []
    for name, tensor in graph.initializers.items():
        if tensor.data_type not in FLOATS:
            continue
        wrong, infinite, large = _count(_numbers(tensor, graph.path.parent, data))
        if wrong:
            wrongs = counted(
                wrong, f"number of the tensor {name!r} is no number", f"numbers of the tensor {name!r} are no numbers"
            )
            found.append(f"{graph.path.name}: {wrongs} (NaN). {DAMAGED}")
        elif infinite and name in factors:
            numbers = counted(infinite, f"number of the tensor {name!r} is", f"numbers of the tensor {name!r} are")
            found.append(f"{graph.path.name}: {numbers} infinite. {DAMAGED}")
        elif large and name in multiplied and tensor.data_type != onnx.TensorProto.DOUBLE:
            numbers = counted(large, f"number of the tensor {name!r} is", f"numbers of the tensor {name!r} are")
            found.append(f"{graph.path.name}: {numbers} above {LARGEST_FACTOR:g}: products overflow float32. {DAMAGED}")
    return file_diagnosis.few(found)


def _count(chunks: Iterator[NDArray[Any]]) -> tuple[int, int, int]:
    """Return how many numbers are NaN, how many are infinite, and how many finite ones are above LARGEST_FACTOR."""
    wrong = infinite = large = 0
    for chunk in chunks:
        if not np.isfinite(chunk).all():
            wrong += int(np.isnan(chunk).sum())
            infinite += int(np.isinf(chunk).sum())
        if chunk.dtype != np.float16:  # which holds none
            large += int(((np.abs(chunk) > LARGEST_FACTOR) & np.isfinite(chunk)).sum())
    return wrong, infinite, large


def _numbers(tensor: onnx.TensorProto, folder: Path, data: DataFiles) -> Iterator[NDArray[Any]]:
    """Yield the numbers of a tensor in parts; nothing where its file does not hold them."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        try:
            yield numpy_helper.to_array(tensor)
        except (ValueError, TypeError):
            return  # of another size than its shape, which runtimes refuse
        return
    location, stored = stored_range(tensor)
    if isinstance(stored, str) or stored.end > data.size_bytes.get(location, 0):
        return
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = (stored.end - stored.begin) // dtype.itemsize
    for first in range(0, count, CHUNK):
        offset = stored.begin + first * dtype.itemsize
        yield np.fromfile(folder / location, dtype, min(CHUNK, count - first), offset=offset)
