"""Compare a genai_config.json of any tool with its graph.

onnxruntime-genai 0.18 loads a folder without comparing the two, so that rotary tables that are too short show after so
many tokens only. A key that is missing has the default in `genai_config.TENSORS`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.readers import counted
from qat_edge_exporters.file_diagnosis import GraphValue
from qat_edge_exporters.onnx import genai_config, names
from qat_edge_exporters.onnx.foreign_graph import MICROSOFT, ForeignGraph, text

LAYER = "%d"  # stands for the number of a layer in a name
NEEDED_INPUTS = ("input_ids", "past_key_names", "past_value_names")  # others are given where the graph has them
# Operators that append to a cache -> pairs of the input with it and the output with one more token.
CACHES = {
    "GroupQueryAttention": ((3, 1), (4, 2)),
    "MultiHeadAttention": ((6, 1), (7, 2)),
    "Attention": ((4, 1), (5, 2)),  # of ONNX itself, from opset 23 on
    "Concat": ((0, 0),),
}
CACHE_RANK = 4  # (batch, heads, tokens, channels)
FIXED = "Correct it, or build the folder again."


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return genai_config.json of a folder; None without one.

    Raises:
        ArtifactError: it is no JSON object.
    """
    path = folder / names.GENAI_CONFIG
    return readers.read_object(path, ArtifactError) if path.exists() else None


def decoder_file(config: Mapping[str, Any]) -> str:
    """Return the name of the decoder's graph; empty where the configuration names none in its own folder."""
    name = _object(_object(config, "model"), "decoder").get("filename")
    return name if isinstance(name, str) and Path(name).name == name and "\\" not in name else ""


def why_untried(config: dict[str, Any], folder: Path) -> str:
    """Return why the runtime may not get the folder, as a phrase; empty where it may.

    Some keys load native libraries or other files, so that a key that is not known to be harmless is not passed on.
    """
    checked = copy.deepcopy(config)
    if decoder_file(config):
        checked["model"]["decoder"]["filename"] = names.MODEL_FILE
    try:
        genai_config.check_keys(checked, folder / names.GENAI_CONFIG)
    except ArtifactError as error:
        found = str(error).removeprefix(f"{folder / names.GENAI_CONFIG}: ")
        return f"not tried, because it may load other code or files: {found.partition('. ')[0]}"
    return ""


def end_tokens(config: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a generation."""
    found = _object(config, "model").get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return [each for each in ids if type(each) is int and each >= 0]


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that the configuration permits; None where it is no number."""
    return _number(_object(config, "model"), "context_length")


def config_faults(config: Mapping[str, Any], graph: ForeignGraph) -> list[str]:
    """Return how the configuration contradicts its graph, one sentence each."""
    model = _object(config, "model")
    decoder = _object(model, "decoder")
    if not decoder:
        return [f"{names.GENAI_CONFIG}: no model.decoder, so nothing generates text. {FIXED}"]
    found = [
        *_name_faults(decoder, graph),
        *_cache_faults(decoder, graph),
        *_pair_faults(decoder, graph),
        *_length_faults(config, graph),
        *_token_faults(model, graph),
    ]
    return [f"{names.GENAI_CONFIG}: {each} {FIXED}" for each in found]


def config_notes(config: Mapping[str, Any], graph: ForeignGraph) -> list[str]:
    """Return settings that a user would not expect, one sentence each.

    onnxruntime-genai 0.18 takes the number of layers and heads from the graph: with others in the configuration it gave
    the same logits.
    """
    decoder, search = _object(_object(config, "model"), "decoder"), _object(config, "search")
    found = []
    caches = _caches(decoder, graph)
    if caches and _number(decoder, "num_hidden_layers") != len(caches):
        found.append(
            f"decoder.num_hidden_layers is {readers.show(decoder.get('num_hidden_layers'))}, and {graph.path.name} has "
            f"a cache for {counted(len(caches), 'layer')}, which is what onnxruntime-genai goes by."
        )
    found += _shape_findings(decoder, graph, 1, "num_key_value_heads")
    context, longest = context_length(config), _number(search, "max_length")
    if context is not None and longest is not None and longest > context:
        found.append(f"search.max_length {longest} is more than model.context_length {context}.")
    if search.get("do_sample") is True:
        found.append("search.do_sample is on, so that every answer is drawn at random unless an app changes that.")
    return [f"{names.GENAI_CONFIG}: {each}" for each in found]


def _name_faults(decoder: Mapping[str, Any], graph: ForeignGraph) -> Iterator[str]:
    """Yield names of inputs and outputs that the graph lacks."""
    for kind, entries in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        for key, name in _names(decoder, kind).items():
            is_needed = kind == "outputs" or key in NEEDED_INPUTS
            if is_needed and not any(_pattern(name).fullmatch(entry.name) for entry in entries):
                yield f"decoder.{kind}.{key} names {name!r}, and {graph.path.name} has no such {kind[:-1]}."


def _cache_faults(decoder: Mapping[str, Any], graph: ForeignGraph) -> list[str]:
    """Return where the width of a head is not that of the cache's inputs."""
    return _shape_findings(decoder, graph, 3, "head_size")


def _pair_faults(decoder: Mapping[str, Any], graph: ForeignGraph) -> Iterator[str]:
    """Yield caches that the graph writes to another output than the configuration reads them back from."""
    written = {}
    for node in graph.nodes:
        for given, output in CACHES.get(node.op_type, ()):
            if given < len(node.input) and output < len(node.output):
                written[text(node.input[given])] = text(node.output[output])
    inputs, outputs = _names(decoder, "inputs"), _names(decoder, "outputs")
    known = {entry.name for entry in graph.outputs}
    for kind in ("key", "value"):
        pattern, name = _pattern(inputs[f"past_{kind}_names"]), outputs[f"present_{kind}_names"]
        for past, present in written.items():
            read = pattern.fullmatch(past)
            if read is None or present not in known:
                continue
            expected = name.replace(LAYER, read[1]) if read.groups() else name
            if present != expected:
                yield (
                    f"decoder.outputs.present_{kind}_names gives {expected!r} back as {past!r}, and {graph.path.name} "
                    f"writes that cache to {present!r}."
                )
                break


def _shape_findings(decoder: Mapping[str, Any], graph: ForeignGraph, index: int, key: str) -> list[str]:
    """Name the first input of the cache that has another fixed size in a dimension than the configuration."""
    expected = decoder.get(key)
    for entry in _caches(decoder, graph):
        size = entry.shape[index] if len(entry.shape) == CACHE_RANK else None
        if isinstance(size, int) and size > 0 and size != expected:
            return [f"decoder.{key} is {readers.show(expected)}, and {graph.path.name} has the input {entry}."]
    return []


def _caches(decoder: Mapping[str, Any], graph: ForeignGraph) -> list[GraphValue]:
    """Return the inputs for the keys of each layer that are in a cache."""
    pattern = _pattern(_names(decoder, "inputs")["past_key_names"])
    return [entry for entry in graph.inputs if pattern.fullmatch(entry.name)]


def _pattern(name: str) -> re.Pattern[str]:
    """Return the pattern of a name with a number of a layer."""
    return re.compile(re.escape(name).replace(re.escape(LAYER), "([0-9]+)"))


def _length_faults(config: Mapping[str, Any], graph: ForeignGraph) -> Iterator[str]:
    """Yield where the context is longer than the rotary tables."""
    context = context_length(config)
    if context is None:
        yield "model.context_length is missing."
        return
    positions = rotary_positions(graph)
    if positions is not None and positions < context:
        yield (
            f"model.context_length is {context}, and the rotary tables of {graph.path.name} have {positions} rows: "
            "later tokens have no position."
        )


def _token_faults(model: Mapping[str, Any], graph: ForeignGraph) -> Iterator[str]:
    """Yield end tokens that are none, and a vocabulary of another size than the logits."""
    ends = end_tokens({"model": model})
    if not ends:
        yield f"model.eos_token_id is {readers.show(model.get('eos_token_id'))}, so that a generation would never end."
    name = _names(_object(model, "decoder"), "outputs")["logits"]
    width = last_size(graph.outputs, name)
    if width is None:
        return
    outside = [token for token in ends if token >= width]
    if outside:
        yield f"the end token {outside[0]} is none of the {width} tokens of {graph.path.name}."
    vocabulary = _number(model, "vocab_size")
    if vocabulary != width:
        yield f"model.vocab_size is {readers.show(vocabulary)}, and {graph.path.name} has logits of {width} tokens."


def rotary_positions(graph: ForeignGraph) -> int | None:
    """Return the rows of the shortest rotary table that a node reads; None without such a table."""
    tables = []
    for node in graph.nodes:
        first = _first_table(text(node.op_type), text(node.domain))
        stored = [graph.initializers.get(text(name)) for name in node.input[first : first + 2]] if first else []
        tables += [tensor.dims[0] for tensor in stored if tensor is not None and len(tensor.dims) == 2]
    return min(tables, default=None)


def _first_table(operator: str, domain: str) -> int:
    """Return the number of an operator's input with the cosines, which the sines follow; 0 where it has none."""
    if operator == names.ATTENTION:
        return 7
    if operator == "RotaryEmbedding":
        return 2 if domain == MICROSOFT else 1
    return 0


def last_size(entries: list[GraphValue], name: str) -> int | None:
    """Return the last dimension of an input or output; None where there is none, or it may vary."""
    shapes = [entry.shape for entry in entries if entry.name == name]
    size = shapes[0][-1] if shapes and shapes[0] else None
    return size if isinstance(size, int) and size > 0 else None


def _names(decoder: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Return the names of inputs or outputs by key, the runtime's own for those that are missing."""
    usual = {key.partition(".")[2]: name for key, name in genai_config.TENSORS.items() if key.startswith(f"{kind}.")}
    given = {key: name for key, name in _object(decoder, kind).items() if isinstance(name, str)}
    return usual | given


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def _number(document: Mapping[str, Any], key: str) -> int | None:
    found = document.get(key)
    return found if type(found) is int and found > 0 else None
