"""Load a program in the installed ExecuTorch runtime, in a separate process.

Usage: `python -m qat_edge_exporters.executorch.runtime_probe TOKENIZER [MODEL] < TEXTS`.

The process is separate because a damaged program or tokenizer can crash it. It prints one line of JSON: the registered
operators and backends, why a method cannot be loaded, and the C++ tokenizer's ids of the texts, which are a JSON list.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

from qat_edge.python_process import utf8_command

NEVER_CAUSES = ("cpuinfo", "Registering")  # in the runtime's lines on stderr: notes about the machine


class ProbedTokenizer(TypedDict, total=False):
    """ExecuTorch's C++ tokenizer library on a tokenizer.json; only `error` if it cannot be loaded."""

    error: str
    size: int
    bos: int
    eos: int
    ids: list[list[int]]  # of each text


class Probed(TypedDict):
    """Report of the separate process.

    Keys:
        operators: full names of the registered operators.
        backends: names of the registered backends.
        error: empty if every method was loaded, delegates included.
        tokenizer: None if there is no tokenizer.json.
    """

    operators: list[str]
    backends: list[str]
    error: str
    tokenizer: ProbedTokenizer | None


def probe(model: Path | None, tokenizer: Path, texts: list[str]) -> Probed:
    """Load a .pte and its tokenizer in a separate process, and return what it reports; the tokenizer alone for None."""
    command = utf8_command(__name__, str(tokenizer), *([] if model is None else [str(model)]))
    done = subprocess.run(
        command, input=json.dumps(texts), capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    # The report is the last line; the runtime itself may have printed others.
    lines = done.stdout.splitlines()
    found: Probed
    if done.returncode == 0 and lines:
        found = json.loads(lines[-1])
    else:
        untried: ProbedTokenizer = {"error": "not tried: the program ended the process"}
        found = {
            "operators": [],
            "backends": [],
            "error": f"it ended the process ({done.returncode})",
            "tokenizer": untried if tokenizer.is_file() else None,
        }

    # The exception names the method only; the runtime logs the cause to stderr.
    if found["error"]:
        causes = [line for line in done.stderr.splitlines() if line.startswith("[")]
        causes = [line for line in causes if not any(part in line for part in NEVER_CAUSES)]
        found["error"] = "; ".join([found["error"], *(line.partition("] ")[2] for line in causes[:2])])
    return found


def main() -> None:
    """Load the program's methods and the tokenizer, and print the report."""
    found: Probed = {"operators": [], "backends": [], "error": "", "tokenizer": None}
    if len(sys.argv) > 2:
        found = _load_program(Path(sys.argv[2]))
    found["tokenizer"] = _tokenize(Path(sys.argv[1]), json.load(sys.stdin))
    # The runtime may have printed a line without an end.
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def _load_program(model: Path) -> Probed:
    """Load every method of a program; a failure is a result."""
    import executorch.kernels.quantized  # noqa: F401  (registers the quantized operators)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the LLM operators)

    from qat_edge_exporters.executorch import compat_runtime

    # A failure is a result: the registered operators are reported all the same.
    error = ""
    try:
        compat_runtime.load_every_method(model)
    except RuntimeError as failure:
        error = str(failure)
    return {
        "operators": compat_runtime.registered_operators(),
        "backends": compat_runtime.registered_backends(),
        "error": error,
        "tokenizer": None,
    }


def _tokenize(path: Path, texts: list[str]) -> ProbedTokenizer | None:
    """Split texts with the tokenizer library of ExecuTorch's runner; None without a file."""
    from pytorch_tokenizers import pytorch_tokenizers_cpp

    if not path.is_file():
        return None
    # 0, 0: no bos and eos tokens around the text.
    tokenizer = pytorch_tokenizers_cpp.HFTokenizer()
    try:
        tokenizer.load(str(path))
        ids = [tokenizer.encode(text, 0, 0) for text in texts]
    except RuntimeError as error:
        return {"error": str(error)}
    return {
        "error": "",
        "size": tokenizer.vocab_size(),
        "bos": tokenizer.bos_tok(),
        "eos": tokenizer.eos_tok(),
        "ids": ids,
    }


if __name__ == "__main__":
    main()
