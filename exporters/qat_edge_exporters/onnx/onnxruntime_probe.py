"""Load a graph in the installed onnxruntime or onnxruntime-genai, in a separate process, which a graph may crash.

Usage: `python -m qat_edge_exporters.onnx.onnxruntime_probe onnxruntime MODEL` or `... onnxruntime-genai FOLDER`, with a
file of a grammar after it or not.

onnxruntime prints two reports: its operators with the newest versions of the format that it reads, and why the graph
cannot be loaded. onnxruntime-genai prints one. It generates a token, because it does not compare the graph with its
configuration before.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat_edge_exporters.file_diagnosis import one_line, print_report, run_probe
from qat_edge_exporters.onnx.foreign_graph import operator_name
from qat_edge_exporters.onnx.genai_config import NEUTRAL_SEARCH

OLDEST_IR, OLDEST_OPSET = 8, 13  # from which on versions are tried; every onnxruntime of the last years reads them
MOST_VERSIONS = 100  # tried
# Parts of messages that say nothing to users: the path, the class of the error, and the place in the source.
NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*? failed:|/onnxruntime_src/\S+:\d+ .*?\) (?=[A-Z])",
    re.DOTALL,
)
# A message of guidance about an option that onnxruntime-genai does not pass on.
ONE_OF = re.compile(r"oneOf constraints are not supported\. Enable \S+ option to approximate oneOf with anyOf")
ANY_OF = "one value may fit two schemas of a oneOf, write anyOf there"


@dataclass(frozen=True)
class Loaded:
    """Result of loading a graph.

    Attributes:
        error: why it cannot be loaded; empty if it can.
        operators: names of all known operators; empty if the runtime listed none.
        ir_version: the newest that the runtime reads; 0 if it was not found out.
        opset: the newest of ONNX's own operators that it reads; 0 if it was not found out.
    """

    error: str
    operators: frozenset[str] = field(default_factory=frozenset)
    ir_version: int = 0
    opset: int = 0


def load_graph(path: Path) -> Loaded:
    """Load a graph in onnxruntime on the CPU."""
    reports, ended = run_probe(__name__, "onnxruntime", str(path))
    known: dict[str, Any] = reports[0] if reports else {"operators": [], "ir_version": 0, "opset": 0}
    error = reports[1] if len(reports) > 1 else ended
    return Loaded(error, frozenset(known["operators"]), known["ir_version"], known["opset"])


def run_folder(folder: Path) -> Loaded:
    """Load a folder in onnxruntime-genai and generate a token."""
    reports, ended = run_probe(__name__, "onnxruntime-genai", str(folder))
    return Loaded(reports[0] if reports else ended)


def try_grammar(model: Path, grammar: Path) -> str:
    """Generate a token under a grammar in onnxruntime-genai; return why that failed, empty if it did not.

    model: any file of the folder.
    """
    reports, ended = run_probe(__name__, "onnxruntime-genai", str(model.parent), str(grammar))
    return reports[0] if reports else ended


def main() -> None:
    """Load a graph or a folder, and print the reports."""
    runtime, path, *grammar = sys.argv[1:]
    if runtime == "onnxruntime":
        _load_graph(path)
    else:
        print_report(_error_of(lambda: _generate(path, *grammar)))


def _load_graph(path: str) -> None:
    import onnxruntime

    # onnxruntime 1.31 has no public list of its operators, and its exceptions have no common base class of their own.
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    onnxruntime.disable_telemetry_events()
    known = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the error itself is the result

    def load(graph: str | bytes) -> str:
        def create() -> None:
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

        return _error_of(create, *known)

    print_report(
        {
            "operators": sorted({operator_name(each.domain, each.name) for each in state.get_all_operator_schema()}),
            "ir_version": _newest(OLDEST_IR, lambda version: load(_smallest_graph(version, OLDEST_OPSET))),
            "opset": _newest(OLDEST_OPSET, lambda version: load(_smallest_graph(OLDEST_IR, version))),
        }
    )
    print_report(load(path))


def _generate(folder: str, grammar: str | None = None) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(folder)
    tokens = list(genai.Tokenizer(model).encode("a")) or [0]
    params = genai.GeneratorParams(model)
    params.set_search_options(**NEUTRAL_SEARCH, max_length=len(tokens) + 1)
    if grammar is not None:
        params.set_guidance("lark_grammar", Path(grammar).read_text(encoding="utf-8"))
    generator = genai.Generator(model, params)
    generator.append_tokens(tokens)
    generator.generate_next_token()


def _error_of(call: Callable[[], None], *known: type[Exception]) -> str:
    """Return the message of the exception that a runtime raises in a call; empty if it raises none."""
    errors: tuple[type[Exception], ...] = (*known, RuntimeError, ValueError, OSError, MemoryError)
    try:
        call()
    except errors as error:
        message = ONE_OF.sub(ANY_OF, NOISE.sub("", str(error)))
        return one_line(message).rstrip(".") or type(error).__name__
    return ""


def _newest(oldest: int, load: Callable[[int], str]) -> int:
    """Return the newest version that a runtime loads without an error; 0 if it does not load the oldest."""
    version = oldest
    while version < oldest + MOST_VERSIONS and not load(version):
        version += 1
    return version - 1 if version > oldest else 0


def _smallest_graph(ir_version: int, opset: int) -> bytes:
    """Return a graph of one node in the given versions."""
    from onnx import TensorProto, helper

    source, target = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", [source], [target])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
