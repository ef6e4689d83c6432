"""A few trials of each kind: kills, signals, full disks, pairs. `python -m tests.reliability` runs more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "verb", "trials"),
    [
        ("kill", "finetune", 6),
        ("kill", "finetune-force", 4),
        ("kill", "quantize-force", 4),
        ("signal", "finetune", 3),
        ("pair", "finetune", 1),
        ("disk", "finetune", 3),
    ],
)
def test_nothing_is_lost(kind: str, verb: str, trials: int) -> None:
    command = [sys.executable, "-m", "tests.reliability", "--kind", kind, "--verb", verb, "--trials", str(trials)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "skipped" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
