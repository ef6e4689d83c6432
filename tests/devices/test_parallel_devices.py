"""Several devices in parallel: a failure of one never stops another, and Ctrl-C stops all."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from qat_edge.errors import DeviceError, GateError, RunError, UsageError
from qat_edge.evaluate.devices import connect, report_paths, run_on_devices
from qat_edge.evaluate.results import Agreement, Gate, Report
from qat_edge.options import ValidateOptions
from qat_edge.verbs.validate import Validated, require_success
from qat_edge_devices.device_errors import KilledError
from qat_edge_devices.mock import MockTransport
from qat_edge_devices.transport import CompletedProgram, Transport


def mocks(*names: str) -> dict[str, Transport]:
    return {name: MockTransport(lambda argv, files: CompletedProgram(0, "", ""), name=name) for name in names}


def report(device: str, passed: bool = True) -> Report:
    gates = [Gate("--max-kl", 0.1, "qat, onnx", 0.05 if passed else 0.5, passed)]
    return Report("now", device, {}, {}, 64, Agreement(64, 0.0, 1.0, None), [], gates)


def test_devices_run_in_parallel_and_fail_independently() -> None:
    names = [f"ssh:{letter}" for letter in "abcdefgh"]
    meeting = threading.Barrier(len(names), timeout=60)

    def work(device: str, transport: Transport) -> str:
        meeting.wait()  # passes only if all eight run at once
        if device == "ssh:b":
            raise KilledError("ssh:b: ended by SIGKILL")
        if device == "ssh:c":
            raise RunError("disk full")
        return device.upper()

    results, failures = run_on_devices(mocks(*names), work)
    assert results == {name: name.upper() for name in names if name not in ("ssh:b", "ssh:c")}
    assert failures == {"ssh:b": "ssh:b: ended by SIGKILL", "ssh:c": "disk full"}


def test_this_machine_is_measured_alone() -> None:
    order: list[str] = []
    run_on_devices(mocks("ssh:a", "local"), lambda device, transport: order.append(device))
    assert order == ["local", "ssh:a"]


def test_an_interrupt_cancels_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()
    transports = mocks("ssh:a", "ssh:b")
    for transport in transports.values():
        monkeypatch.setattr(transport, "cancel", cancelled.set)

    def interrupt(futures: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qat_edge.evaluate.devices.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_on_devices(transports, lambda device, transport: cancelled.wait(10))
    assert cancelled.is_set()


def test_a_bug_is_not_reported_as_a_failure_of_the_device() -> None:
    def work(device: str, transport: Transport) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_on_devices(mocks("ssh:a"), work)


def test_each_device_has_its_own_report_file(tmp_path: Path) -> None:
    devices = ("local", "ssh:pi@kitchen", "ssh://pi@kitchen:2222", "adb", "adb:10.0.0.9:5555", "adb:../../etc")
    names = ["local", "ssh-pi@kitchen", "ssh-pi@kitchen-2222", "adb", "adb-10.0.0.9-5555", "adb-..-..-etc"]
    assert [path.name for path in report_paths(tmp_path, devices).values()] == [f"{name}.json" for name in names]
    for twice in (("local", "local"), ("ssh:pi@kitchen", "ssh://pi@kitchen")):
        with pytest.raises(UsageError, match="more than once"):
            report_paths(tmp_path, twice)


def test_an_unknown_transport_is_a_usage_error_and_an_unreachable_device_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (
        ExitStack() as stack,
        pytest.raises(UsageError, match=r"--device lokal: 'lokal' is not a known transport\. Known: adb"),
    ):
        connect(ValidateOptions(device=("lokal",)), stack)
    monkeypatch.setenv("PATH", str(tmp_path))  # neither ssh nor adb there
    with ExitStack() as stack:
        options = ValidateOptions(device=("local", "ssh:nowhere"), device_python="/opt/python", device_folder="/opt")
        reached, failures = connect(options, stack)
        assert list(reached) == ["local"] and reached["local"].python != "/opt/python"
        assert "no `ssh` on this machine" in failures["ssh:nowhere"]


def test_failures_and_missed_gates_are_listed_by_device() -> None:
    good, bad = report("local"), report("ssh:a", passed=False)
    require_success(Validated([good], {}))
    with pytest.raises(GateError, match=r"^ssh:a: 1 of 1 gates missed: qat, onnx: --max-kl 0\.1, measured 0\.5$"):
        require_success(Validated([good, bad], {}))
    with pytest.raises(DeviceError, match=r"(?s)^1 of 3 devices failed\.\nadb: gone\nssh:a: 1 of 1 gates missed"):
        require_success(Validated([good, bad], {"adb": "gone"}))
    assert replace(good, device="x").gates == good.gates
