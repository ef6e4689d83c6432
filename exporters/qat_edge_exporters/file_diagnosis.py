"""Plain values that describe an ONNX graph or a GGUF file, for `qat-edge doctor`, and helpers of both examinations.

The names of the fields are the keys of its --json output. A file may come from any tool: a fault is only what keeps a
runtime from loading it or changes what it computes; everything else that a user should know is a note.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.python_process import utf8_command
from qat_edge_exporters.executorch.pte.program_info import RuntimeCheck

SHOWN = 3  # findings of one kind that are named; the others are counted
# Scales and weights above it are damage: those of models are below 1e5, and float32 ends at 3.4e38, which products with
# codes and sums over inputs would pass.
LARGEST_FACTOR = 1e32
LOADING_S = 600  # until a runtime that does not finish loading is ended
REASON_CHARACTERS = 400  # of a runtime's message
REPORT = "qat-edge report: "  # begins a line of a separate process that is for us


@dataclass(frozen=True)
class GraphValue:
    """An input or output of a graph.

    Attributes:
        name: of the value.
        dtype: ONNX's name of its type, in lower case.
        shape: sizes; a text for one that may vary.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class QuantizedMatrices:
    """Nodes that multiply by a quantized matrix in the same way.

    Attributes:
        operator: of the nodes.
        bits: of a code.
        block_size: weights that share a scale.
        accuracy_level: of MatMulNBits; 4 computes with int8 inputs, 0 to 3 with float ones.
        zero_points: whether the nodes have zero points.
        count: number of nodes.
    """

    operator: str
    bits: int
    block_size: int
    accuracy_level: int
    zero_points: bool
    count: int


@dataclass(frozen=True)
class OnnxInfo:
    """Contents of an ONNX graph.

    Attributes:
        producer: tool and version that wrote the graph.
        ir_version: of the file format.
        opsets: version of the operators, by domain.
        operators: number of nodes, by the operator's name with its domain.
        inputs: of the graph.
        outputs: of the graph.
        matrices: quantized matrices, by the way of multiplying.
        size_bytes: of the graph and of its data files, by name.
        context_length: tokens, from genai_config.json; None without one.
        end_tokens: ids that end a generation; empty where none are known.
    """

    producer: str
    ir_version: int
    opsets: dict[str, int]
    operators: dict[str, int]
    inputs: list[GraphValue]
    outputs: list[GraphValue]
    matrices: list[QuantizedMatrices]
    size_bytes: dict[str, int]
    context_length: int | None
    end_tokens: list[int]


@dataclass(frozen=True)
class TypeCount:
    """Tensors of one type in a GGUF file.

    Attributes:
        name: ggml's.
        count: of tensors.
        size_bytes: of all of them.
    """

    name: str
    count: int
    size_bytes: int


@dataclass(frozen=True)
class GgufInfo:
    """Contents of a GGUF file.

    Attributes:
        version: of the format.
        architecture: llama.cpp's name of it.
        name: of the model; empty where the file has none.
        types: tensors by type.
        context_length: tokens.
        rope: settings of the rotary embedding, by key.
        vocabulary: number of tokens.
        rows: of the embedding; None without one.
        tied: whether embedding and head share one table.
        end_tokens: ids that end a generation.
        tokenizer: llama.cpp's names of its model and of the rule by which texts are split.
        has_chat_template: whether the file has one.
        size_bytes: of the file.
    """

    version: int
    architecture: str
    name: str
    types: list[TypeCount]
    context_length: int | None
    rope: dict[str, Any]
    vocabulary: int
    rows: int | None
    tied: bool
    end_tokens: list[int]
    tokenizer: str
    has_chat_template: bool
    size_bytes: int


@dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer next to a graph.

    Attributes:
        size: number of tokens.
        has_chat_template: whether it has one.
    """

    size: int
    has_chat_template: bool


@dataclass(frozen=True)
class SchemaCheck:
    """Result of examining schema.json and the grammar next to a model.

    Attributes:
        runtime: that constrains answers by it; empty for none.
        note: what an app has to do, or why nothing constrains, as a sentence.
        tried: whether the installed runtime took the grammar.
        faults: what is wrong, a sentence each.
    """

    runtime: str
    note: str
    tried: bool
    faults: list[str]


@dataclass(frozen=True)
class FileDiagnosis:
    """All findings about one ONNX graph or GGUF file.

    Attributes:
        path: of the file.
        format: "onnx" or "gguf".
        runtimes: one check for each runtime.
        faults: what keeps a runtime from loading it, or changes what it computes, one sentence each.
        notes: what else a user should know, one sentence each.
        contents: of the file.
        tokenizer: next to an ONNX graph; None without one that can be loaded.
        installed: versions in this environment, by library.
        schema: schema of the answers next to it; None without one.
    """

    path: Path
    format: str
    runtimes: list[RuntimeCheck]
    faults: list[str]
    notes: list[str]
    contents: OnnxInfo | GgufInfo
    tokenizer: FolderTokenizer | None = None
    installed: dict[str, str] = field(default_factory=dict)
    schema: SchemaCheck | None = None


def require_file(path: Path) -> None:
    """Require a file that can be opened.

    Raises:
        ArtifactError: it is missing, a folder or a pipe, or may not be read.
    """
    try:
        if not path.exists():
            raise ArtifactError(f"{path}: no such file. Give the path of a file, or of its folder.")
        if not path.is_file():
            raise ArtifactError(f"{path}: not a file, but a folder, pipe or device. Give the path of a file.")
        with path.open("rb"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{path}: cannot be read ({reason}). Check its permissions and its disk.") from error


def few(findings: Iterable[str]) -> list[str]:
    """Return the first findings of one kind, and a sentence that counts the others."""
    found = list(findings)
    others = len(found) - SHOWN
    return found[:SHOWN] + ([f"And {others} more like the one before."] if others > 0 else [])


def run_probe(module: str, *arguments: str) -> tuple[list[Any], str]:
    """Load a file in a runtime, in a separate process, which a damaged file may crash.

    Args:
        module: program that loads it, and prints reports as lines of JSON.
        arguments: of the program.

    Returns:
        Reports that it printed, and how it ended, which explains a report that is missing.
    """
    try:
        done = subprocess.run(
            utf8_command(module, *arguments), capture_output=True, encoding="utf-8", errors="replace", check=False,
            stdin=subprocess.DEVNULL, timeout=LOADING_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], f"it did not load within {LOADING_S} s"
    # A runtime prints lines of its own.
    reports = [json.loads(line.removeprefix(REPORT)) for line in done.stdout.splitlines() if line.startswith(REPORT)]
    ended = f"it ended the process ({done.returncode})"
    if done.stderr.strip():
        ended += f": {one_line(done.stderr.strip().splitlines()[-1])}"
    return reports, ended


def print_report(report: Any) -> None:
    """Print a report from the separate process."""
    # The runtime may have printed a line without an end.
    print(f"\n{REPORT}{json.dumps(report)}", flush=True)


def one_line(message: object) -> str:
    """Return a runtime's message as one line of limited length."""
    return readers.shorten(" ".join(str(message).split()), REASON_CHARACTERS)
