"""Memory of this machine does not grow with the evaluation data: logits are streamed by sequence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VOCABULARY = 8192
POSITIONS = 32
SHORT, LONG = 8, 64  # sequences, of 1 MiB of logits each
MOST_GROWTH_BYTES = 16 * 1024**2

# Replaces Python and the agent on the device: writes random logits of the right shape.
DEVICE = f"""#!{sys.executable}
import json
from pathlib import Path
import numpy as np
sequences = json.loads(Path("request.json").read_text())["sequences"]
Path("results").mkdir(exist_ok=True)
for index, ids in enumerate(sequences):
    logits = np.random.default_rng(index).standard_normal((len(ids), {VOCABULARY}), dtype=np.float32)
    np.save(f"results/logits-{{index:05d}}.npy", logits)
load = {{
    "load_ms": 1.0, "baseline_rss_bytes": 10, "peak_rss_bytes": 30, "peak_includes_import": False,
    "runtime": "none", "runtime_version": "1", "threads": 1, "pool_threads": None, "context_length": None,
}}
Path("results/result.json").write_text(json.dumps({{"format": 2, "scored": len(sequences), "load": load}}))
"""

# Runs in a process of its own and prints its peak memory after a short evaluation and after a long one.
HOST = """
import shutil, sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
import torch
from qat_edge.options import ValidateOptions
from qat_edge.data.tokenization import ScoredIds
from qat_edge.evaluate import reference
from qat_edge.evaluate.evaluator import Evaluator, EvalSet
from qat_edge.peak_memory import own_peak_bytes
from qat_edge_devices.local import LocalTransport

folder, vocabulary, positions, *lengths = Path(sys.argv[1]), *map(int, sys.argv[2:])

def model(ids, logits_to_keep):
    return SimpleNamespace(logits=torch.randn(1, len(logits_to_keep), vocabulary))

for length in lengths:
    sequences = [ScoredIds([i] * (positions + 1), list(range(positions))) for i in range(length)]
    scratch = folder / str(length)
    scratch.mkdir()
    evaluator = Evaluator(EvalSet(sequences, [], [0], 0, None), ValidateOptions(threads=1), scratch)
    for store in (evaluator.fp32_logits, evaluator.frozen_logits):
        reference.score(model, sequences, store, lambda done: None)
    with closing(LocalTransport(python=str(folder / "device"), root=folder)) as transport:
        accuracy, parity = evaluator._compare_artifact(folder / "artifact", "onnx", transport, own=True)
    assert accuracy.tokens == parity.tokens == length * positions
    shutil.rmtree(scratch)
    print(own_peak_bytes())
"""


def test_peak_memory_does_not_grow_with_the_number_of_sequences(tmp_path: Path) -> None:
    (tmp_path / "device").write_text(DEVICE)
    (tmp_path / "device").chmod(0o755)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "model.onnx").write_bytes(b"graph")
    numbers = map(str, (VOCABULARY, POSITIONS, SHORT, LONG))
    done = subprocess.run([sys.executable, "-c", HOST, str(tmp_path), *numbers], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short, long = map(int, done.stdout.split())
    assert long - short < MOST_GROWTH_BYTES < (LONG - SHORT) * POSITIONS * VOCABULARY * 4 / 3
