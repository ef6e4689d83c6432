"""The overhead benchmark: bare calls of a runtime and steps of the agent, alternating on the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from summing_model import VOCABULARY, write_onnx, write_pte

from benchmarks import overhead
from qat_edge_devices.agent import loaded_models

AMOUNTS = {"prefill": 5, "decode": 4, "turns": 1}


@pytest.mark.parametrize("bare_first", [True, False])
@pytest.mark.parametrize("runtime", ["executorch", "onnxruntime"])
def test_bare_steps_and_steps_of_the_agent_continue_from_each_other(
    runtime: str, bare_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    target, _ = overhead.RUNTIMES[runtime]
    pte = target == "executorch"
    artifact = write_pte(tmp_path / "made") / "model.pte" if pte else write_onnx(tmp_path / "made")
    request = {"backend": target, "task": "speed", **AMOUNTS}
    model: Any = loaded_models.choose_backend(request)
    assert model.runtime == runtime
    model.load(artifact, request, 1)
    bare, ours = overhead.steps(model, request, bare_first)
    assert len(bare) == len(ours) == AMOUNTS["decode"]
    # The cache has the content it would have if the agent alone had processed these tokens.
    taken = AMOUNTS["prefill"] + 2 * AMOUNTS["decode"]
    assert model.next(3) == (sum(1 + i % 7 for i in range(taken)) + 3) % VOCABULARY


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_a_round_times_both_in_a_process(runtime: str, tmp_path: Path) -> None:
    (times,) = overhead.rounds(runtime, write_onnx(tmp_path / "made"), AMOUNTS, 1)
    assert min(times) > 0
    with pytest.raises(SystemExit, match=r"could not be timed:\n.*Traceback"):
        overhead.rounds(runtime, tmp_path, AMOUNTS, 1)


def test_ratios_are_of_one_round() -> None:
    line = overhead.describe("some", [(1.0, 1.1), (10.0, 10.0), (2.0, 2.1)])
    assert line.startswith("some: a token takes 2.000 ms bare, 2.100 ms by the agent; ratio 1.050 (1.000 to 1.100)")
