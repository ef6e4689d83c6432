"""Options of an ONNX export, read from the graph and genai_config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import HeldOption
from qat_edge_exporters.onnx import genai_config, graph_file, names
from qat_edge_exporters.onnx.decoder_names import PAST


def held_options(folder: Path) -> list[HeldOption]:
    """Return the options of an export folder.

    Raises:
        ArtifactError: a file is missing or cannot be read, or the graph has another cache than genai_config.json says.
    """
    config = genai_config.check_config(folder)
    model = graph_file.load_graph(folder / names.MODEL_FILE)
    try:
        faults = [*_cache_faults(model, config), *rotary_faults(model, config)]
        lengths = {"model.context_length": config["model"]["context_length"]}
        lengths["search.max_length"] = config["search"]["max_length"]
    except KeyError as error:
        raise ArtifactError(f"{folder / names.GENAI_CONFIG}: no entry {error}. {graph_file.AGAIN}") from error
    if faults:
        raise ArtifactError(f"{folder}: {faults[0]} Export again, or restore the files.")

    found = [HeldOption("context_length", f"{key} of {names.GENAI_CONFIG}", value) for key, value in lengths.items()]
    # One input of each type: those of another type than the manifest says are named.
    types: dict[str, str] = {}
    for entry in model.graph.input:
        if entry.name.startswith(f"{PAST}."):
            types.setdefault(_type_name(entry), entry.name)
    return found + [
        HeldOption("kv_cache", f"the type of {readers.shorten(name)} in {names.MODEL_FILE}", dtype)
        for dtype, name in types.items()
    ]


def rotary_faults(model: onnx.ModelProto, config: Mapping[str, Any]) -> list[str]:
    """Return a fault where the rotary tables are shorter than the context."""
    context = config["model"].get("context_length")
    tables = [tensor for tensor in model.graph.initializer if tensor.name in names.ROTARY_TABLES]
    positions = min((tensor.dims[0] for tensor in tables if tensor.dims), default=None)
    if not isinstance(context, int) or positions is None or positions >= context:
        return []
    return [f"{names.MODEL_FILE}: rotary tables for {positions} positions, but a context of {context}."]


def _cache_faults(model: onnx.ModelProto, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each input of the cache that is missing, or has another shape than the configuration."""
    decoder = config["model"]["decoder"]
    expected = (decoder["num_key_value_heads"], decoder["head_size"])
    inputs = {entry.name: entry for entry in model.graph.input}
    for layer in range(decoder["num_hidden_layers"]):
        for name in (f"{PAST}.{layer}.key", f"{PAST}.{layer}.value"):
            if name not in inputs:
                yield f"{names.MODEL_FILE}: no input {name}, though {names.GENAI_CONFIG} has that layer."
                continue
            # (batch, heads, tokens, channels); a size with a name in place of a number is 0 here.
            sizes = [size.dim_value for size in inputs[name].type.tensor_type.shape.dim]
            if len(sizes) != 4 or sizes[1] not in (0, expected[0]) or sizes[3] not in (0, expected[1]):
                yield (
                    f"{names.MODEL_FILE}: {name} has the shape {sizes}, but {names.GENAI_CONFIG} has "
                    f"num_key_value_heads {expected[0]} and head_size {expected[1]}."
                )


def _type_name(entry: onnx.ValueInfoProto) -> str:
    """Return the type of an input as `export --kv-cache` names it."""
    number = entry.type.tensor_type.elem_type
    known = number in onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(number) if known else str(number)
    return {"FLOAT": "float32"}.get(name, name.lower())
