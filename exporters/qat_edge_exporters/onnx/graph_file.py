"""Read and write an ONNX graph whose tensors are in one data file next to it, without ONNX Runtime and without copies.

Format of external data: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import external_data_helper, helper

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.onnx import names

ALIGNMENT = 64  # bytes, the widest vector register
AGAIN = "Export again, or copy the folder again if it was copied."


def load_graph(path: Path) -> onnx.ModelProto:
    """Load the graph and leave its tensors in the data file.

    Raises:
        ArtifactError: the file is missing or not ONNX, or a tensor is in another file than the data file next to it.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: missing. {AGAIN}")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ArtifactError(f"{path}: no readable ONNX graph ({error}). {AGAIN}") from error
    if not model.graph.node:
        raise ArtifactError(f"{path}: the graph is empty. {AGAIN}")
    for initializer in _all_tensors(model):
        _check_location(initializer, path)
    return model


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a runtime reads: of the graph, of nodes, of graphs and functions inside them."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)
    for training in model.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(graph)


def _check_location(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse a tensor outside of the data file: a runtime would read what no reader has checked.

    Raises:
        ArtifactError: names the tensor and the file that it names.
    """
    if not external_data_helper.uses_external_data(tensor):
        return
    locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
    if locations != [names.DATA_FILE]:
        found = ", ".join(f"'{readers.shorten(location)}'" for location in locations) or "no file"
        raise ArtifactError(
            f"{path}: tensor '{readers.shorten(tensor.name)}' is in {found}; exports have all tensors in "
            f"'{names.DATA_FILE}' next to the graph. {AGAIN}"
        )


def tensor(initializer: onnx.TensorProto, folder: Path) -> NDArray[Any]:
    """Return an initializer's values. Those in a data file of `folder` are memory-mapped, not read.

    Raises:
        ArtifactError: the data file is missing, or ends before the tensor does.
    """
    shape = tuple(initializer.dims)
    try:
        if not external_data_helper.uses_external_data(initializer):
            return onnx.numpy_helper.to_array(initializer)
        _check_location(initializer, folder / names.MODEL_FILE)
        info = external_data_helper.ExternalDataInfo(initializer)
        path, offset = folder / names.DATA_FILE, int(info.offset or 0)
        dtype = helper.tensor_dtype_to_np_dtype(initializer.data_type)
        size = math.prod(shape) * dtype.itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: tensor '{initializer.name}' is garbled ({error}). {AGAIN}") from error

    file_size = path.stat().st_size if path.is_file() else 0
    if size < 0 or offset < 0 or offset + size > file_size:
        raise ArtifactError(
            f"{path}: tensor '{initializer.name}' should be at bytes {offset} to {offset + size}, but the file has "
            f"{file_size}. {AGAIN}"
        )
    return np.memmap(path, dtype, "r", offset, shape) if size else np.zeros(shape, dtype)


def size(initializer: onnx.TensorProto) -> int:
    """Return the number of elements of a tensor."""
    return math.prod(initializer.dims)


def save(
    model: onnx.ModelProto,
    tensors: Mapping[str, NDArray[Any]],
    source: Path,
    folder: Path,
    inline: Collection[str] = (),
) -> None:
    """Write the graph and its data file into `folder`.

    Args:
        model: the graph; its initializers are changed to point into the new data file.
        tensors: new values by initializer name.
        source: folder with the values of all other initializers.
        folder: existing folder to write into.
        inline: names of initializers that stay in the graph. Shape inference reads those of shapes, and onnxruntime
            refuses them in a data file.
    """
    with (folder / names.DATA_FILE).open("wb") as file:
        for initializer in model.graph.initializer:
            if initializer.name in inline:
                continue
            values = tensors.get(initializer.name)
            if values is None:
                values = tensor(initializer, source)
            file.write(bytes(-file.tell() % ALIGNMENT))
            _point(initializer, values, file.tell())
            np.ascontiguousarray(values).tofile(file)
    (folder / names.MODEL_FILE).write_bytes(model.SerializeToString())


def _point(initializer: onnx.TensorProto, values: NDArray[Any], offset: int) -> None:
    """Make `initializer` describe `values` at `offset` of the data file."""
    name = initializer.name
    initializer.Clear()
    initializer.name = name
    initializer.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
    initializer.dims.extend(values.shape)
    initializer.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", names.DATA_FILE), ("offset", offset), ("length", values.nbytes)):
        initializer.external_data.add(key=key, value=str(value))
