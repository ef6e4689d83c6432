"""What goes into and out of every matrix of an ONNX folder: a copy of its graph with these as outputs, run here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import Passage
from qat_edge_exporters.onnx import names, storage

# Where a graph that is given as bytes finds its tensors.
TENSORS = "session.model_external_initializers_file_folder_path"
# They share no base of their own.
ERRORS = tuple(v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))


def trace(folder: Path, prompts: Sequence[Sequence[int]]) -> list[dict[str, Passage]]:
    """By module, for each of the prompts, read at once as sequences are scored.

    Raises:
        ArtifactError: no readable ONNX folder, or one that onnxruntime refuses.
    """
    graph = storage.load_graph(folder / names.MODEL_FILE)
    places = {
        module: (node.input[0], node.output[0])
        for node in graph.graph.node
        if node.op_type in ("MatMulNBits", "MatMul") and (module := names.module_of_node(node.name)) is not None
    }
    given = {output.name for output in graph.graph.output}
    wanted = dict.fromkeys(value for pair in places.values() for value in pair)
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in given)
    try:
        runs = _run(graph, folder, prompts, list(wanted))
    except ERRORS as error:
        raise ArtifactError(f"{folder}: cannot be run with more outputs: {' '.join(str(error).split())}") from error
    found = [{m: Passage(seen[before][0], seen[after][0]) for m, (before, after) in places.items()} for seen in runs]
    return [_joined(graph, passages) for passages in found]


def _run(
    graph: onnx.ModelProto, folder: Path, prompts: Sequence[Sequence[int]], wanted: list[str]
) -> list[dict[str, NDArray[np.float32]]]:
    """The wanted values of each prompt, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(TENSORS, str(folder))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [dict(zip(wanted, session.run(wanted, _feed(session, folder, ids)), strict=True)) for ids in prompts]


def _feed(session: Any, folder: Path, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
    """A prompt and an empty cache."""
    genai = json.loads((folder / names.GENAI_CONFIG).read_text(encoding="utf-8"))
    head_size = genai["model"]["decoder"]["head_size"]  # the builder leaves it symbolic
    arrays = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
    return {
        one.name: np.zeros((1, one.shape[1], 0, head_size), np.float32) if one.name not in arrays else arrays[one.name]
        for one in session.get_inputs()
    }


def _joined(graph: onnx.ModelProto, found: dict[str, Passage]) -> dict[str, Passage]:
    """Projections that the model has in one, together again, by what the graph's metadata says of them."""
    fused: dict[str, list[str]] = next(
        (json.loads(entry.value) for entry in graph.metadata_props if entry.key == "fused"), {}
    )
    for name, parts in fused.items():
        passages = [found.pop(part) for part in parts]
        outputs = [passage.outputs for passage in passages if passage.outputs is not None]
        found[name] = Passage(passages[0].inputs, np.concatenate(outputs, axis=-1))
    return found
