"""The page of accuracy against size: figures come from cells, differences are paired, missing cells say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import frontier, frontier_peers, scheme_speed, settings
from benchmarks.peers import PeerError
from benchmarks.runner import BenchmarkRunner, Figures
from benchmarks.settings import FP32, SETTINGS


def figures(right: int, nats: float, size_bytes: int | None) -> Figures:
    """Return the figures of a model that answers the first `right` of 40 rows."""
    rows = [[f"prompt-{i}", float(i < right), 1] for i in range(40)]
    return {"rows": rows, "rows_loss": [[f"row-{i}", nats * 10, 10] for i in range(40)], "size_bytes": size_bytes}


def test_qat_is_compared_with_ptq_of_its_scheme_row_by_row(tiny_model_folder: Path, tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path / "work", str(tiny_model_folder), "cpu", SETTINGS["reduced"])
    path = tmp_path / "page.md"
    frontier.write(runner, [0], path)
    assert f"Not measured yet: {'; '.join(settings.SCHEMES)}." in path.read_text()
    assert not path.with_suffix(".svg").exists()

    measured = {
        FP32: figures(30, 0.1, None),
        "4 bits, PTQ": figures(29, 0.1, 90_000_000),
        "2 bits, PTQ": figures(10, 0.3, 60_000_000),
        "2 bits, QAT": figures(12, 0.3, 60_000_000),
        "2 bits, QAT for a tenth": figures(11, 0.3, 60_000_000),
        "2 bits, QAT of scales": figures(24, 0.2, 60_000_000),
    }
    for name, found in measured.items():
        runner.store.put(frontier.cell(runner, name, 0), found, 1.0)
    frontier.write(runner, [0], path)
    rows = {line.split(" | ")[0].strip("| "): line for line in path.read_text().splitlines() if line.startswith("| ")}
    assert "| float32 | 75.0% (" in rows["FP32 fine-tune"]
    assert "90.0 MB | 72.5% (" in rows["4 bits, PTQ"]
    # Two more right answers of 40 may be chance.
    assert "60.0 MB | 30.0% (" in rows["2 bits, QAT"] and "no difference shown" in rows["2 bits, QAT"]
    scales = rows["2 bits, QAT of scales"]
    assert "60.0% (" in scales and "35.0% (" in scales and "-0.1" in scales
    assert "4 bits, QAT" not in rows
    listed = "4 bits, QAT; 4 bits, QAT for a tenth; 4 bits, QAT of scales; 4 bits, groups of 64; "
    assert f"Not measured yet: {listed}" in path.read_text()
    assert path.with_suffix(".json").is_file()
    drawn = path.with_suffix(".svg").read_text()
    assert drawn.count("<title>2 bits, ") == 4 and "4 bits, PTQ: 90, 72.5" in drawn


def test_models_of_other_tools_have_a_table_and_marks_of_their_own(tiny_model_folder: Path, tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path / "work", str(tiny_model_folder), "cpu", SETTINGS["reduced"])
    path = tmp_path / "page.md"
    for name, found in {FP32: figures(30, 0.1, None), "llama.cpp Q4_0": figures(28, 0.1, 80_000_000)}.items():
        runner.store.put(frontier.cell(runner, name, 0), found, 1.0)
    frontier.write(runner, [0], path)
    assert "| llama.cpp Q4_0 | 80.0 MB | 70.0% (" in path.read_text() and "AutoRound, 2 bits" not in path.read_text()
    drawn = path.with_suffix(".svg").read_text()
    assert 'class="triangle"' in drawn and "llama.cpp Q4_0: 80, 70" in drawn
    assert frontier.cell(runner, "llama.cpp Q4_0", 0) != frontier.cell(runner, "llama.cpp Q2_K", 0)


def test_a_model_of_another_tool_is_compared_with_our_ptq_on_its_own_seeds(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    runner = BenchmarkRunner(tmp_path / "work", str(tiny_model_folder), "cpu", SETTINGS["reduced"])
    for seed, right in ((0, 30), (1, 5)):
        runner.store.put(frontier.cell(runner, FP32, seed), figures(32, 0.1, None), 1.0)
        runner.store.put(frontier.cell(runner, "2 bits, PTQ", seed), figures(right, 0.3, 60_000_000), 1.0)
    runner.store.put(frontier.cell(runner, "AutoRound, 2 bits", 0), figures(10, 0.5, 70_000_000), 1.0)
    frontier.write(runner, [0, 1], tmp_path / "page.md")
    (row,) = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| AutoRound")]
    assert "| 70.0 MB | 25.0% (" in row and "| -50.0% (" in row and row.endswith("| 2 bits | one seed |")


def test_a_peer_that_cannot_be_made_is_left_out(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    def fail(runner: BenchmarkRunner, name: str, *given: object) -> Figures:
        if name.startswith("llama.cpp"):
            raise PeerError("no compiler")
        return figures(20, 0.2, 60_000_000)

    monkeypatch.setattr(frontier_peers, "measure", fail)
    runner = BenchmarkRunner(tmp_path / "work", str(tiny_model_folder), "cpu", SETTINGS["reduced"])
    frontier.measure_peers(runner, 0)
    measured = [name for name in frontier_peers.PEERS if runner.store.get(frontier.cell(runner, name, 0))]
    assert measured == ["AutoRound, 4 bits", "AutoRound, 2 bits"]
    assert "llama.cpp Q2_K: no compiler" in messages


def test_speed_is_compared_within_each_round(tiny_model_folder: Path, tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path / "work", str(tiny_model_folder), "cpu", SETTINGS["reduced"])
    rates = {name: [100.0, 50.0] for name in settings.SCHEMES} | {"2 bits": [120.0, 75.0]}
    runner.store.put(scheme_speed.cell(runner), {"decode": rates}, 1.0)
    frontier.write(runner, [], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| 4 bits | 75.0 (50.0 to 100) | 1.00 (1.00 to 1.00) |" in page
    assert "| 2 bits | 97.5 (75.0 to 120) | 1.35 (1.20 to 1.50) |" in page
    assert "decode" in (tmp_path / "page.json").read_text()


def test_every_scheme_has_each_finish() -> None:
    assert len(settings.FRONTIER) == len(settings.SCHEMES) * len(settings.FINISHES)
    assert settings.FRONTIER["2 bits, QAT"]["qat_learning_rate"] == 5e-5
    assert settings.FRONTIER["2 bits, QAT for a tenth"]["qat_learning_rate"] == 5e-5
    assert "qat_learning_rate" not in settings.FRONTIER["4 bits, QAT"]
    settings.check_recipes()
