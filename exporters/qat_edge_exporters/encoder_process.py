"""Run an encoder's artifact in a process of its own: a file that crashes its runtime then ends that process alone.

`python -m RUNNER ARTIFACT TEXTS OUTPUTS` reads the token ids of texts from a JSON file and writes float32
(texts, width) as .npy. RUNNER is a module whose `__main__` block calls `serve`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError
from qat_edge.python_process import utf8_command

REFUSED = 65  # exit code of the process: the runtime refused the artifact or a text


class TextRefused(Exception):
    """The runtime refused an artifact or a text; the message has the reason."""


def run_texts(runner: str, artifact: Path, texts: Sequence[list[int]], runtime: str) -> NDArray[np.float32]:
    """Run an artifact on each text.

    Args:
        runner: module that is run in the process.
        artifact: file that it loads.
        texts: token ids of each text.
        runtime: name of the runtime, for messages.

    Returns:
        Logits or embeddings, (texts, width).

    Raises:
        ArtifactError: the runtime refuses the artifact, or a text, or it crashed.
    """
    with tempfile.TemporaryDirectory(prefix="qat-edge-encoder-") as name:
        request, outputs = Path(name) / "texts.json", Path(name) / "outputs.npy"
        request.write_text(json.dumps([list(ids) for ids in texts]), encoding="utf-8")
        command = utf8_command(runner, str(artifact), str(request), str(outputs))
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
            errors="replace", check=False,
        )  # fmt: skip

        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if done.returncode == REFUSED:
            raise ArtifactError(f"{artifact}: {runtime} refused it: {lines[-1]}. Export again.")
        if done.returncode != 0 or not outputs.is_file():
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            last = f": {lines[-1]}" if lines else ""
            raise ArtifactError(f"{artifact}: {runtime} ended with {how}{last}. Export again.")
        return np.asarray(np.load(outputs))


def serve(outputs_of: Callable[[Path, Sequence[list[int]]], NDArray[np.float32]]) -> int:
    """Run the artifact of this process's arguments on every text of the request; return the exit code.

    Args:
        outputs_of: computes the outputs (texts, width) of an artifact for texts; raises `TextRefused`.
    """
    artifact, request, outputs = sys.argv[1:]
    try:
        found = outputs_of(Path(artifact), json.loads(Path(request).read_text(encoding="utf-8")))
    except TextRefused as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return REFUSED
    np.save(outputs, found)
    return 0
