"""Artifacts on reachable devices: the same results as on this machine, and every failure reported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from device_fixtures import DeviceUnderTest, device_under_test, unavailable_reason
from summing_model import VOCABULARY, write_onnx, write_pte

from conftest import train_run
from qat_edge.cli import commands
from qat_edge.evaluate import results
from qat_edge.options import ExportOptions
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.device_errors import (
    ConnectionLostError,
    KilledError,
    RequestRejectedError,
    UnsupportedDeviceError,
)

SEQUENCES = [[5], [1, 2, 3, 4], [i % VOCABULARY for i in range(40)]]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("summing")
    return {"executorch": write_pte(folder / "executorch"), "onnx": write_onnx(folder / "onnx")}


@pytest.fixture(params=["ssh"])
def dut(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceUnderTest]:
    with device_under_test(request.param, tmp_path, monkeypatch) as found:
        yield found


@pytest.mark.parametrize(
    ("dut", "target"),
    [("ssh", "executorch"), ("ssh", "onnx"), ("adbd", "executorch"), ("adbd", "onnx"), ("fake-adb", "onnx")],
    indirect=["dut"],
)
def test_a_device_returns_the_same_results_as_this_machine(
    dut: DeviceUnderTest, target: str, artifacts: dict[str, Path]
) -> None:
    found = []
    for device, access in (("local", None), (dut.device, dut.access)):
        with contextlib.closing(open_transport(device, access)) as transport:
            runtime = open_runtime(target, transport, threads=1)
            runtime.prepare(artifacts[target])
            logits = [np.load(scored.logits) for scored in runtime.score(SEQUENCES)]
            completions = runtime.generate([[1, 2], [12, 2]], eos_ids=[11], max_new_tokens=6).completions
            speed = runtime.speed(prefill=8, decode=4, repeats=2)
            assert min(speed.decode_tokens_per_s) > 0 and speed.load.peak_rss_bytes > 0
        found.append(
            (logits, [(completion.ids, completion.stopped) for completion in completions], speed.load.runtime_version)
        )
    for here, there in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(here, there, strict=True)
    assert found[0][1:] == found[1][1:]
    assert dut.runs() == []


def test_a_runtime_that_is_killed_is_reported(dut: DeviceUnderTest, artifacts: dict[str, Path]) -> None:
    dut.plant("dying-python", "echo dying >&2; kill -9 $$")
    access = replace(dut.access, python="dying-python")
    with contextlib.closing(open_transport(dut.device, access)) as transport:
        runtime = open_runtime("onnx", transport, threads=1)
        runtime.prepare(artifacts["onnx"])
        with pytest.raises(KilledError, match=r"(?s)ssh:kitchen: .* ended by SIGKILL\. .*memory runs out.*dying"):
            runtime.speed(1, 1, 1)
    assert dut.runs() == []


def test_a_corrupted_artifact_is_reported(dut: DeviceUnderTest, artifacts: dict[str, Path], tmp_path: Path) -> None:
    damaged = write_onnx(tmp_path / "damaged")
    content = bytearray((damaged / "model.onnx").read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    (damaged / "model.onnx").write_bytes(content)
    with contextlib.closing(open_transport(dut.device, dut.access)) as transport:
        runtime = open_runtime("onnx", transport, threads=1)
        runtime.prepare(damaged)
        with pytest.raises(RequestRejectedError, match=r"ssh:kitchen: model\.onnx cannot be loaded"):
            list(runtime.score(SEQUENCES))
        runtime.prepare(artifacts["onnx"])
        assert len(list(runtime.score(SEQUENCES))) == len(SEQUENCES)
    assert dut.runs() == []


def test_an_unsupported_architecture_is_reported_before_anything_is_sent(
    dut: DeviceUnderTest, artifacts: dict[str, Path]
) -> None:
    dut.plant("uname", "echo armv7l")
    with contextlib.closing(open_transport(dut.device, dut.access)) as transport:
        with pytest.raises(UnsupportedDeviceError, match="ssh:kitchen: its system is armv7l"):
            open_runtime("onnx", transport, threads=1).prepare(artifacts["onnx"])
        (work,) = (dut.root / "runs").iterdir()
        assert list(work.iterdir()) == [] and dut.cached() == []
    assert dut.runs() == []


def test_scoring_continues_after_the_connection_is_cut(dut: DeviceUnderTest, artifacts: dict[str, Path]) -> None:
    cuts = [1]

    def cut(done: int, total: int) -> None:
        if cuts:
            cuts.pop()
            dut.cut()

    with contextlib.closing(open_transport(dut.device, dut.access)) as transport:
        runtime = open_runtime("onnx", transport, threads=1, progress=cut)
        runtime.prepare(artifacts["onnx"])
        scored = [np.load(one.logits).argmax(1).tolist() for one in runtime.score(SEQUENCES)]
        assert scored == [[int(n) for n in np.cumsum(ids) % VOCABULARY] for ids in SEQUENCES] and not cuts
        assert dut.cable is not None
        dut.cable.plugged = False
        cuts.append(1)
        with pytest.raises(ConnectionLostError, match=r"(?s)Done: .*Not done: .*It was tried 3 times"):
            list(runtime.score(SEQUENCES))


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps, exported to both targets."""
    made = train_run(tiny_model_folder, tmp_path_factory.mktemp("devices"))
    export(made, ExportOptions(context_length=128, ptq=("none",)))
    return made


def test_devices_are_validated_in_parallel(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--tokens 64 --window 64 --prompts 2 --max-new-tokens 4 --threads 1 --prefill 8 --decode 4"
    profiles = {"local": "repeats = 2\nmax_kl = 9\n", "ssh:kitchen": "repeats = 1\nmin_decode = 1e9\n"}
    with contextlib.ExitStack() as stack:
        duts = [
            stack.enter_context(device_under_test(device_type, tmp_path / device_type, monkeypatch))
            for device_type in ("ssh", "adbd")
            if unavailable_reason(device_type) is None
        ]
        if not duts or duts[0].ssh_config is None:
            pytest.skip("no sshd")
        devices = ["local", *(dut.device for dut in duts), "ssh:nowhere"]
        flags = [word for device in devices for word in ("--device", device)]
        flags += ["--ssh-config", duts[0].ssh_config, "--device-python", sys.executable]
        flags += ["--device-folder", str(duts[0].folder)]
        for device, keys in profiles.items():
            (tmp_path / f"{device[:3]}.toml").write_text(keys)
            flags += ["--device-profile", f"{device}={tmp_path / device[:3]}.toml"]
        result = CliRunner().invoke(commands.main, ["validate", str(run.path), *options.split(), *flags])
        assert result.exit_code == 1, result.output
        assert f"1 of {len(devices)} devices failed" in result.output
        assert "ssh:nowhere: cannot be reached" in result.output
        assert "ssh:kitchen: 2 of 2 gates missed: qat, executorch: --min-decode 1e+09" in result.output
        assert duts[0].runs() == []
    local, *others = (results.load(run.reports / f"{name}.json") for name in _names(devices[:-1]))
    assert not (run.reports / "ssh-nowhere.json").exists()
    assert [[(gate.flag, gate.passed) for gate in report.gates] for report in (local, others[0])] == [
        [("--max-kl", True)] * 2, [("--min-decode", False)] * 2,
    ]  # fmt: skip
    assert [report.options["repeats"] for report in (local, others[0])] == [2, 1]
    for there in others:
        assert [m.target for m in there.measured] == [m.target for m in local.measured]
        for one, other in zip(local.measured, there.measured, strict=True):
            assert (other.perplexity, other.agreement, other.parity) == (one.perplexity, one.agreement, one.parity)
            assert (other.exact_match, other.same_answers) == (one.exact_match, one.same_answers)
            assert (other.size_bytes, other.runtime) == (one.size_bytes, one.runtime)
            assert (other.speed is None) is (other.target == "torch")
    shown = CliRunner().invoke(commands.main, ["report", str(run.path)])
    assert shown.exit_code == 0 and all(f"Measured on {d}" in run.report_html.read_text() for d in devices[:-1])


def _names(devices: list[str]) -> list[str]:
    return [device.replace("127.0.0.1:5555", "127.0.0.1-5555").replace(":", "-") for device in devices]
