"""A few trials of each kind: kills, signals, full disks, pairs. `python -m tests.reliability` runs more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kinds", "verbs"),
    [
        (("kill",), ("finetune", "finetune-force", "finetune-again", "quantize-force")),
        (("signal", "pair", "disk"), ("finetune",)),
    ],
)
def test_nothing_is_lost(kinds: tuple[str, ...], verbs: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.reliability", "--trials", "3"]
    command += [text for kind in kinds for text in ("--kind", kind)]
    command += [text for verb in verbs for text in ("--verb", verb)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # One line for each kind and verb; a kind that this user may not try has one line, too.
    lines = [line for line in done.stdout.splitlines() if " 0 wrong" in line or "skipped" in line]
    assert len(lines) == len(kinds) * len(verbs), done.stdout
