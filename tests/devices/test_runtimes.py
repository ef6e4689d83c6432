"""Artifacts run by the agent in its own process, and the errors if that fails."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from summing_model import CONTEXT, PEAK, VOCABULARY, greedy, sums, write_onnx, write_pte

from qat_edge_devices import open_runtime
from qat_edge_devices.agent import agent, loaded_models, machine
from qat_edge_devices.agent.active_adapter import ADAPTER_FILE
from qat_edge_devices.device_errors import (
    CapacityError,
    ConnectionLostError,
    KilledError,
    MissingPackageError,
    ProgramError,
    RequestRejectedError,
    ResultError,
    TransportError,
    UnsupportedDeviceError,
)
from qat_edge_devices.local import LocalTransport
from qat_edge_devices.mock import MockTransport
from qat_edge_devices.runtime import Runtime
from qat_edge_devices.runtimes import agent_runtime as runtime_side
from qat_edge_devices.runtimes.agent_runtime import ExecuTorchRuntime
from qat_edge_devices.transport import CompletedProgram

AGENT = [
    "agent/__init__.py",
    "agent/active_adapter.py",
    "agent/agent.py",
    "agent/llama_grammar.py",
    "agent/llama_model.py",
    "agent/loaded_models.py",
    "agent/machine.py",
    "agent/model_errors.py",
    "agent/transformers_model.py",
    "agent/windows_memory.py",
]
LOAD = {
    "runtime": "stub", "runtime_version": "1", "threads": 1, "pool_threads": None, "context_length": None,
    "load_ms": 1.0, "baseline_rss_bytes": 10, "peak_rss_bytes": 30, "peak_includes_import": False,
}  # fmt: skip
SILENT = {
    "clocks_khz": [], "permitted_khz": [], "times_slowed": None, "celsius": None, "battery_percent": None,
}  # fmt: skip
STATE = {"step_ms": [max(n, 0.5) for n in range(101)], "cores_busy": 1.0, "before": SILENT, "after": SILENT}


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalTransport]:
    transport = LocalTransport(root=tmp_path)
    yield transport
    transport.close()


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("summing") / "onnx")


@pytest.fixture(scope="session")
def pte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pte(tmp_path_factory.mktemp("summing") / "executorch")


@pytest.fixture(params=["executorch", "onnx"])
def runtime(request: pytest.FixtureRequest, local: LocalTransport) -> Runtime:
    """The summing decoder on this machine, as an artifact of either format."""
    folder = request.getfixturevalue({"executorch": "pte_folder", "onnx": "onnx_folder"}[request.param])
    runtime = open_runtime(request.param, local, threads=1)
    runtime.prepare(folder)
    return runtime


def test_score_returns_the_logits_after_every_token(runtime: Runtime) -> None:
    # 300 tokens: more than one chunk of the agent
    sequences = [[5], [1, 2, 3, 4], [i % VOCABULARY for i in range(300)], [12, 12]]
    for scored, ids in zip(runtime.score(sequences), sequences, strict=True):
        logits = np.load(scored.logits)
        expected = np.zeros((len(ids), VOCABULARY), np.float32)
        expected[range(len(ids)), sums(ids)] = PEAK
        np.testing.assert_array_equal(logits, expected, strict=True)


def test_prefill_followed_by_single_tokens_gives_the_same_logits(runtime: Runtime) -> None:
    sequences = [[5, 3, 9], [i % VOCABULARY for i in range(300)]]
    scored = [np.load(one.logits) for one in runtime.score(sequences, decode_from=2)]
    traced = runtime.trace(sequences, decode_from=2)  # its files exist until the iteration ends
    for ids, logits, found in zip(sequences, scored, traced, strict=True):
        assert logits.argmax(1).tolist() == sums(ids)
        assert found.names == ("logits",)
        np.testing.assert_array_equal(np.load(found.outputs)["arr_0"], logits, strict=True)


def test_tokens_are_read_in_chunks_and_decoded_one_at_a_time() -> None:
    ids = list(range(300))
    assert list(loaded_models.token_chunks(ids, None)) == [ids[:256], ids[256:]]
    assert list(loaded_models.token_chunks(ids[:5], 3)) == [[0, 1, 2], [3], [4]]
    assert list(loaded_models.token_chunks(ids[:2], 3)) == [[0, 1]]
    assert list(loaded_models.token_chunks(ids[:2], 0)) == [[0], [1]]


def test_score_bounds_disk_use_and_continues_the_progress(pte_folder: Path, local: LocalTransport) -> None:
    shown: list[tuple[int, int]] = []
    runtime = ExecuTorchRuntime(local, 1, progress=lambda done, total: shown.append((done, total)))
    runtime.prepare(pte_folder)
    sequences = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    two = 2 * 2 * VOCABULARY * 4  # bytes of two sequences
    past: list[Path] = []
    for scored in runtime.score(sequences, max_bytes=two):
        assert not any(path.exists() for path in past)
        assert len(list(local.folder.glob("results/*.npy"))) <= 2
        assert np.load(scored.logits).argmax(1).tolist() == sums(sequences[scored.index])
        past.append(scored.logits)
    assert len(past) == len(sequences)
    assert not any(path.parent.exists() for path in past)
    assert shown == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_generate_is_greedy_and_stops_at_end_length_or_context(runtime: Runtime) -> None:
    # The cache of the first prompt must be cleared for the second; the third prompt fills the context.
    long = [3] * (CONTEXT - 5)
    prompts = [[1, 2], [12, 2], long]
    generated = runtime.generate(prompts, eos_ids=[11], max_new_tokens=6)
    assert greedy([1, 2], 4) == [3, 6, 12, 11]
    assert [(a.ids, a.stopped) for a in generated.completions] == [
        ((3, 6, 12), "eos"),
        (tuple(greedy([12, 2], 6)), "length"),
        (tuple(greedy(long, 5)), "context"),
    ]
    assert all(a.ttft_ms > 0 for a in generated.completions)
    assert generated.load.context_length == CONTEXT


def test_generate_is_greedy_whatever_a_folder_sets_for_apps(local: LocalTransport, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = write_onnx(tmp_path / "onnx")
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["search"] |= {"repetition_penalty": 100.0, "no_repeat_ngram_size": 1, "num_beams": 2}
    path.write_text(json.dumps(settings))
    runtime = open_runtime("onnx", local, 1)
    runtime.prepare(folder)
    (completion,) = runtime.generate([[0, 0]], eos_ids=[VOCABULARY - 1], max_new_tokens=8).completions
    assert completion.ids == tuple(greedy([0, 0], 8)) == (0,) * 8


def test_generate_without_end_tokens_runs_to_the_maximum_length(runtime: Runtime) -> None:
    (completion,) = runtime.generate(
        [[1, 0]], eos_ids=[], max_new_tokens=8
    ).completions  # the configuration has 1 as end token
    assert completion.ids == tuple(greedy([1, 0], 8))
    assert completion.stopped == "length"


def test_speed_times_every_repeat_and_the_loading(runtime: Runtime) -> None:
    speed = runtime.speed(prefill=32, decode=16, repeats=3)
    for figures in (speed.prefill_tokens_per_s, speed.decode_tokens_per_s, speed.ttft_ms):
        assert len(figures) == 3
        assert min(figures) > 0
    for rate, milliseconds in zip(speed.prefill_tokens_per_s, speed.ttft_ms, strict=True):
        assert rate == pytest.approx(32 / (milliseconds / 1e3))
    assert len(speed.step_ms) == 16 * 3
    assert speed.decode_tokens_per_s[0] == pytest.approx(16e3 / sum(speed.step_ms[:16]))
    assert speed.load.threads == speed.load.pool_threads == 1
    assert speed.cores_busy < 1.3  # one CPU is all the process was given
    assert speed.load.load_ms > 0
    assert speed.load.artifact_rss_bytes == speed.load.peak_rss_bytes - speed.load.baseline_rss_bytes > 0


def write_state(root: Path, khz: int, permitted_khz: int, millidegrees: str, slowed: int) -> None:
    """Write the files below /sys of a phone with one CPU, a connected sensor and one that is not connected."""
    cpu = f"devices/system/cpu/cpu{min(os.sched_getaffinity(0))}"
    files = {
        f"{cpu}/cpufreq/scaling_cur_freq": khz,
        f"{cpu}/cpufreq/scaling_max_freq": permitted_khz,
        f"{cpu}/thermal_throttle/core_throttle_count": slowed,
        "class/thermal/thermal_zone0/temp": millidegrees,
        "class/thermal/thermal_zone1/temp": -274000,
        "class/power_supply/usb/online": 1,
        "class/power_supply/battery/capacity": 80,
    }
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("after", "throttled"),
    [((2_400_000, 2_400_000, "45500", 7), False), ((1_200_000, 1_500_000, "", 7), True),
     ((2_400_000, 2_400_000, "90000", 8), True)],
)  # fmt: skip
def test_heat_clocks_and_battery_are_reported_and_throttling_is_marked(
    after: tuple[int, int, str, int], throttled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heating:
        context_length = None

        def start(self, prompt: list[int], length: int) -> int:
            return 0

        def next(self, token: int) -> int:
            write_state(tmp_path, *after)
            return 0

    monkeypatch.setattr(machine, "SYS", tmp_path)
    write_state(tmp_path, 2_400_000, 2_400_000, "31000", 7)
    first = machine.machine_state()
    result = agent.speed(Heating(), {"prefill": 2, "decode": 2, "repeats": 1}, tmp_path) | {"before": first}  # type: ignore[arg-type]

    def handler(argv: Sequence[str], files: dict[str, bytes]) -> CompletedProgram:
        files["results/result.json"] = json.dumps({"format": 2, "load": LOAD, **result}).encode()
        return CompletedProgram(0, "", "")

    speed = open_runtime("onnx", MockTransport(handler), threads=1).speed(2, 2, 1)
    assert speed.throttled is throttled
    _, *marks, states = speed.remarks()
    heat = f", {int(after[2]) / 1e3:.0f} °C" if after[2] else ""
    assert states == (
        f"before timing clocks 2.4 GHz, 31 °C, battery 80%; after it clocks {after[0] / 1e6:.1f} GHz{heat}, battery 80%"
    )
    assert ["throttled" in mark for mark in marks] == [True] * throttled


def test_a_machine_that_reports_no_state_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SYS", tmp_path)
    assert machine.machine_state() == SILENT


def test_onnx_is_scored_by_onnxruntime_and_timed_by_genai(onnx_folder: Path, local: LocalTransport) -> None:
    runtime = open_runtime("onnx", local, threads=1)
    runtime.prepare(onnx_folder)
    assert [s.load.runtime for s in runtime.score([[1]])] == ["onnxruntime"]
    assert runtime.speed(4, 2, 1).load.runtime == "onnxruntime-genai"


def test_without_genai_plain_onnxruntime_generates_the_same(
    onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    request = {"backend": "onnx", "task": "generate", "prompts": [[1, 2], [1]], "eos_ids": [11], "max_new_tokens": 6}
    model = loaded_models.choose_backend(request)
    assert model.runtime == "onnxruntime"
    model.load(onnx_folder, request, 1)
    completions = agent.generate(model, request, tmp_path)["completions"]
    assert [a["ids"] for a in completions] == [[3, 6, 12], greedy([1], 6)]


def test_only_files_that_the_runtime_reads_are_sent(onnx_folder: Path, pte_folder: Path, tmp_path: Path) -> None:
    mock = MockTransport(lambda argv, files: CompletedProgram(0, "", ""))
    open_runtime("onnx", mock, threads=1).prepare(onnx_folder)
    assert sorted(mock.files) == [*AGENT, "artifact/genai_config.json", "artifact/model.onnx"]
    mock.close()
    adapted = Path(shutil.copytree(onnx_folder, tmp_path / "onnx"))
    (adapted / ADAPTER_FILE).touch()
    open_runtime("onnx", mock, threads=1).prepare(adapted)
    assert f"artifact/{ADAPTER_FILE}" in mock.files
    mock.close()
    open_runtime("executorch", mock, threads=1).prepare(pte_folder)
    assert sorted(mock.files) == [*AGENT, "artifact/model.pte"]


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        (
            {"machine": "armv7l"},
            UnsupportedDeviceError,
            r"its system is armv7l; .* 64-bit x86_64, amd64, aarch64, arm64",
        ),
        ({"machine": "aarch64", "bits": 32}, UnsupportedDeviceError, r"its system is aarch64, 32-bit programs"),
        ({"free_memory_bytes": 1000}, CapacityError, r"weights take 0 MB of memory and the device has 0 MB free"),
    ],
)
def test_an_unsupported_device_is_reported_before_anything_is_sent(
    changed: dict[str, Any], error: type[Exception], words: str, onnx_folder: Path
) -> None:
    mock = MockTransport(lambda argv, files: CompletedProgram(0, "", ""))
    mock.described = dataclasses.replace(mock.described, **changed)
    with pytest.raises(error, match=f"mock: .*{words}.*Nothing was sent"):
        open_runtime("onnx", mock, threads=1).prepare(onnx_folder)
    assert mock.files == {}


def test_a_lost_connection_is_retried_and_then_reported() -> None:
    left = [2]

    def handler(argv: Sequence[str], files: dict[str, bytes]) -> CompletedProgram:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionLostError("mock: the connection was lost.")
        figures = {"prefill_tokens_per_s": [1], "decode_tokens_per_s": [2], "ttft_ms": [3], **STATE}
        files["results/result.json"] = json.dumps({"format": 2, "load": LOAD, **figures}).encode()
        return CompletedProgram(0, "", "")

    mock = MockTransport(handler)
    speed = open_runtime("onnx", mock, threads=1).speed(1, 101, 1)
    assert speed.decode_tokens_per_s == (2,)
    assert (speed.step_percentile(50), speed.step_percentile(95)) == (50.0, 95.0)
    assert speed.remarks() == ("a token was decoded in 50.00 ms (p50), 95.00 ms (p95)",)
    assert [call[0] for call in mock.calls] == ["push", "run", "push", "run", "push", "run", "pull"]
    left[0] = 3
    with pytest.raises(ConnectionLostError, match=r"the connection was lost\. It was tried 3 times"):
        open_runtime("onnx", mock, threads=1).speed(1, 101, 1)


def test_sequences_longer_than_the_context_are_rejected(runtime: Runtime) -> None:
    with pytest.raises(RequestRejectedError, match=rf"local: sequence 0 takes {CONTEXT + 1} tokens .* holds {CONTEXT}"):
        list(runtime.score([[1] * (CONTEXT + 1)]))
    with pytest.raises(RequestRejectedError, match="the prompt and the decode steps takes"):
        runtime.speed(prefill=CONTEXT, decode=1, repeats=1)


def test_empty_sequences_are_rejected(runtime: Runtime) -> None:
    with pytest.raises(RequestRejectedError, match="sequence 1: no token ids were given"):
        list(runtime.score([[1], []]))
    with pytest.raises(RequestRejectedError, match="prompt 0 and a first token: no token ids were given"):
        runtime.generate([[]], eos_ids=[11], max_new_tokens=1)


@pytest.mark.parametrize(("target", "name"), [("executorch", "model.pte"), ("onnx", "model.onnx")])
def test_a_damaged_artifact_is_named(target: str, name: str, local: LocalTransport, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08\x01 not what it should be" * 9)
    runtime = open_runtime(target, local, threads=1)
    runtime.prepare(tmp_path)
    with pytest.raises(RequestRejectedError, match=f"local: {name} cannot be loaded: "):
        list(runtime.score([[1, 2]]))


def test_a_missing_artifact_is_reported_before_anything_runs(local: LocalTransport, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"expected one \.pte there, found 0"):
        open_runtime("executorch", local, threads=1).prepare(tmp_path)
    with pytest.raises(TransportError, match=r"no model\.onnx there"):
        open_runtime("onnx", local, threads=1).prepare(tmp_path)


def test_a_missing_package_has_its_name_on_pypi(pte_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare-python"  # no site-packages, like a device before anything is installed
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -E -s -S "$@"\n')
    bare.chmod(0o755)
    transport = LocalTransport(python=str(bare), root=tmp_path)
    runtime = open_runtime("executorch", transport, threads=1)
    runtime.prepare(pte_folder)
    with pytest.raises(MissingPackageError, match=r"lacks the package torch\. .*bare-python -m pip install torch"):
        runtime.speed(1, 1, 1)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (-signal.SIGKILL, KilledError, r"ended by SIGKILL\. .*memory runs out.*\n  the last words"),
        (128 + signal.SIGSEGV, KilledError, r"ended by SIGSEGV\. .*crashed"),
        (agent.EXIT_REJECTED, RequestRejectedError, "mock: the last words"),
        (agent.EXIT_MISSING_PACKAGE, MissingPackageError, "pip install the last words"),
        (1, ProgramError, r"failed with exit code 1\. .*\n  first\n  the last words"),
    ],
)
def test_exit_codes_of_the_agent_become_errors_with_advice(code: int, error: type[Exception], words: str) -> None:
    mock = MockTransport(lambda argv, files: CompletedProgram(code, "", "first\nthe last words\n"))
    with pytest.raises(error, match=f"(?s){words}") as caught:
        open_runtime("onnx", mock, threads=1).speed(1, 1, 1)
    assert type(caught.value) is error
    assert mock.calls[-1] == ("run", "python3", "-m", "agent.agent", "request.json", "results")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 0}', json.dumps({"format": 2, "load": {}}), json.dumps({"format": 2, "load": LOAD})],
)
def test_unreadable_results_are_an_error(text: str) -> None:
    def handler(argv: Sequence[str], files: dict[str, bytes]) -> CompletedProgram:
        files["results/result.json"] = text.encode()
        return CompletedProgram(0, "", "")

    with pytest.raises(ResultError, match="mock: the agent succeeded, but its results cannot be read"):
        open_runtime("onnx", MockTransport(handler), threads=1).speed(1, 1, 1)
    with pytest.raises(ResultError):
        list(open_runtime("onnx", MockTransport(handler), threads=1).score([[1]]))


def test_missing_logits_are_an_error() -> None:
    def handler(argv: Sequence[str], files: dict[str, bytes]) -> CompletedProgram:
        files["results/result.json"] = json.dumps({"format": 2, "load": LOAD, "scored": 1}).encode()
        return CompletedProgram(0, "", "")

    with pytest.raises(ResultError, match="not all their logits came back"):
        list(open_runtime("onnx", MockTransport(handler), threads=1).score([[1]]))


def test_missing_outputs_are_an_error() -> None:
    def handler(argv: Sequence[str], files: dict[str, bytes]) -> CompletedProgram:
        files["results/result.json"] = json.dumps({"format": 2, "load": LOAD, "outputs": ["logits"]}).encode()
        return CompletedProgram(0, "", "")

    with pytest.raises(ResultError, match="not all outputs of 1 sequences came back"):
        list(open_runtime("onnx", MockTransport(handler), threads=1).trace([[1]], 0))


def test_agent_and_host_have_the_same_protocol_constants() -> None:
    for name in ("FORMAT", "EXIT_REJECTED", "EXIT_MISSING_PACKAGE"):
        assert getattr(agent, name) == getattr(runtime_side, name)


def test_the_agent_imports_nothing_of_the_package() -> None:
    for name in AGENT:
        assert "qat_edge" not in (runtime_side.AGENT.parent / name).read_text()


def test_memory_figures_come_from_the_kernel() -> None:
    assert machine.forget_peak()
    before = machine.peak_bytes()
    block: Any = np.ones(40_000_000, np.uint8)
    assert machine.peak_bytes() - before > 0.9 * block.nbytes
    del block
    assert machine.forget_peak()
    assert machine.peak_bytes() - before < 20_000_000
