"""The page about 2 bits: figures come from cells, differences are paired, and missing cells say so."""

from __future__ import annotations

from pathlib import Path

from benchmarks import two_bits
from benchmarks.runner import BenchmarkRunner, Figures
from benchmarks.settings import FP32, SETTINGS


def figures(right: int, nats: float, size_bytes: int | None) -> Figures:
    """Return the figures of a model that answers the first `right` of 40 rows."""
    rows = [[f"prompt-{i}", float(i < right), 1] for i in range(40)]
    return {"rows": rows, "rows_loss": [[f"row-{i}", nats * 10, 10] for i in range(40)], "size_bytes": size_bytes}


def test_models_are_compared_with_ptq_row_by_row(tiny_model_folder: Path, tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path / "work", str(tiny_model_folder), "cpu", SETTINGS["reduced"])
    path = tmp_path / "page.md"
    two_bits.write(runner, [0], path)
    assert path.read_text().count("not measured | not measured") == 2 * len(two_bits.TITLES)

    measured = {
        FP32: figures(30, 0.1, None),
        two_bits.BASELINE: figures(10, 0.3, 60_000_000),
        "2 bits, QAT": figures(12, 0.3, 60_000_000),
        "2 bits, QAT of scales": figures(24, 0.2, 60_000_000),
    }
    for name, found in measured.items():
        runner.store.put(two_bits.cell(runner, name, 0), found, 1.0)
    two_bits.write(runner, [0], path)
    rows = {line.split(" | ")[0].strip("| "): line for line in path.read_text().splitlines() if line.startswith("| ")}
    assert "| float32 | 75.0% (" in rows["FP32 fine-tune"] and "50.0% (" in rows["FP32 fine-tune"]
    weights_and_scales = rows["2 bits, PTQ, then QAT of weights and scales"]
    # Two more right answers of 40 may be chance.
    assert "60.0 MB | 30.0% (" in weights_and_scales and "no difference shown" in weights_and_scales
    scales = rows["2 bits, PTQ, then QAT of scales alone"]
    assert "60.0% (" in scales and "35.0% (" in scales and "-0.1" in scales
    assert "not measured" in rows["4 bits, PTQ alone"]
    assert path.with_suffix(".json").is_file()
