"""Validating again sends what changed and nothing else: all bytes on the way to the device are counted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from reached import on_the_way, why_not

from conftest import train_run
from qat_edge.config import ExportOptions, ValidateOptions
from qat_edge.verbs.export import export
from qat_edge.verbs.validate import require_success, validate_devices
from qat_edge_devices import remote

MOST_BYTES = 1_000_000
ASKED = ValidateOptions(tokens=64, window=64, prompts=2, max_new_tokens=4, threads=1, prefill=8, decode=4, repeats=1)


def test_a_second_validation_sends_no_artifact(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_run(tiny_model_folder, tmp_path)
    export(run, ExportOptions(target=("onnx",), context_length=128, ptq=("none",)))
    sizes = [path.stat().st_size for path in (run.exports / "onnx").iterdir()]
    large = sum(size for size in sizes if size >= remote.CACHE_BYTES)
    sent: dict[str, list[int]] = {}
    for kind in ("ssh", "adbd"):
        if why_not(kind) is not None:
            continue
        with on_the_way(kind, tmp_path / kind, monkeypatch) as way:
            assert way.sent is not None
            asked = replace(
                ASKED, device=(way.device,), device_python=sys.executable, device_folder=str(way.folder),
                ssh_config=way.ssh_config,
            )  # fmt: skip
            for _ in range(2):
                before = way.sent()
                require_success(validate_devices(run, asked, force=True))
                sent.setdefault(kind, []).append(way.sent() - before)
    if not sent:
        pytest.skip("neither sshd nor adbd is here (tests/devices/install does it)")
    for first, second in sent.values():
        assert first > large > 0
        assert second < MOST_BYTES and second < first - 0.95 * large
