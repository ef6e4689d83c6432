"""Diagnose an ONNX graph of any tool: where it loads, and what its folder would do to an app's texts.

The graph is read in `foreign_graph`, its data files in `data_files`, genai_config.json in `genai_check`; runtimes load
it in a process of their own (`onnxruntime_probe`). For a folder of ours, `verify` compares it with its checkpoint, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from qat_edge import progress, readers
from qat_edge.data import conversation
from qat_edge.errors import ArtifactError, ModelError
from qat_edge.manifest import library_version
from qat_edge.models import artifact_options, tokenizer
from qat_edge.readers import counted
from qat_edge_exporters.executorch.pte.program_info import RuntimeCheck
from qat_edge_exporters.file_diagnosis import FileDiagnosis, FolderTokenizer, OnnxInfo, QuantizedMatrices
from qat_edge_exporters.onnx import (
    adapter_format,
    data_files,
    foreign_graph,
    genai_check,
    names,
    onnxruntime_probe,
    weight_values,
)
from qat_edge_exporters.onnx.data_files import DataFiles
from qat_edge_exporters.onnx.foreign_graph import INT4_TYPES, ForeignGraph, text
from qat_edge_exporters.onnx.names import INT8_ACTIVATIONS, TOKENIZER_FILES
from qat_edge_exporters.targets import GENAI, ONNX, ONNXRUNTIME

RUNTIMES = (ONNXRUNTIME, GENAI)
TOKEN_INPUTS = ("input_ids",)  # of a graph that reads tokens
# How many times as long a product with one token takes with float inputs as with int8 ones, by bits of the codes.
# onnxruntime 1.31.1 on x86-64 with AVX-512 VNNI, one thread, 1024 x 1024 in blocks of 32.
SLOWER_IN_FLOAT = {2: 50, 4: 4, 8: 70}
EMBEDDINGS = ("Gather", "GatherBlockQuantized")  # operators that look up rows of a table
# Operators that run a compiled graph of another processor, or Python code.
OTHER_CODE = ("EPContext", "PythonOp", "PythonOpGrad")


class _Folder(NamedTuple):
    """A graph with what its folder has for onnxruntime-genai; `config` is None without that."""

    graph: ForeignGraph
    data: DataFiles
    config: dict[str, Any] | None


class _TokenizerFindings(NamedTuple):
    """The tokenizer next to a graph, and the faults and notes about it."""

    found: FolderTokenizer | None
    faults: list[str]
    notes: list[str]


def diagnose_onnx(path: Path, runtimes: Sequence[str]) -> FileDiagnosis:
    """Examine the graph at `path` for each of `runtimes`; without any, for those that its folder is made for.

    Raises:
        ArtifactError: there is no ONNX graph, or it or genai_config.json cannot be read at all.
    """
    progress.info(f"Reading {path}")
    graph = foreign_graph.load(path)
    found = _Folder(graph, data_files.check_data_files(graph), _config_of(path))

    usual = RUNTIMES if found.config is not None else (ONNXRUNTIME,)
    checks = [_check_runtime(name, found) for name in runtimes or usual]
    words = _check_tokenizer(found)
    faults = [*found.data.faults, *weight_values.value_faults(graph, found.data), *words.faults]
    notes = [*_graph_notes(graph), *words.notes]
    if path.name == names.MODEL_FILE:
        faults += artifact_options.recorded_faults(path.parent, ONNX)
    for file in sorted(path.parent.glob(f"*{Path(names.ADAPTER_FILE).suffix}")):
        faults += _adapter_faults(file, graph)
    if found.config is not None:
        faults += genai_check.config_faults(found.config, graph)
        notes += genai_check.config_notes(found.config, graph)
    return FileDiagnosis(
        path=path,
        format=ONNX,
        runtimes=checks,
        faults=faults,
        notes=notes,
        contents=_contents(found),
        tokenizer=words.found,
        installed={name: library_version(name) or "none" for name in RUNTIMES},
    )


def _adapter_faults(file: Path, graph: ForeignGraph) -> list[str]:
    """Return a fault for each parameter of an adapter file that does not fit the graph next to it."""
    try:
        parameters = adapter_format.read(file)
    except ArtifactError as error:
        return [str(error)]
    inputs = {text(entry.name): entry.type.tensor_type.shape.dim for entry in graph.model.graph.input}
    faults = []
    for name, values in parameters.items():
        if name not in inputs:
            faults.append(f"'{readers.shorten(name)}' is no input of {graph.path.name}.")
            continue
        sizes = [size.dim_value for size in inputs[name]]  # 0 for one that is free, such as the rank
        fits = len(sizes) == values.ndim and all(
            size in (0, own) for size, own in zip(sizes, values.shape, strict=True)
        )
        if not fits:
            faults.append(
                f"'{readers.shorten(name)}' {values.shape} does not fit the input of {graph.path.name}, {sizes}."
            )
        elif not np.isfinite(values).all():
            faults.append(f"'{readers.shorten(name)}' has numbers that are not finite.")
    return [f"{file.name}: {fault} Copy or train the adapter again." for fault in faults]


def _config_of(path: Path) -> dict[str, Any] | None:
    """Return the configuration next to a graph, if it is that of this graph."""
    config = genai_check.read_config(path.parent)
    return config if config is not None and genai_check.decoder_file(config) == path.name else None


def _contents(folder: _Folder) -> OnnxInfo:
    graph, config, model = folder.graph, folder.config or {}, folder.graph.model
    return OnnxInfo(
        producer=" ".join(filter(None, (text(model.producer_name), text(model.producer_version)))),
        ir_version=model.ir_version,
        opsets=graph.opsets,
        operators=graph.operators,
        inputs=graph.inputs,
        outputs=graph.outputs,
        matrices=graph.matrices,
        size_bytes={graph.path.name: graph.path.stat().st_size, **folder.data.size_bytes},
        context_length=genai_check.context_length(config),
        end_tokens=genai_check.end_tokens(config),
    )


# --- runtimes ------------------------------------------------------------------------------------------------


def _check_runtime(name: str, folder: _Folder) -> RuntimeCheck:
    """Load the graph, or its folder, in a runtime, unless that would run other code or read other files."""
    graph = folder.graph
    title = f"{name} {library_version(name) or 'is not installed'}"
    untried = _why_untried(name, folder)
    if untried:
        return RuntimeCheck(name, title, "the files", [], [], untried=untried)
    progress.info(f"Loading it with the installed {name}")
    if name == GENAI:
        error = onnxruntime_probe.run_folder(graph.path.parent).error
        return RuntimeCheck(name, title, "loading the folder, and generating a token", [], [], tried=True, error=error)

    loaded = onnxruntime_probe.load_graph(graph.path)
    missing = sorted(set(graph.operators) - loaded.operators - graph.functions) if loaded.operators else []
    # The error is about a missing operator, too, or about the versions of the format.
    error = _version_error(graph, loaded) or ("" if missing else loaded.error)
    source = "its registered operators, and loading the file"
    return RuntimeCheck(name, _with_versions(title, loaded), source, missing, [], tried=True, error=error)


def _why_untried(name: str, folder: _Folder) -> str:
    """Return why a runtime does not get the graph, as a phrase; empty where it does."""
    graph = folder.graph
    if library_version(name) is None:
        return f"not tried: pip install {name}"
    if folder.data.leads_outside:
        return "not tried, because the graph names files outside of its folder"
    other = sorted({text(node.op_type) for node in graph.nodes} & set(OTHER_CODE))
    if other:
        return f"not tried, because the operator {other[0]} runs other code"
    if name != GENAI:
        return ""
    if folder.config is None:
        return f"not tried: there is no {names.GENAI_CONFIG} that names {graph.path.name}"
    return genai_check.why_untried(folder.config, graph.path.parent)


def _with_versions(title: str, loaded: onnxruntime_probe.Loaded) -> str:
    if not loaded.ir_version or not loaded.opset:
        return title
    return f"{title}, which reads IR versions up to {loaded.ir_version} and opsets up to {loaded.opset}"


def _version_error(graph: ForeignGraph, loaded: onnxruntime_probe.Loaded) -> str:
    """Return which version of the format is too new for the runtime; empty where none is."""
    opset = graph.opsets.get(foreign_graph.STANDARD, 0)
    if loaded.ir_version and graph.model.ir_version > loaded.ir_version:
        return (
            f"IR version {graph.model.ir_version} is newer than the {loaded.ir_version} that it reads: install a newer "
            "onnxruntime, or save the graph with an older onnx"
        )
    if loaded.opset and opset > loaded.opset:
        return (
            f"opset {opset} is newer than the {loaded.opset} that it reads: install a newer onnxruntime, or export "
            "with an older opset (onnx.version_converter)"
        )
    return ""


# --- notes on the graph --------------------------------------------------------------------------------------


def _graph_notes(graph: ForeignGraph) -> list[str]:
    """Return what makes the graph slow, one sentence each."""
    found = [note for matrices in graph.matrices if (note := _matrix_note(matrices))]
    unfused = [
        node
        for node in graph.nodes
        if node.op_type == "DequantizeLinear" and node.input and _type_of(graph, text(node.input[0])) in INT4_TYPES
    ]
    if unfused:
        found.append(
            f"{counted(len(unfused), 'matrix in int4 is', 'matrices in int4 are')} read by DequantizeLinear, which "
            "onnxruntime does not join with products on a CPU: each is dequantized again for every token. MatMulNBits "
            "nodes compute with the codes."
        )
    if _is_decoder(graph) and not any("past" in entry.name for entry in graph.inputs):
        found.append("The graph has no inputs for a KV cache: every token computes the whole text again.")
    graphs = sorted({path.name for path in graph.path.parent.glob("*.onnx")} - {graph.path.name})
    if graphs:
        found.append(f"Not examined: {counted(len(graphs), 'other graph')} in the folder, such as {text(graphs[0])}.")
    return found


def _matrix_note(matrices: QuantizedMatrices) -> str:
    if matrices.accuracy_level == INT8_ACTIVATIONS:
        return ""
    slower = SLOWER_IN_FLOAT.get(matrices.bits)
    times = f", and a token takes about {slower} times as long (measured on x86-64)" if slower else ""
    return (
        f"{counted(matrices.count, 'MatMulNBits node')} of {matrices.bits} bits with accuracy_level "
        f"{matrices.accuracy_level}: inputs stay in float{times}. With level {INT8_ACTIVATIONS} they are int8, which "
        "gives other numbers: set it if the model was made for that (accuracy_level=4 of onnxruntime-genai's builder)."
    )


def _type_of(graph: ForeignGraph, name: str) -> int | None:
    tensor = graph.initializers.get(name)
    return None if tensor is None else int(tensor.data_type)


def _is_decoder(graph: ForeignGraph) -> bool:
    return _reads_tokens(graph) and any(entry.name == "logits" and len(entry.shape) == 3 for entry in graph.outputs)


def _reads_tokens(graph: ForeignGraph) -> bool:
    return any(entry.name in TOKEN_INPUTS for entry in graph.inputs)


# --- tokenizer -----------------------------------------------------------------------------------------------


def _check_tokenizer(folder: _Folder) -> _TokenizerFindings:
    """Load the tokenizer next to a graph that reads tokens, and compare it with the graph."""
    graph = folder.graph
    if not _reads_tokens(graph) and folder.config is None:
        return _TokenizerFindings(None, [], [])
    path = graph.path.parent
    absent = [name for name in TOKENIZER_FILES if not (path / name).is_file()]
    if absent and folder.config is not None:
        faults = [f"{name}: missing, so that {GENAI} cannot read a prompt. Copy it from the model." for name in absent]
        return _TokenizerFindings(None, faults, [])
    if len(absent) == len(TOKENIZER_FILES):
        return _TokenizerFindings(
            None, [], [f"There is no tokenizer next to {graph.path.name}: apps need the model's."]
        )
    try:
        loaded = tokenizer.load_tokenizer(path, advice="Copy the tokenizer's files from the model again.")
        faults = list(_tokenizer_faults(folder, loaded))
    except ModelError as error:
        return _TokenizerFindings(None, [str(error)], [])
    found = FolderTokenizer(len(loaded), bool(loaded.chat_template))
    notes = [] if found.has_chat_template or not _is_decoder(graph) else ["The tokenizer has no chat template."]
    return _TokenizerFindings(found, faults, notes)


def _tokenizer_faults(folder: _Folder, loaded: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield disagreements between the tokenizer, the tables of tokens and the tokens that end a generation."""
    graph, path = folder.graph, folder.graph.path.parent
    largest, rows = max(loaded.get_vocab().values(), default=0), _token_rows(graph)
    if rows is not None and largest >= rows:
        yield (
            f"The tokenizer has the token {largest}, and {graph.path.name} has embeddings or logits of {rows} tokens: "
            "it belongs to another model. Copy the tokenizer of this one."
        )
    if _is_decoder(graph):
        ends = tokenizer.end_tokens(path) if folder.config is None else genai_check.end_tokens(folder.config)
        yield from conversation.template_faults(loaded, ends, tokenizer.recorded_end_tokens(path))


def _token_rows(graph: ForeignGraph) -> int | None:
    """Return how many tokens have both an embedding and a logit in the graph; None where its shapes do not say."""
    sizes = [genai_check.last_size(graph.outputs, "logits")] if _is_decoder(graph) else []
    for node in graph.nodes:
        if node.op_type in EMBEDDINGS and len(node.input) > 1 and text(node.input[1]) in TOKEN_INPUTS:
            table = graph.initializers.get(text(node.input[0]))
            sizes.append(table.dims[0] if table is not None and table.dims else None)
    return min((size for size in sizes if size is not None), default=None)
