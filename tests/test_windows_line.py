"""Every verb on the tiny model, in processes that behave like Windows as far as our packages can see.

`windows_like/sitecustomize.py` has what that means, and what it cannot show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_model, make_tokenizer
from qat_edge.run import Run

# What a process has open or mapped is read in /proc.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
HERE = Path(__file__).parent
ROWS = [
    {"messages": [{"role": "user", "content": f"sag {i} ä"}, {"role": "assistant", "content": f'{{"n":{i}}}'}]}
    for i in range(40)
]
FINETUNE = ["--steps", "4", "--qat-start", "0.5", "--batch-size", "4", "--lora-rank", "4", "--track", "none"]
VALIDATE = ["--tokens", "64", "--prompts", "2", "--max-new-tokens", "4", "--prefill", "4", "--decode", "2",
            "--repeats", "1", "--threads", "1"]  # fmt: skip
# Several verbs in one process: what one of them leaves open or mapped, the next one finds in its way.
VERBS = """
import json, sys
from qat_edge.cli.commands import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments, prog_name="qat-edge")
    except SystemExit as end:
        if end.code:
            raise
"""


def run_like_windows(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in `folder`, which holds its temporary files, too."""
    temporary = folder / "tmp ß"
    temporary.mkdir(exist_ok=True)
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "windows_like"), inherited])),
        "PYTHONWARNDEFAULTENCODING": "1",
        "QAT_EDGE_WINDOWS_LIKE": str(folder),
        "TMPDIR": str(temporary),
    }
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose path has a space and letters that are not ASCII."""
    path = tmp_path.resolve() / "Jörg 漢"
    path.mkdir()
    return path


def test_the_line_runs(folder: Path) -> None:
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "mödel")
    tokenizer.save_pretrained(folder / "mödel")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)  # as editors on Windows write it
    for name in ("train ü.jsonl", "eval ü.jsonl"):
        (folder / name).write_text(text, encoding="utf-8", newline="")

    data = ["--model", "mödel", "--data", "train ü.jsonl", "--eval-data", "eval ü.jsonl", "--out", "rün 1"]
    line = [
        ["finetune", *data, *FINETUNE],
        ["export", "rün 1", "--context-length", "64", "--ptq", "none"],
        ["verify", "rün 1"],
        ["validate", "rün 1", *VALIDATE],
        ["report", "rün 1"],
    ]
    done = run_like_windows(VERBS, json.dumps(line), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Run(folder / "rün 1").report_html.is_file()

    # In another process: torch.export keeps what it has exported, so that its file stays mapped.
    done = run_like_windows(VERBS, json.dumps([["finetune", *data, *FINETUNE, "--force"]]), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]

    # The second training has taken the place of the first, with all that was made of it.
    run = Run.open(folder / "rün 1")
    assert {path.name for path in run.path.iterdir()} == {
        ".lock", "adapter", "checkpoints", "config.yaml", "reference", "start", "training.json",
    }  # fmt: skip
    left = [path.name for path in (folder / "tmp ß").rglob("*") if path.is_file()]
    assert left == [], "temporary files stay where Windows could not remove them"


def test_a_refused_training_leaves_nothing(folder: Path) -> None:
    data = ["--model", "missing/model", "--data", "missing.jsonl", "--out", "rün/1"]
    done = run_like_windows(VERBS, json.dumps([["finetune", *data]]), folder=folder)
    assert done.returncode == 1 and "\nError: missing/model: " in done.stderr, done.stderr
    assert [path.name for path in folder.rglob("*") if path.is_file()] == []
    assert not (folder / "rün").exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import resource", "ModuleNotFoundError: No module named 'resource' on Windows"),
        ("import os; os.killpg", "AttributeError: module 'os' has no attribute 'killpg' on Windows"),
        ("from os import fork", "ImportError: cannot import name 'fork' from 'os'"),
        ("import sys, os; assert (sys.platform, os.name) == ('win32', 'nt'); 1 / 0", "ZeroDivisionError"),
        ("from pathlib import Path; Path('x').read_text()", "EncodingWarning: 'encoding' argument not specified"),
        ("from pathlib import Path; Path('aux.txt').absolute().touch()", "Windows has no such name"),
        ("from pathlib import Path; Path('a:b').absolute().mkdir()", "Windows has no such name"),
        ("from pathlib import Path; Path('x').rename('y')", "FileExistsError"),
        ("from pathlib import Path; f = open('x', 'rb'); Path('x').replace('y')", "PermissionError"),
        ("from pathlib import Path; f = open('y', 'rb'); Path('x').replace('y')", "PermissionError"),
        ("from pathlib import Path; f = open('d/z', 'rb'); Path('d').rename('e')", "PermissionError"),
        ("import mmap; f = open('x', 'rb'); m = mmap.mmap(f.fileno(), 0, access=1); f.close(); os = __import__('os'); "
         "os.unlink('x')", "PermissionError"),
    ],
)  # fmt: skip
def test_the_stand_in_refuses_what_windows_refuses(code: str, error: str, folder: Path) -> None:
    for name in ("x", "y"):
        (folder / name).write_bytes(b"text")
    (folder / "d").mkdir()
    (folder / "d" / "z").touch()
    # As a module of ours, of which the stand-in has more to refuse.
    done = run_like_windows("import sys; exec(sys.argv[1], {'__name__': 'qat_edge.x'})", code, folder=folder)
    assert error in done.stderr and done.returncode == 1, done.stderr
