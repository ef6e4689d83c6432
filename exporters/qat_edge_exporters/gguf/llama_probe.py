"""Load a GGUF file in the installed llama.cpp, in a separate process, which a damaged file may crash.

Usage: `python -m qat_edge_exporters.gguf.llama_probe FILE`. It prints why the file cannot be loaded, and the tokens at
which llama.cpp ends a generation: it knows some by their texts, which no key of the file names. With the file of a
grammar after it, it prints why llama.cpp does not take that.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

from qat_edge_devices.agent.llama_grammar import LlamaGrammar
from qat_edge_devices.agent.llama_model import LlamaModel
from qat_edge_devices.agent.model_errors import RequestRejected
from qat_edge_exporters.file_diagnosis import one_line, print_report, run_probe

INSTALL = "not tried: pip install 'qat-edge[gguf]'"


@dataclass(frozen=True)
class LoadedWeights:
    """Result of loading a file.

    Attributes:
        error: why it cannot be loaded; empty if it can.
        end_tokens: ids at which llama.cpp ends a generation; None if the file was not loaded.
        untried: why the file was not given to llama.cpp; empty if it was.
    """

    error: str
    end_tokens: list[int] | None = None
    untried: str = ""


class WeightsLoader(LlamaModel):
    """A GGUF file in llama.cpp without a KV cache, whose size is a matter of the app."""

    def report(self, path: Path, grammar: Path | None = None) -> dict[str, object]:
        """Load a file, and return a report of it as JSON. grammar: that it has to take as well."""
        parameters = self._call("llama_model_default_params")
        model = self._call("llama_model_load_from_file", str(path).encode(), parameters)
        if not model:
            return {"error": one_line(self._reason())}
        vocabulary = self._call("llama_model_get_vocab", model)
        width = self._call("llama_vocab_n_tokens", vocabulary)
        if grammar is not None:
            try:
                LlamaGrammar(self._call, vocabulary, width, grammar.read_text(encoding="utf-8"), (), self._reason)
            except RequestRejected as error:
                return {"error": one_line(error)}
        return {"error": "", "end_tokens": _end_tokens(vocabulary, width)}


def _end_tokens(vocabulary: int, size: int) -> list[int] | None:
    """Return the ids that end a generation; None with a llama.cpp that does not tell."""
    import xllamacpp

    is_end = getattr(ctypes.CDLL(str(Path(xllamacpp.xllamacpp.__file__))), "llama_vocab_is_eog", None)
    if is_end is None:
        return None
    is_end.restype, is_end.argtypes = ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int32)
    return [token for token in range(size) if is_end(vocabulary, token)]


def load_file(path: Path) -> LoadedWeights:
    """Load a file in llama.cpp."""
    reports, ended = run_probe(__name__, str(path))
    return LoadedWeights(**reports[0]) if reports else LoadedWeights(ended)


def try_grammar(model: Path, grammar: Path) -> str:
    """Give a grammar to llama.cpp for a file; return why it does not take it, empty if it does."""
    reports, ended = run_probe(__name__, str(model), str(grammar))
    return str(reports[0]["error"]) if reports else ended


def main() -> None:
    """Load the file, and print the report."""
    try:
        print_report(WeightsLoader().report(*map(Path, sys.argv[1:])))
    except ModuleNotFoundError as error:
        print_report({"error": "", "untried": f"{INSTALL}  (found: {one_line(error)})"})


if __name__ == "__main__":
    main()
