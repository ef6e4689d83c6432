"""Results of a hostile device: whatever it sends is a correct value or an error that names the device."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qat_edge.errors import DeviceError
from qat_edge.evaluate.reference import read_rows
from qat_edge_devices import device_data, open_transport
from qat_edge_devices.device_errors import DeviceLayerError, ResultError, UnknownNameError, tail
from qat_edge_devices.process import MOST_OUTPUT_BYTES, Launcher
from qat_edge_devices.remote import _unpack
from qat_edge_devices.runtime import LoadStats, MachineState, TimedRun
from qat_edge_devices.runtimes.agent_runtime import ExecuTorchRuntime
from qat_edge_devices.shell import Script
from qat_edge_devices.transport import parse_kilobytes

STATE = {"clocks_khz": [1], "permitted_khz": [], "times_slowed": None, "celsius": 20, "battery_percent": None}
LOAD = {
    "runtime": "onnxruntime", "runtime_version": "1", "threads": 2, "pool_threads": None, "context_length": 64,
    "load_ms": 1.5, "baseline_rss_bytes": 1, "peak_rss_bytes": 2, "peak_includes_import": False,
}  # fmt: skip


def test_records_are_checked_field_by_field() -> None:
    assert device_data.record(MachineState, STATE) == MachineState((1,), (), None, 20, None)
    assert device_data.record(LoadStats, LOAD).threads == 2


@pytest.mark.parametrize(
    "change",
    [
        {"threads": "2"}, {"threads": True}, {"threads": 2.0}, {"threads": None}, {"load_ms": float("nan")},
        {"load_ms": 10**30}, {"runtime": 3}, {"peak_includes_import": 0}, {"more": 1},
    ],
)  # fmt: skip
def test_other_types_and_figures_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        device_data.record(LoadStats, LOAD | change)


def test_text_cannot_drive_a_terminal() -> None:
    assert device_data.record(LoadStats, LOAD | {"runtime": "\x1b[2Jonnx"}).runtime == " [2Jonnx"
    assert "\x1b" not in tail("\x1b]0;owned\x07")
    assert len(tail("x" * 10**6)) < 2000


@pytest.mark.parametrize("text", ["9" * 5000, "²", "-1", "", "1e3"])
def test_numbers_of_a_device_are_limited(text: str) -> None:
    assert device_data.whole_number(text) is None
    assert parse_kilobytes(text) is None


class HostileTransport:
    """A device whose agent succeeds and returns whatever the test wants."""

    name, python = "ssh:stranger", "python3"

    def __init__(self, result: bytes, output: str = "") -> None:
        self.result, self.output = result, output

    def push(self, files: Any, keep: bool = True) -> None:
        pass

    def run(self, argv: Any, timeout_s: float, env: Any = None, on_line: Any = None) -> Any:
        from qat_edge_devices.transport import CompletedProgram

        for line in self.output.splitlines():
            on_line(line)
        return CompletedProgram(0, self.output, "")

    def pull(self, remote: str, local: Path) -> None:
        local.mkdir()
        (local / "result.json").write_bytes(self.result)


RESULTS = [
    b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": 2}', b'{"format": [], "load": {}}',
    json.dumps({"format": 2, "load": LOAD, "completions": [1]}).encode(),
    json.dumps({"format": 2, "load": LOAD, "completions": []}).encode(),
    json.dumps({"format": 2, "load": LOAD, "scored": 10**9, "outputs": 3}).encode(),
    json.dumps({"format": 2, "load": {**LOAD, "threads": "x"}, "scored": 1, "outputs": ["logits"]}).encode(),
    json.dumps({"format": 2, "load": LOAD, "completions": [{"ids": [1] * 9, "stopped": "eos", "ttft_ms": 1}]}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("result", RESULTS, ids=range(len(RESULTS)))
def test_a_hostile_result_is_an_error_that_names_the_device(result: bytes) -> None:
    runtime = ExecuTorchRuntime(HostileTransport(result), 1)  # type: ignore[arg-type]
    for call in (
        lambda: runtime.generate([[1]], [2], 4),
        lambda: list(runtime.score([[1]])),
        lambda: list(runtime.trace([[1]], 0)),
        lambda: runtime.speed(1, 2, 1),
    ):
        with pytest.raises(DeviceLayerError, match="ssh:stranger"):
            call()


TIMES = {
    "prefill_tokens_per_s": [9.0], "decode_tokens_per_s": [9.0], "ttft_ms": [1.0], "step_ms": [1.0, 1.0],
    "cores_busy": 1.0, "before": STATE, "after": STATE, "format": 2, "load": LOAD,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decode_tokens_per_s": [0.0]}, "decode_tokens_per_s has 0, which is no time or speed"),
        ({"ttft_ms": [-1.0]}, "ttft_ms has -1"),
        ({"prefill_tokens_per_s": [9.0, 9.0]}, "prefill_tokens_per_s has 2 figures, expected 1"),
        ({"step_ms": [1.0]}, "step_ms has 1 figures, expected 2"),
        ({"ttft_ms": [float("nan")]}, "ttft_ms is not a finite number"),
        ({"cores_busy": -1.0}, "cores_busy is -1"),
        ({"load": {**LOAD, "peak_rss_bytes": -5}}, "peak_rss_bytes is -5"),
    ],
)
def test_times_that_cannot_be_are_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    def timed(result: dict[str, Any]) -> TimedRun:
        return ExecuTorchRuntime(HostileTransport(json.dumps(result).encode()), 1).speed(1, 2, 1)  # type: ignore[arg-type]

    assert timed(TIMES).step_ms == (1.0, 1.0)
    with pytest.raises(ResultError, match=reason):
        timed(TIMES | changes)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [({"ids": [-1]}, "no token id"), ({"ids": [2**31]}, "no token id"), ({"stopped": "x"}, "ended otherwise than")],
)
def test_completions_that_cannot_be_are_refused(completion: dict[str, Any], reason: str) -> None:
    whole = {"ids": [1], "stopped": "eos", "ttft_ms": 1, **completion}
    result = json.dumps({"format": 2, "load": LOAD, "completions": [whole]}).encode()
    with pytest.raises(ResultError, match=reason):
        ExecuTorchRuntime(HostileTransport(result), 1).generate([[1]], [2], 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["a b", "$(id)", "a;b", "a`b`", "a\nb", "a\0b", "a|b", "-oProxyCommand=x", "me@-x"])
@pytest.mark.parametrize("transport", ["ssh", "adb"])
def test_addresses_that_a_shell_or_ssh_would_read_are_refused(transport: str, address: str) -> None:
    with pytest.raises(UnknownNameError, match=r"which no host name or serial number has|begins with '-'"):
        open_transport(f"{transport}:{address}")


def test_hostile_progress_is_ignored() -> None:
    seen: list[tuple[int, int]] = []
    lines = ["progress", "progress a b", f"progress {'9' * 5000} 2", "progress 1 2 3 4 5", "", "progress 1 2"]
    transport = HostileTransport(b"", "\n".join(lines))
    runtime = ExecuTorchRuntime(transport, 1, progress=lambda done, total: seen.append((done, total)))  # type: ignore[arg-type]
    with pytest.raises(ResultError):
        runtime.generate([[1]], [2], 4)
    assert seen == [(1, 2)]


def test_endless_output_is_stopped() -> None:
    with pytest.raises(ResultError, match=f"more than {MOST_OUTPUT_BYTES} bytes"):
        Launcher("phone").run(["sh", "-c", "while :; do head -c 1000000 /dev/zero; done"], 60)


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "data",
    [
        archive((member("../outside"), b"x")),
        archive((member("/outside"), b"x"), (member("results/../../outside"), b"x")),
        archive((member("results", tarfile.SYMTYPE, "/etc"), b"")),
        archive((member("results", tarfile.LNKTYPE, "../x"), b"")),
        archive((member("results", tarfile.FIFOTYPE), b"")),
        b"\0" * 100, b"garbage" * 200,
    ],
)  # fmt: skip
def test_an_archive_writes_nowhere_else(tmp_path: Path, data: bytes) -> None:
    script = Script("", "id", {})
    folder, errors = tmp_path / "inside", list[str]()
    folder.mkdir()
    _unpack(script, io.BytesIO(b"qat-edge-begin-id\n" + data), folder, errors)
    assert not (tmp_path / "outside").exists() and not Path("/outside").exists()
    assert not any(path.is_symlink() or path.is_fifo() for path in folder.rglob("*"))


def test_logits_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "logits.npy"
    np.save(path, np.zeros((3, 4), np.float32))
    assert read_rows(path, [0, 2], 4).shape == (2, 4)
    bad: list[Any] = [np.zeros((3, 5), np.float32), np.zeros((3, 4)), np.zeros(3, np.float32), np.array(["a"])]
    for values in bad:
        np.save(path, values)
        with pytest.raises(DeviceError, match="device returned logits"):
            read_rows(path, [0], 4)
    for data in (b"", b"\x93NUMPY\x01\x00\x10\x00{'descr': 1, }     ", path.read_bytes()[:60]):
        path.write_bytes(data)
        with pytest.raises(DeviceError, match="cannot be read"):
            read_rows(path, [0], 4)
