"""The error budget of a device that is reached by ssh: steps up to this machine are run here, the last one there."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from reached import Way, opened, reached, why_not

from conftest import train_run
from qat_edge.config import ExportOptions, ValidateOptions
from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose import fault_test, locate_fault
from qat_edge.diagnose.error_budget import DEVICE, FROZEN, HOST, TRAINED
from qat_edge.diagnose.runtime_rounding import BLOCKS, X86, of_artifact
from qat_edge.evaluate import results
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge.verbs.validate import validate_devices


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    reason = why_not("ssh")
    if reason:
        pytest.skip(reason)
    with reached("ssh", tmp_path_factory.mktemp("there")) as found:
        yield found


@pytest.fixture(scope="module")
def run(way: Way, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = train_run(tiny_model_folder, tmp_path_factory.mktemp("budget"))
    export(made, ExportOptions(target=("onnx",), context_length=128, ptq=("none",)))
    return made


@pytest.mark.parametrize("also_here", [False, True])
def test_the_last_step_is_the_device(run: Run, way: Way, also_here: bool, messages: list[str]) -> None:
    asked = ValidateOptions(
        device=("local", way.device) if also_here else (way.device,), device_python=sys.executable,
        device_folder=str(way.folder), ssh_config=way.ssh_config, tokens=64, window=64, prompts=0, threads=1,
        prefill=8, decode=4, repeats=2, error_budget=True, max_fault_chance=0.75,
    )  # fmt: skip
    done = validate_devices(run, asked, force=True)
    assert done.failures == {} and [report.device for report in done.reports] == list(asked.device)
    report = done.reports[-1]
    (budget,) = report.budgets
    steps = {step.name: step for step in budget.steps}
    blocks = [BLOCKS] if platform.machine().lower() in X86 else []
    assert list(steps) == ["FP32 base", "FP32 fine-tuned", TRAINED, FROZEN, *blocks, HOST, DEVICE]
    # The device is this machine: the same runtime says the same, to the last bit.
    assert steps[DEVICE].change == results.Agreement(report.tokens, 0.0, 1.0, None)
    assert steps[DEVICE].perplexity == steps[HOST].perplexity
    assert not budget.judged.beyond and [gate.passed for gate in report.gates] == [True]
    assert any("Scoring" in text and "on this machine" in text for text in messages) is not also_here
    assert way.runs() == [], "nothing is left there"
    if also_here:
        assert [step.name for step in done.reports[0].budgets[0].steps][-1] == HOST


def test_an_artifact_is_looked_into_on_the_device(run: Run, way: Way) -> None:
    prompts = fault_test.probes([ScoredIds([3 + i * i % 200 for i in range(300)], [])])
    torch: Any = SimpleNamespace(roundings={"onnx": of_artifact(run.exports / "onnx", "onnx")}, prompts=prompts)
    with closing(opened(way)) as transport:
        said = locate_fault.first_words(run.exports / "onnx", "onnx", run.quantized, torch, transport, threads=1)
    assert said == f"On {way.device} as on this machine no layer parts from equal inputs"
    assert way.runs() == []
