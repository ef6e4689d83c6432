"""A whole run, from training to report, writes into its run folder and nowhere else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from qat_edge.run_lock import LOCK

COMMANDS = (
    "finetune --model {model} --data {data} --eval-data {data} --out {run} --steps 2 --batch-size 2 --lora-rank 2 "
    "--ptq-init none --max-length 32 --eval-rows 2",
    "export {run} --ptq none --context-length 64",
    "verify {run}",
    "validate {run} --tokens 64 --window 16 --prompts 1 --max-new-tokens 2 --prefill 4 --decode 2 --repeats 1 "
    "--threads 1",
    "doctor {run}/exports/executorch",
    "report {run}",
    "generate {run} hello --from onnx --max-new-tokens 2",
    "generate {run} hello --from executorch --max-new-tokens 2",
)
# In one process, which imports the libraries once.
RUN_ALL = """\
import json, sys
from qat_edge.cli.commands import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments, prog_name="qat-edge", standalone_mode=False)
    if code:
        sys.exit(f"{arguments[0]}: exit code {code}")
"""
# Written by the Python packages themselves, in the cache that the variables name: compiled fonts and the like.
PERMITTED = ("cache/huggingface",)


def test_a_whole_run_leaves_nothing_elsewhere(tiny_model_folder: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    shutil.copytree(tiny_model_folder, inputs / "model")
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i} and more of it"} for i in range(20)]
    (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # A home, caches, a folder for temporary files and a working directory that are all empty.
    home = tmp_path / "home"
    folders = {"HOME": "", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "XDG_DATA_HOME": "data"}
    folders |= {"XDG_STATE_HOME": "state", "TMPDIR": "tmp", "HF_HOME": "cache/huggingface"}
    env = {name: value for name, value in os.environ.items() if name != "CI"}  # which would silence telemetry, too
    for name, folder in folders.items():
        env[name] = str(home / folder)
        (home / folder).mkdir(parents=True, exist_ok=True)
    work = tmp_path / "work"
    work.mkdir()
    before = sorted(path for path in inputs.rglob("*"))

    names = {"model": inputs / "model", "data": inputs / "rows.jsonl", "run": tmp_path / "runs" / "mine"}
    commands = [command.format(**names).split() for command in COMMANDS]
    argv = [sys.executable, "-c", RUN_ALL, json.dumps(commands)]
    done = subprocess.run(
        argv, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    assert list(work.iterdir()) == []
    assert sorted(path for path in inputs.rglob("*")) == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    left = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    assert [name for name in left if not name.startswith(PERMITTED)] == []
    hidden = [path.name for path in names["run"].rglob("*") if path.name.startswith(".")]
    assert hidden == [LOCK]  # which stays, empty, for the next command


def test_onnx_runtime_leaves_no_identifier(tmp_path: Path) -> None:
    """Its first session writes an identifier and a data base into the cache unless the variable forbids it."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
    (tmp_path / "inputs").mkdir()
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "inputs" / "a.onnx")

    home = tmp_path / "home"
    home.mkdir()
    code = f"import qat_edge, onnxruntime; onnxruntime.InferenceSession({str(tmp_path / 'inputs' / 'a.onnx')!r})"
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=home, stdin=subprocess.DEVNULL, check=True)
    assert list(home.rglob("*")) == []
