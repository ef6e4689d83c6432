"""`optimum-cli export qat-edge`: listed by optimum, the same run as ours, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import plain_rows
from qat_edge.run import Run

pytestmark = pytest.mark.skipif(
    find_spec("optimum.commands.optimum_cli") is None,
    reason="optimum is not installed: pip install 'qat-edge[optimum]'",
)


def optimum(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in plain_rows(8)))
    return str(path)


def test_optimum_lists_the_subcommand_without_loading_torch() -> None:
    done = optimum("export", "--help")
    assert done.returncode == 0 and "qat-edge" in done.stdout
    code = "import sys; from optimum.commands.register import register_qat_edge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_is_quantized_and_exported(tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    rows = write_rows(tmp_path)
    given = ("--model", str(tiny_model_folder), "--calibration-data", rows, "--method", "hqq", str(out))
    given += ("--target", "onnx", "--context-length", "64")
    done = optimum("export", "qat-edge", *given)
    assert done.returncode == 0, done.stderr
    assert Run.open(out).targets() == ["onnx"] and f"Next: qat-edge verify {out}" in done.stderr

    again = optimum("export", "qat-edge", *given)
    assert again.returncode == 1 and "--force" in again.stderr and "Traceback" not in again.stderr


def test_an_error_is_one_paragraph(tmp_path: Path) -> None:
    done = optimum(
        "export", "qat-edge", "--model", str(tmp_path / "none"), "--calibration-data", write_rows(tmp_path),
        str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("Error: ") == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
