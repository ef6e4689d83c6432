"""Every artifact loads in software that is not ours, by the programs of the guides. Adapters: test_onnx_adapter.py."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import export_to, freeze, llama

from tests.docs.doc_pages import code_blocks

# Title of the program in a guide -> target, and the package that is an extra of ours.
PROGRAMS = {
    "ExecuTorch": ("executorch", ""),
    "ONNX in onnxruntime-genai": ("onnx", ""),
    "GGUF in llama.cpp": ("gguf", "xllamacpp"),
    "Hugging Face in transformers": ("hf", "compressed_tensors"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "frozen"
    freeze(llama(), 32, folder)
    return folder


@pytest.mark.parametrize("title", PROGRAMS)
def test_the_program_of_the_guide_runs_without_this_package(title: str, checkpoint: Path, tmp_path: Path) -> None:
    target, extra = PROGRAMS[title]
    if extra and find_spec(extra) is None:
        pytest.skip(f"{extra} is not installed")
    (block,) = [each for each in code_blocks("python") if each.title == title]
    assert block.page.name in ("apps.md", "export.md")
    exports = tmp_path / "runs" / "mine" / "exports"
    exports.mkdir(parents=True)
    export_to(target, checkpoint, exports / target)

    script = f"{block.code}\nimport sys\nassert not [name for name in sys.modules if name.startswith('qat_edge')]"
    command = [sys.executable, "-I", "-c", script]  # isolated: nothing of this folder can be imported
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert done.stdout.strip()
