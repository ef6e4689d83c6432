"""Check tensors of an ONNX graph that are stored in other files.

Format: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import helper

from qat_edge.path_names import is_inside
from qat_edge.readers import counted
from qat_edge_exporters import file_diagnosis
from qat_edge_exporters.onnx.foreign_graph import DAMAGED, ForeignGraph, text

MOST_DIGITS = 20  # of an offset or length
# Types of which several numbers share a byte -> bits of a number. Those that an older onnx lacks are left out.
PACKED_BITS = {
    onnx.TensorProto.DataType.Value(name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118  (an enumeration of protobuf, not a dictionary)
}


@dataclass
class DataFiles:
    """Files with the tensors of a graph.

    Attributes:
        size_bytes: of each file that is there, by name.
        faults: one sentence each.
        leads_outside: whether a tensor is outside of the folder, so that no runtime may load the graph.
    """

    size_bytes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    leads_outside: bool = False


@dataclass(frozen=True)
class Stored:
    """A tensor in a data file: its name, and begin and end in the file."""

    name: str
    begin: int
    end: int


def check_data_files(graph: ForeignGraph) -> DataFiles:
    """Check that every tensor in a data file is inside the folder, inside the file, and of the size of its shape."""
    found = DataFiles()
    outside: list[str] = []
    garbled: list[str] = []
    by_file: dict[str, list[Stored]] = {}
    for tensor in _tensors(graph):
        name = text(tensor.name)
        location, stored = stored_range(tensor)
        if not location or not is_inside(location):
            outside.append(
                f"{graph.path.name}: the tensor {name!r} is in {location!r}, which is not a file inside the folder: a "
                "runtime would read another file, or refuse. Save the graph again, with its data next to it."
            )
            continue
        if isinstance(stored, str):
            garbled.append(f"{graph.path.name}: the tensor {name!r} {stored}. {DAMAGED}")
        else:
            by_file.setdefault(location, []).append(stored)

    found.leads_outside = bool(outside)
    found.faults = file_diagnosis.few(outside) + file_diagnosis.few(garbled)
    for location, tensors in by_file.items():
        _check_file(graph.path.parent / location, location, tensors, found)
    return found


def _check_file(path: Path, location: str, tensors: list[Stored], found: DataFiles) -> None:
    """Check that a data file is there and holds its tensors."""
    if not path.is_file():
        state = "not a file" if path.exists() else "missing"
        found.faults.append(
            f"{location}: {state}, and {counted(len(tensors), 'tensor')} of the graph should be in it. Copy it with "
            "the graph, under the same name."
        )
        return
    size = found.size_bytes[location] = path.stat().st_size
    found.faults += file_diagnosis.few(
        f"{location}: the tensor {each.name!r} should be at bytes {each.begin} to {each.end}, but the file has {size}. "
        f"{DAMAGED}"
        for each in tensors
        if each.end > size
    )


def stored_range(tensor: onnx.TensorProto) -> tuple[str, Stored | str]:
    """Return the file of a tensor as its description names it, and where it is there, or the fault, as a phrase."""
    entries = {text(entry.key): text(entry.value) for entry in tensor.external_data}
    return entries.get("location", ""), _range(tensor, entries)


def _range(tensor: onnx.TensorProto, entries: dict[str, str]) -> Stored | str:
    numbers = {}
    for key in ("offset", "length"):
        value = entries.get(key)
        if value is not None and not (value.isascii() and value.isdecimal() and len(value) <= MOST_DIGITS):
            return f"has the {key} {value!r}, which is no number of bytes"
        numbers[key] = None if value is None else int(value)
    needed = _size(tensor)
    if needed is None:
        return f"has the shape {list(tensor.dims)} and the type {tensor.data_type}, which no tensor has"
    length, begin = numbers["length"], numbers["offset"] or 0
    if length is not None and length != needed:
        return f"has {length} bytes, and its shape {list(tensor.dims)} needs {needed}"
    return Stored(text(tensor.name), begin, begin + needed)


def _size(tensor: onnx.TensorProto) -> int | None:
    """Return the bytes of a tensor by its shape and type; None for a shape or type that cannot be."""
    if any(size < 0 for size in tensor.dims):
        return None
    count = math.prod(tensor.dims)
    if tensor.data_type in PACKED_BITS:
        return -(-count * PACKED_BITS[tensor.data_type] // 8)
    try:
        return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, ValueError, TypeError):
        return None


def _tensors(graph: ForeignGraph) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of a graph that are in other files: stored ones, and those of nodes."""
    external = onnx.TensorProto.EXTERNAL
    for each in graph.graphs:
        yield from (tensor for tensor in each.initializer if tensor.data_location == external)
        for sparse in each.sparse_initializer:
            yield from (part for part in (sparse.values, sparse.indices) if part.data_location == external)
    for node in graph.nodes:
        for attribute in node.attribute:
            yield from (tensor for tensor in (attribute.t, *attribute.tensors) if tensor.data_location == external)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (part for part in (sparse.values, sparse.indices) if part.data_location == external)
