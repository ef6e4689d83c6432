"""Compare what an app reads of an encoder's ONNX folder, besides its tensors, with what the export writes."""

from __future__ import annotations

from pathlib import Path

import onnx

from qat_edge import readers
from qat_edge.manifest import sha256
from qat_edge.models import tasks, tokenizer
from qat_edge.models.meta_model import model_without_weights
from qat_edge.quant import frozen_config
from qat_edge.quant.frozen import read_scheme
from qat_edge_exporters.onnx import encoder_names, graph_file, names, traced_names
from qat_edge_exporters.onnx.encoder_names import MAX_LENGTH, OUTPUT_WIDTH

SIZES = ("batch", "tokens")  # names of the inputs' sizes, which are free


def setting_faults(folder: Path, checkpoint: Path) -> list[str]:
    """Return a fault for each setting that the export of a checkpoint would not write.

    Raises:
        ArtifactError: the graph cannot be read.
    """
    model = graph_file.load_graph(folder / names.MODEL_FILE)
    faults = []
    if sha256(folder / names.CONFIG) != sha256(checkpoint / names.CONFIG):
        faults.append(f"{names.CONFIG}: not the file of {checkpoint}.")

    config = frozen_config.read(checkpoint)
    task = tasks.task_of_config(config)
    settings = {entry.key: entry.value for entry in model.metadata_props}
    longest = tasks.max_text_tokens(
        model_without_weights(config, task.auto_class), tokenizer.load_tokenizer(checkpoint)
    )
    found = settings.get(MAX_LENGTH, "")
    if not found.isdecimal() or not 1 <= int(found) <= longest:
        faults.append(f"{names.MODEL_FILE}: {MAX_LENGTH} is {readers.show(found)}, the model has {longest} positions.")
    faults += _token_faults(model, read_scheme(checkpoint).embedding)
    return faults + _signature_faults(model, encoder_names.output_name(task), settings.get(OUTPUT_WIDTH, ""))


def _token_faults(model: onnx.ModelProto, module: str) -> list[str]:
    """Require that the ids of a text choose the rows of the token table."""
    table = traced_names.node_name(module, traced_names.TABLE)
    read = [list(node.input[1:2]) for node in model.graph.node if node.name == table]
    if read == [[encoder_names.INPUTS[0]]]:
        return []
    return [f"{names.MODEL_FILE}: the table of tokens is read by {readers.show(read)}, not by the ids of a text."]


def _signature_faults(model: onnx.ModelProto, output: str, width: str) -> list[str]:
    """Compare inputs and outputs of the graph with those that an app expects."""
    integers, floats = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    expected = [_describe(name, integers, SIZES) for name in encoder_names.INPUTS]
    expected.append(_describe(output, floats, (SIZES[0], width)))
    found = [
        _describe(
            each.name,
            each.type.tensor_type.elem_type,
            tuple(size.dim_param or str(size.dim_value) for size in each.type.tensor_type.shape.dim),
        )
        for each in (*model.graph.input, *model.graph.output)
    ]
    pairs = zip(found, expected, strict=False)
    different = [f"{readers.show(one)}, the export writes {other}" for one, other in pairs if one != other]
    if len(found) != len(expected):
        different.append(f"{len(found)} inputs and outputs, the export writes {len(expected)}")
    return [f"{names.MODEL_FILE}: it has {text}." for text in different]


def _describe(name: str, type_number: int, sizes: tuple[str, ...]) -> str:
    return f"{name} of type {type_number} ({', '.join(sizes)})"
