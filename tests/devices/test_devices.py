"""Artifacts on devices that are reached: the same answers as here, and every fault told."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from reached import Way, on_the_way, why_not
from summing import VOCABULARY, write_onnx, write_pte

from conftest import train_run
from qat_edge.cli import commands
from qat_edge.config import ExportOptions
from qat_edge.evaluate import results
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.device_errors import ConnectionLostError, KilledError, RefusedError, UnsuitableError

SEQUENCES = [[5], [1, 2, 3, 4], [i % VOCABULARY for i in range(40)]]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("summing")
    return {"executorch": write_pte(folder / "executorch"), "onnx": write_onnx(folder / "onnx")}


@pytest.fixture(params=["ssh"])
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    with on_the_way(request.param, tmp_path, monkeypatch) as found:
        yield found


@pytest.mark.parametrize(
    ("way", "target"),
    [("ssh", "executorch"), ("ssh", "onnx"), ("adbd", "executorch"), ("adbd", "onnx"), ("fake-adb", "onnx")],
    indirect=["way"],
)
def test_a_device_answers_as_this_machine_does(way: Way, target: str, artifacts: dict[str, Path]) -> None:
    found = []
    for device, access in (("local", None), (way.device, way.access)):
        with contextlib.closing(open_transport(device, access)) as transport:
            runtime = open_runtime(target, transport, threads=1)
            runtime.prepare(artifacts[target])
            logits = [np.load(scored.logits) for scored in runtime.score(SEQUENCES)]
            answers = runtime.generate([[1, 2], [12, 2]], eos_ids=[11], max_new_tokens=6).answers
            speed = runtime.speed(prefill=8, decode=4, repeats=2)
            assert min(speed.decode_tokens_per_s) > 0 and speed.load.peak_rss_bytes > 0
        found.append((logits, [(answer.ids, answer.stopped) for answer in answers], speed.load.runtime_version))
    for here, there in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(here, there, strict=True)
    assert found[0][1:] == found[1][1:]
    assert way.runs() == []


def test_a_runtime_that_is_killed_is_reported(way: Way, artifacts: dict[str, Path]) -> None:
    way.plant("dying-python", "echo dying >&2; kill -9 $$")
    access = replace(way.access, python="dying-python")
    with contextlib.closing(open_transport(way.device, access)) as transport:
        runtime = open_runtime("onnx", transport, threads=1)
        runtime.prepare(artifacts["onnx"])
        with pytest.raises(KilledError, match=r"(?s)ssh:kitchen: .* ended by SIGKILL\. .*memory runs out.*dying"):
            runtime.speed(1, 1, 1)
    assert way.runs() == []


def test_a_corrupted_artifact_is_reported(way: Way, artifacts: dict[str, Path], tmp_path: Path) -> None:
    damaged = write_onnx(tmp_path / "damaged")
    content = bytearray((damaged / "model.onnx").read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    (damaged / "model.onnx").write_bytes(content)
    with contextlib.closing(open_transport(way.device, way.access)) as transport:
        runtime = open_runtime("onnx", transport, threads=1)
        runtime.prepare(damaged)
        with pytest.raises(RefusedError, match=r"ssh:kitchen: model\.onnx cannot be loaded"):
            list(runtime.score(SEQUENCES))
        runtime.prepare(artifacts["onnx"])
        assert len(list(runtime.score(SEQUENCES))) == len(SEQUENCES)
    assert way.runs() == []


def test_a_wrong_architecture_is_told_before_anything_is_sent(way: Way, artifacts: dict[str, Path]) -> None:
    way.plant("uname", "echo armv7l")
    with contextlib.closing(open_transport(way.device, way.access)) as transport:
        with pytest.raises(UnsuitableError, match="ssh:kitchen: its system is armv7l"):
            open_runtime("onnx", transport, threads=1).prepare(artifacts["onnx"])
        (work,) = (way.root / "runs").iterdir()
        assert list(work.iterdir()) == [] and way.cached() == []
    assert way.runs() == []


def test_a_connection_cut_in_the_middle_of_scoring_is_made_again(way: Way, artifacts: dict[str, Path]) -> None:
    cuts = [1]

    def cut(done: int, total: int) -> None:
        if cuts:
            cuts.pop()
            way.cut()

    with contextlib.closing(open_transport(way.device, way.access)) as transport:
        runtime = open_runtime("onnx", transport, threads=1, progress=cut)
        runtime.prepare(artifacts["onnx"])
        scored = [np.load(one.logits).argmax(1).tolist() for one in runtime.score(SEQUENCES)]
        assert scored == [[int(n) for n in np.cumsum(ids) % VOCABULARY] for ids in SEQUENCES] and not cuts
        assert way.cable is not None
        way.cable.plugged = False
        cuts.append(1)
        with pytest.raises(ConnectionLostError, match=r"(?s)Done: .*Not done: .*It was asked 3 times"):
            list(runtime.score(SEQUENCES))


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps, exported to both targets."""
    made = train_run(tiny_model_folder, tmp_path_factory.mktemp("devices"))
    export(made, ExportOptions(context_length=128, ptq=("none",)))
    return made


def test_devices_are_validated_side_by_side(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "--tokens 64 --window 64 --prompts 2 --max-new-tokens 4 --threads 1 --prefill 8 --decode 4"
    profiles = {"local": "repeats = 2\nmax_kl = 9\n", "ssh:kitchen": "repeats = 1\nmin_decode = 1e9\n"}
    with contextlib.ExitStack() as stack:
        ways = [
            stack.enter_context(on_the_way(kind, tmp_path / kind, monkeypatch))
            for kind in ("ssh", "adbd")
            if why_not(kind) is None
        ]
        if not ways or ways[0].ssh_config is None:
            pytest.skip("no sshd")
        devices = ["local", *(way.device for way in ways), "ssh:nowhere"]
        flags = [word for device in devices for word in ("--device", device)]
        flags += ["--ssh-config", ways[0].ssh_config, "--device-python", sys.executable]
        flags += ["--device-folder", str(ways[0].folder)]
        for device, keys in profiles.items():
            (tmp_path / f"{device[:3]}.toml").write_text(keys)
            flags += ["--device-profile", f"{device}={tmp_path / device[:3]}.toml"]
        answer = CliRunner().invoke(commands.main, ["validate", str(run.path), *asked.split(), *flags])
        assert answer.exit_code == 1, answer.output
        assert f"1 of {len(devices)} devices failed" in answer.output
        assert "ssh:nowhere: cannot be reached" in answer.output
        assert "ssh:kitchen: 2 of 2 gates missed: qat, executorch: --min-decode 1e+09" in answer.output
        assert ways[0].runs() == []
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
