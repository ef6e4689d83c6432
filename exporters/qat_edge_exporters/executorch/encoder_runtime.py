"""Run an encoder's .pte in the installed ExecuTorch runtime, in a process of its own.

A program that crashes the runtime then ends that process and not this one. `python -m ...encoder_runtime FOLDER TEXTS
OUTPUTS` reads the token ids of texts from a JSON file and writes float32 (texts, width) as .npy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError
from qat_edge.python_process import python_command

REFUSED = 65  # exit code of the process: the runtime refused the program or a text


def run_encoder(folder: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    """Run the program in an export folder on each text.

    Args:
        folder: holds model.pte.
        texts: token ids of each text.

    Returns:
        Logits or embeddings, (texts, width).

    Raises:
        ArtifactError: the runtime refuses the program, or a text, or it crashed.
    """
    path = folder / "model.pte"
    with tempfile.TemporaryDirectory(prefix="qat-edge-encoder-") as name:
        request, outputs = Path(name) / "texts.json", Path(name) / "outputs.npy"
        request.write_text(json.dumps([list(ids) for ids in texts]), encoding="utf-8")
        command = python_command(__name__, str(path), str(request), str(outputs))
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", check=False,
        )  # fmt: skip

        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if done.returncode == REFUSED:
            raise ArtifactError(f"{path}: ExecuTorch's runtime refused it: {lines[-1]}. Export again.")
        if done.returncode != 0 or not outputs.is_file():
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            last = f": {lines[-1]}" if lines else ""
            raise ArtifactError(f"{path}: ExecuTorch's runtime ended with {how}{last}. Export again.")
        return np.asarray(np.load(outputs))


def main(program_path: str, request: str, outputs: str) -> int:
    """Run the program on every text of the request; return the exit code."""
    # Only this process needs the runtime.
    import executorch.kernels.quantized  # noqa: F401  registers operators of the .pte
    import torch

    from qat_edge_exporters.executorch import compat_runtime

    try:
        program = compat_runtime.load_program(Path(program_path))
        found = []
        for ids in json.loads(Path(request).read_text(encoding="utf-8")):
            tokens = torch.tensor([ids])
            # A copy: the runtime reuses the memory of its output in the next call.
            found.append(program.forward((tokens, torch.ones_like(tokens)))[0].clone())
    except RuntimeError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return REFUSED
    np.save(outputs, torch.cat(found).numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
