"""A second validation sends only what changed: all bytes sent to the device are counted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from device_fixtures import device_under_test, unavailable_reason

from conftest import train_run
from qat_edge.options import ExportOptions, ValidateOptions
from qat_edge.verbs.export import export
from qat_edge.verbs.validate import require_success, validate_devices
from qat_edge_devices import remote

MOST_BYTES = 1_000_000
OPTIONS = ValidateOptions(tokens=64, window=64, prompts=2, max_new_tokens=4, threads=1, prefill=8, decode=4, repeats=1)


def test_a_second_validation_sends_no_artifact(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_run(tiny_model_folder, tmp_path)
    export(run, ExportOptions(target=("onnx",), context_length=128, ptq=("none",)))
    sizes = [path.stat().st_size for path in (run.exports / "onnx").iterdir()]
    large = sum(size for size in sizes if size >= remote.CACHE_BYTES)
    sent: dict[str, list[int]] = {}
    for device_type in ("ssh", "adbd"):
        if unavailable_reason(device_type) is not None:
            continue
        with device_under_test(device_type, tmp_path / device_type, monkeypatch) as dut:
            assert dut.sent is not None
            options = replace(
                OPTIONS, device=(dut.device,), device_python=sys.executable, device_folder=str(dut.folder),
                ssh_config=dut.ssh_config,
            )  # fmt: skip
            for _ in range(2):
                before = dut.sent()
                require_success(validate_devices(run, options, force=True))
                sent.setdefault(device_type, []).append(dut.sent() - before)
    if not sent:
        pytest.skip("neither sshd nor adbd is here (tests/devices/install does it)")
    for first, second in sent.values():
        assert first > large > 0
        assert second < MOST_BYTES and second < first - 0.95 * large
