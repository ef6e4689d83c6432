"""The page of all formats: what verify found, paired rounds, resuming, and runs that were not verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import engines, formats
from benchmarks.cells import CellStore
from qat_edge.errors import RunError
from qat_edge.manifest import MANIFEST, sha256, write_manifest
from qat_edge.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with two artifacts that verify found equal."""
    made, rows = Run(tmp_path / "run"), []
    for target in ("executorch", "onnx"):
        folder = made.exports / target
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(2_000_000))
        write_manifest(folder, "export")
        rows.append({
            "folder": f"exports/{target}", "manifest_sha256": sha256(folder / MANIFEST), "faults": [],
            "linears": 14, "linears_equal": 14, "adapter": 28 if target == "onnx" else 0, "adapter_equal": 28,
            "parity": {"error_db": -62.4, "noise_db": -62.1},
        })  # fmt: skip
    made.verified.write_text(json.dumps(rows))
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of timed artifacts, in order; `.pte` decodes twice as fast as the ONNX folder."""
    timed: list[str] = []

    def time(target: str, folder: Path, threads: int, amounts: engines.Amounts) -> dict[str, float]:
        timed.append(target)
        return {"prefill": 400.0, "decode": 100.0 if target == "executorch" else 50.0}

    monkeypatch.setattr(engines, "timed_artifact", time)
    return timed


def test_the_page_shows_what_verify_found_and_paired_ratios(run: Run, calls: list[str], tmp_path: Path) -> None:
    found = formats.formats(run)
    page = formats.text(found, formats.rounds(found, CellStore(tmp_path / "cells"), 2))
    assert calls == ["executorch", "onnx", "onnx", "executorch"]  # each round begins with another one
    onnx = next(line for line in page.splitlines() if line.startswith("| ONNX folder"))
    assert "14 of 14, 28 of 28 | -62 (-62) | 400 (400 to 400) | 50.0 (50.0 to 50.0) | 0.500 (0.500 to 0.500)" in onnx
    assert "| 2.00 |" in onnx  # MB

    # A finished round is not measured again.
    formats.rounds(found, CellStore(tmp_path / "cells"), 3)
    assert len(calls) == 6


def test_an_artifact_that_was_not_verified_is_refused(run: Run) -> None:
    rows = json.loads(run.verified.read_text())
    for change in ({"faults": ["a code differs"]}, {"manifest_sha256": "of an earlier export"}):
        run.verified.write_text(json.dumps([rows[0], rows[1] | change]))
        with pytest.raises(RunError, match=r"exports/onnx: not verified, or not equal. Run `qat-edge verify"):
            formats.formats(run)


def test_an_artifact_that_does_not_run_here_has_no_error(run: Run) -> None:
    rows = json.loads(run.verified.read_text())
    rows[1]["parity"] = {"error_db": None, "noise_db": None}
    run.verified.write_text(json.dumps(rows))
    assert [each.error for each in formats.formats(run)] == ["-62 (-62)", "not measured"]
