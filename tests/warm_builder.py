"""Run onnxruntime-genai's builder in forks of one process that has imported it.

A process of its own, as the export starts one, imports for eight seconds and builds a tiny model in one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

MODULE = "qat_edge_exporters.onnx.builder"
IMPORTS = ["onnxruntime_genai.models.builder", "transformers.models.llama.modeling_llama", MODULE]


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Run the builder on its own arguments; return its exit code and what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)  # read when the first process starts
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = context.Process(target=_build, args=(list(arguments), str(log)))
        process.start()
        process.join()
        return process.exitcode or 0, log.read_text(encoding="utf-8", errors="replace")


def _build(arguments: list[str], log: str) -> None:
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [MODULE, *arguments]
    runpy.run_module(MODULE, run_name="__main__")
