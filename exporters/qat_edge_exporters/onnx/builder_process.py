"""Run onnxruntime-genai's model builder in a process of its own: it prints and needs twice the memory of the model."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from qat_edge.errors import ExportError
from qat_edge.python_process import utf8_command
from qat_edge_exporters.onnx import names

ACCURACY_LEVEL = 4  # int8 activations, as trained; 8-bit nodes at any other level run about 100 times slower
BUILDER_OPTIONS = (
    f"accuracy_level={ACCURACY_LEVEL}",
    "fuse_qkv=false",
    "hf_token=false",
    "hf_remote=false",  # the builder reads configuration and weights, and needs no code of the model
    # A cache of the window alone would need buffers that only onnxruntime-genai makes; plain onnxruntime grows its own.
    "windowed_kv_cache=false",
)
LOG_LINES = 5  # of a failed builder, quoted by the error


def run_builder(source: Path, built: Path, precision: str, cache: Path) -> None:
    """Run the model builder on a folder.

    Args:
        source: checkpoint to read.
        built: folder to create.
        precision: "int4" for a folder of `olive_checkpoint`, "fp32" for a float checkpoint.
        cache: folder for temporary files.

    Raises:
        ExportError: it failed; its last lines are quoted.
    """
    exit_code, output = _run([
        "--input", str(source), "--output", str(built), "--precision", precision, "--execution_provider", "cpu",
        "--cache_dir", str(cache), "--extra_options", *BUILDER_OPTIONS,
    ])  # fmt: skip
    # Exit code 0 alone does not prove that a graph was written.
    if exit_code == 0 and (built / names.MODEL_FILE).is_file():
        return
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    ending = " | ".join(lines[-LOG_LINES:])
    raise ExportError(f"onnx: onnxruntime-genai's builder failed with exit code {exit_code}: {ending}")


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """Run the builder on its own arguments; return its exit code and what it printed."""
    done = subprocess.run(
        utf8_command("qat_edge_exporters.onnx.builder", *arguments),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # the checkpoint is complete: a request could only fail or wait
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout
