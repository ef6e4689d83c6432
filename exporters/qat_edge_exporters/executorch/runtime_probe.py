"""Load a program in the installed ExecuTorch runtime, in a separate process.

Usage: `python -m qat_edge_exporters.executorch.runtime_probe MODEL TOKENIZER < TEXTS`.

A process of its own because a damaged program or tokenizer can end it. Prints one line of JSON: operators and backends
that are registered, why a method cannot be loaded, and what the C++ tokenizer makes of the texts, a JSON list.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

NEVER_CAUSES = ("cpuinfo", "Registering")  # of the runtime's lines on stderr: notes about the machine


def ask(model: Path, tokenizer: Path, texts: list[str]) -> dict[str, Any]:
    """What the installed runtime says: operators, backends, error, tokenizer.

    error: empty where every method was loaded, delegates and all. tokenizer: None where there is no file.
    """
    command = [sys.executable, "-m", __name__, str(model), str(tokenizer)]
    answer = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    lines = answer.stdout.splitlines()
    if answer.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
    else:
        found = {"operators": [], "backends": [], "error": f"it ended the process ({answer.returncode})"}
        found["tokenizer"] = {"error": "not tried: the program ended the process"} if tokenizer.is_file() else None
    if found["error"]:
        causes = [line for line in answer.stderr.splitlines() if line.startswith("[")]
        causes = [line for line in causes if not any(part in line for part in NEVER_CAUSES)]
        found["error"] = "; ".join([found["error"], *(line.partition("] ")[2] for line in causes[:2])])
    return found


def main() -> None:
    """Load the program's methods and the tokenizer."""
    import executorch.kernels.quantized  # noqa: F401  (registers the quantized operators)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the LLM operators)
    from executorch.extension.pybindings import portable_lib

    found: dict[str, Any] = {
        "operators": portable_lib._get_operator_names(),
        "backends": portable_lib._get_registered_backend_names(),
        "error": "",
    }
    try:
        program = portable_lib._load_program(
            sys.argv[1], program_verification=portable_lib.Verification.InternalConsistency
        )
        for index in range(program.num_methods()):
            program.load_method(program.get_method_name(index))
    except RuntimeError as error:
        found["error"] = str(error)
    found["tokenizer"] = _words(Path(sys.argv[2]), json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def _words(path: Path, texts: list[str]) -> dict[str, Any] | None:
    from pytorch_tokenizers import pytorch_tokenizers_cpp

    if not path.is_file():
        return None
    words = pytorch_tokenizers_cpp.HFTokenizer()
    try:
        words.load(str(path))
        ids = [words.encode(text, 0, 0) for text in texts]
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "", "size": words.vocab_size(), "bos": words.bos_tok(), "eos": words.eos_tok(), "ids": ids}


if __name__ == "__main__":
    main()
