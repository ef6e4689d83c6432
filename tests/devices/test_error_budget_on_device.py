"""Error budget of a device behind ssh: all steps but the last run on this machine, the last on the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from device_fixtures import DeviceUnderTest, opened, start_device, unavailable_reason

from conftest import train_run
from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose import fault_test, locate_fault
from qat_edge.diagnose.error_budget import DEVICE, FROZEN, HOST, TRAINED
from qat_edge.diagnose.runtime_rounding import BLOCKS, artifact_rounding
from qat_edge.evaluate import results
from qat_edge.options import ExportOptions, ValidateOptions
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge.verbs.validate import validate_devices
from qat_edge_devices.processor import Processor, this_processor


@pytest.fixture(scope="module")
def dut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceUnderTest]:
    reason = unavailable_reason("ssh")
    if reason:
        pytest.skip(reason)
    with start_device("ssh", tmp_path_factory.mktemp("there")) as found:
        yield found


@pytest.fixture(scope="module")
def run(dut: DeviceUnderTest, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = train_run(tiny_model_folder, tmp_path_factory.mktemp("budget"))
    export(made, ExportOptions(target=("onnx",), context_length=128, ptq=("none",)))
    return made


@pytest.mark.parametrize("also_here", [False, True])
def test_the_last_step_is_the_device(run: Run, dut: DeviceUnderTest, also_here: bool, messages: list[str]) -> None:
    options = ValidateOptions(
        device=("local", dut.device) if also_here else (dut.device,), device_python=sys.executable,
        device_folder=str(dut.folder), ssh_config=dut.ssh_config, tokens=64, window=64, prompts=0, threads=1,
        prefill=8, decode=4, repeats=2, error_budget=True, max_fault_chance=0.75,
    )  # fmt: skip
    done = validate_devices(run, options, force=True)
    assert done.failures == {} and [report.device for report in done.reports] == list(options.device)
    report = done.reports[-1]
    (budget,) = report.budgets
    steps = {step.name: step for step in budget.steps}
    blocks = [BLOCKS] if this_processor() is Processor.X86 else []
    assert list(steps) == ["FP32 base", "FP32 fine-tuned", TRAINED, FROZEN, *blocks, HOST, DEVICE]
    # The device is this machine: the same runtime computes the same bits.
    assert steps[DEVICE].change == results.Agreement(report.tokens, 0.0, 1.0, None)
    assert steps[DEVICE].perplexity == steps[HOST].perplexity
    assert not budget.fault_test.exceeds_noise and [gate.passed for gate in report.gates] == [True]
    assert any("Scoring" in text and "on this machine" in text for text in messages) is not also_here
    assert dut.runs() == [], "nothing is left there"
    if also_here:
        assert [step.name for step in done.reports[0].budgets[0].steps][-1] == HOST


def test_a_fault_is_located_on_the_device(run: Run, dut: DeviceUnderTest) -> None:
    prompts = fault_test.short_prompts([ScoredIds([3 + i * i % 200 for i in range(300)], [])])
    torch: Any = SimpleNamespace(roundings={"onnx": artifact_rounding(run.exports / "onnx", "onnx")}, prompts=prompts)
    with closing(opened(dut)) as transport:
        text = locate_fault.describe_location(run.exports / "onnx", "onnx", run.quantized, torch, transport, threads=1)
    assert text == f"On {dut.device} and on this machine, no layer diverges given equal inputs"
    assert dut.runs() == []
