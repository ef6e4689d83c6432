"""Tell a decoder's graph that was traced from the model's own code from one of the builder, and read its inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx

from qat_edge.errors import ArtifactError
from qat_edge_exporters.onnx import graph_file, names, traced_names
from qat_edge_exporters.onnx.decoder_names import FORMAT, PAST, TRACED


class CacheShape(NamedTuple):
    """Heads of keys and values, and channels of each."""

    heads: int
    width: int


def is_traced(model: onnx.ModelProto) -> bool:
    """Return whether a graph was traced from the model's own code, as its metadata says."""
    return any((entry.key, entry.value) == (TRACED, FORMAT) for entry in model.metadata_props)


def module_of_node(model: onnx.ModelProto) -> Callable[[str], str | None]:
    """Return the function that tells the module whose matrix a node reads, by the name of the node."""
    return traced_names.module_of_node if is_traced(model) else names.module_of_node


def is_traced_folder(folder: Path) -> bool:
    """Return whether a folder has such a graph; False where none can be read, which its reader reports."""
    try:
        return is_traced(graph_file.load_graph(folder / names.MODEL_FILE))
    except ArtifactError:
        return False


def cache_shape(model: onnx.ModelProto) -> CacheShape | None:
    """Return heads and width of the first layer's keys in a traced decoder; None in a graph of the builder.

    Raises:
        ArtifactError: the graph has no such input.
    """
    if not is_traced(model):
        return None
    for entry in model.graph.input:
        sizes = [size.dim_value for size in entry.type.tensor_type.shape.dim]
        if entry.name == f"{PAST}.0.key" and len(sizes) == 4:
            return CacheShape(sizes[1], sizes[3])
    raise ArtifactError(f"{names.MODEL_FILE}: no input {PAST}.0.key of four dimensions. {graph_file.AGAIN}")
