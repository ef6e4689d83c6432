"""Export benchmark: parameter counts, line fits, stages, resuming, the page, and a tiny export in processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import export, export_page, export_step
from benchmarks.export_step import LAYERS, MODELS, SIZES, Shape
from benchmarks.page import MISSING
from qat_edge.errors import QatEdgeError, RunError


def made(seconds: float, peak: float) -> dict[str, Any]:
    """Return a finished export as the store returns it."""
    stages = [
        {"name": "tracing", "seconds": 2 * seconds, "cpu_seconds": 0.75 * seconds, "peak_bytes": peak / 2},
        {"name": "lowering", "seconds": seconds, "cpu_seconds": 0.25 * seconds, "peak_bytes": peak},
        {"name": "a remark in between", "seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": peak},
    ]
    figures = {
        "seconds": 3 * seconds, "cpu_seconds": seconds, "peak_bytes": peak, "runtime_bytes": 0.5e9,
        "file_bytes": 4e6, "stages": stages,
    }  # fmt: skip
    return {
        "figures": figures, "wall_s": 60.0, "created": "2026-01-02T03:04:05+00:00", "machine": "x86_64, 2 cores",
        "python": "3.11.7", "libraries": {"torch": "2.13.0"}, "git_revision": "abc",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["50M", "1.5B"])
def test_models_have_the_size_that_their_name_states(name: str) -> None:
    shape = SIZES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    assert shape.parameters == model.num_parameters()
    assert shape.float_bytes == 4 * shape.parameters
    wanted = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
    assert shape.parameters == pytest.approx(wanted, rel=0.03)


def test_models_by_layers_differ_in_layers_only() -> None:
    assert {shape.heads for shape in LAYERS.values()} == {SIZES["135M"].heads}
    assert LAYERS["30 layers"] == SIZES["135M"] and len({shape.layers for shape in LAYERS.values()}) == len(LAYERS)


def test_a_fit_reports_the_largest_deviation() -> None:
    line = [(x, 3 + 2 * x) for x in (1.0, 2.0, 5.0)]
    assert export_page.fit(line) == pytest.approx((3, 2, 0))
    bent = export_page.fit([(x, x * x) for x in (1.0, 2.0, 3.0, 4.0)])
    assert bent is not None and bent.worst > 0.2
    assert export_page.fit(line[:2]) is None


def test_a_stage_lasts_until_the_next_and_a_progress_bar_is_one_stage() -> None:
    stages = export_step._Stages()
    stages.info("loading")
    sum(range(200_000))
    with stages.progress(export_step.PARTITIONS, 2) as bar:
        for done in (1, 2):
            bar.update(done)
            sum(range(200_000))
    stages.info("writing")
    sum(range(200_000))
    stages.end()
    assert [stage.name for stage in stages.found] == ["loading", "lowering partitions", "writing"]
    loading, lowering, _ = stages.found
    assert lowering.cpu_seconds > loading.cpu_seconds > 0 and lowering.peak_bytes > 0


def test_the_page_has_the_figures_computed_by_hand(tmp_path: Path) -> None:
    # 2 s + 1 s per layer, and 0.5 GB of libraries + twice the weights.
    done = {name: shape for name, shape in MODELS.items() if name != "1.5B"}
    records = {name: made(2.0 + shape.layers, 0.5e9 + 2 * shape.float_bytes) for name, shape in done.items()}
    result = tmp_path / "export.json"
    result.write_text(json.dumps(records))
    page = export_page.write(result, tmp_path / "export.md").read_text()
    assert "CPU time = 2.00 s + 1.00 s per layer" in page and "peak = 0.500 GB + 2.00 times" in page
    assert f"| 1.5B | 1,484 | 29 | {MISSING} | {MISSING} | 5.93 |" in page
    # 1,009 M parameters take 4.03 GB; 0.5 + 2 * 4.03 = 8.57, and 8.57 / 4.03 = 2.12.
    assert "| 1.0B | 1,009 | 29 | 93.0 | 31.0 | 4.03 | 8.57 | 0.500 | 2.12 | 2.00 | 4.00 |" in page
    assert "| 12 | 42.0 | 14.0 | 1.00 |" in page
    assert "| 135M | 24.0 s, 0.788 GB | 8.00 s, 1.58 GB |" in page and "a remark in between" not in page
    drawn = (tmp_path / "export.svg").read_text()
    assert drawn.count("<polygon") == len(LAYERS) + len(SIZES) - 1
    with pytest.raises(RunError, match="--page-only"):
        export_page.write(tmp_path / "nothing.json", tmp_path / "export.md")


def test_the_committed_report_has_the_shape_of_this_version() -> None:
    path = export.ROOT / "docs" / "export.md"
    if not path.is_file():
        pytest.skip("the benchmark has not been run yet")
    records = {name: made(2.0, 1e9) for name in MODELS}
    expected, committed = export_page.render(records, "export.svg"), path.read_text()
    headings = [[line for line in page.splitlines() if line.startswith("#")] for page in (committed, expected)]
    assert headings[0] == headings[1]
    heads = [line for line in expected.splitlines() if line.startswith(("| model | parameters", "| layers of"))]
    assert len(heads) == 2 and all(head in committed.splitlines() for head in heads)
    assert expected.split("\n\n")[1] in committed, "the introduction"


def test_a_finished_export_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Shape] = []

    def measure_export(shape: Shape, work: Path) -> dict[str, Any]:
        done.append(shape)
        return made(1.0, 1e9)["figures"]

    monkeypatch.setattr(export, "measure_export", measure_export)
    assert set(export.measure_all(["50M"], tmp_path)) == {"50M"}
    # 30 layers of SmolLM2's width are the 135M model: one export has both names.
    assert set(export.measure_all(["50M", "135M"], tmp_path)) == {"50M", "135M", "30 layers"}
    assert done == [SIZES["50M"], SIZES["135M"]]


def test_a_process_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(QatEdgeError, match=r"measure.*no checkpoint"):
        export._step("measure", str(tmp_path), str(tmp_path), str(tmp_path / "result.json"))


def test_a_tiny_model_is_exported_in_separate_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(heads=3, layers=1)
    figures = export.measure_export(shape, tmp_path)
    assert {"exporting the graph", "lowering partitions", "writing model.pte"} <= {s["name"] for s in figures["stages"]}
    assert sum(stage["cpu_seconds"] for stage in figures["stages"]) == pytest.approx(figures["cpu_seconds"])
    # One int8 table and int4 matrices take about a third of their size in float.
    assert 49152 * shape.width < figures["file_bytes"] < shape.float_bytes * 0.35
    assert figures["peak_bytes"] > figures["runtime_bytes"] > 0
    assert not list(tmp_path.glob(".export*"))
