"""The quickstart script and notebook run from beginning to end, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.doc_pages import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
SOURCES = os.pathsep.join(str(ROOT / folder) for folder in ("toolkit", "exporters", "devices"))


def test_the_script_runs(tiny_model_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(EXAMPLES / "quickstart.py"), "--tiny", "--model", str(tiny_model_folder),
            "--out", str(tmp_path / "run"), "--prompt", "Wake me",
        ],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": SOURCES}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "14 of 14 linear layers equal, embedding equal, head equal" in done.stdout
    assert "Wake me -> " in done.stdout
    assert (tmp_path / "run" / "reports" / "local.json").is_file()


def test_the_script_requires_held_out_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--data", "rows.jsonl"],
        env=os.environ | {"PYTHONPATH": SOURCES}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--eval-data" in done.stderr


def test_the_notebook_runs(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "INSTALL": "", "MODEL": str(tiny_model_folder), "OUT": str(tmp_path / "run"), "STEPS": "4", "BATCH_SIZE": "2",
        "TOKENS": "64", "PROMPTS": "2", "NEW_TOKENS": "4",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"QAT_EDGE_{name}", value)
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    # This interpreter's own kernel, whatever kernels the user has installed.
    kernels = tmp_path / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernels.joinpath("kernel.json").write_text(json.dumps({"argv": command, "display_name": "", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if cell.cell_type == "code"
    )
    assert "14 of 14 linear layers equal" in printed


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in cells[0].source
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count is not None] == []


def test_script_and_notebook_call_the_same_functions() -> None:
    names = ("finetune", "export", "verify", "validate", "generate")
    script = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    cells = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    assert all(f"{name}(" in script and f"{name}(" in cells for name in names)
