"""What goes into and out of every matrix of an ONNX folder: a copy of its graph with these as outputs."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from qat_edge_exporters.artifact import Exposed
from qat_edge_exporters.onnx import graph_file, names


def expose(folder: Path, out: Path) -> Exposed:
    """Write a copy of the graph into the folder `out`, the other files linked beside it.

    Raises:
        ArtifactError: no readable ONNX folder.
    """
    graph = graph_file.load_graph(folder / names.MODEL_FILE)
    places = {
        module: (node.input[0], [node.output[0]])
        for node in graph.graph.node
        if node.op_type in ("MatMulNBits", "MatMul") and (module := names.module_of_node(node.name)) is not None
    }
    given = {output.name for output in graph.graph.output}
    wanted = dict.fromkeys(name for before, after in places.values() for name in (before, *after))
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in given)
    (out / names.MODEL_FILE).write_bytes(graph.SerializeToString())
    for path in folder.iterdir():
        if path.name != names.MODEL_FILE:
            (out / path.name).symlink_to(path.resolve())
    return Exposed(_joined(graph, places))


def _joined(
    graph: onnx.ModelProto, places: dict[str, tuple[str, list[str]]]
) -> dict[str, tuple[str | None, list[str]]]:
    """Projections that the model has in one, together again, by what the graph's metadata says of them."""
    fused: dict[str, list[str]] = next(
        (json.loads(entry.value) for entry in graph.metadata_props if entry.key == "fused"), {}
    )
    apart = {part for parts in fused.values() for part in parts}
    whole = {name: (places[parts[0]][0], [places[part][1][0] for part in parts]) for name, parts in fused.items()}
    return {**{name: place for name, place in places.items() if name not in apart}, **whole}
