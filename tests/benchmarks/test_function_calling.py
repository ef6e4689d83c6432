"""The page of function calls: shares come from the answers, and what rounding loses decides whether they are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import function_calling
from benchmarks.function_calling import REFERENCE, RUNTIMES, recovered, source_name, write
from benchmarks.runner import BenchmarkRunner, Figures, Training
from benchmarks.settings import CALLS, RECOMMENDED, SETTINGS
from qat_edge.errors import QatEdgeError
from qat_edge.public_tasks.answer_records import Answered


@pytest.fixture
def runner(tiny_model_folder: Path, tmp_path: Path) -> BenchmarkRunner:
    """A runner whose rows are there, so that nothing is downloaded."""
    folder = tmp_path / "work" / "data" / CALLS.name
    folder.mkdir(parents=True)
    for name in ("train", "eval", "guard"):
        (folder / f"{name}.jsonl").write_text("{}\n")
    return BenchmarkRunner(tmp_path / "work", str(tiny_model_folder), "cpu", SETTINGS["reduced"])


def figures(right: Callable[[str], int]) -> Figures:
    """Return the figures of models that answer the first `right` of 50 questions."""
    names = [REFERENCE, *(source_name(method, runtime) for runtime in RUNTIMES for method in function_calling.NAMES)]
    return {"answers": {name: [[f"bfcl_simple: {i}", float(i < right(name))] for i in range(50)] for name in names}}


def page_of(runner: BenchmarkRunner, path: Path, right: Callable[[str], int]) -> dict[str, str]:
    """Return the lines of the page by model and runtime."""
    runner.store.put(function_calling.cell(runner, 0), figures(right), 1.0)
    write(runner, [0], path)
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return {" | ".join(line.split(" | ")[:2]).strip("| "): line for line in lines}


def test_recovery_is_the_share_of_what_rounding_loses(runner: BenchmarkRunner, tmp_path: Path) -> None:
    counts = {REFERENCE: 40, "onnx": 36, "rtn/onnx": 20}
    rows = page_of(runner, tmp_path / "page.md", lambda name: counts.get(name, 40))
    assert "80.0% (" in rows["FP32 fine-tune | torch"]
    assert "40.0% (" in rows["round-to-nearest | ONNX"] and "-40.0% (" in rows["round-to-nearest | ONNX"]
    assert rows["QAT | ONNX"].split(" | ")[4].startswith("80.0% (")
    # Nothing is lost in the other runtime.
    assert "no difference shown" in rows["round-to-nearest | `.pte`"]
    assert "loses too little to tell" in rows["QAT | `.pte`"]
    assert (tmp_path / "page.json").is_file()


def test_a_page_without_figures_says_so(runner: BenchmarkRunner, tmp_path: Path) -> None:
    write(runner, [], tmp_path / "page.md")
    assert "| FP32 fine-tune | torch | not measured |" in (tmp_path / "page.md").read_text()


def test_models_are_compared_on_the_same_questions() -> None:
    answers = [Answered(str(i), "", float(i < 3), 1, "") for i in range(4)]
    with pytest.raises(QatEdgeError, match="not asked the same questions"):
        recovered(answers, answers[:3], answers)


def test_an_interrupted_measurement_goes_on_in_the_same_folder(
    runner: BenchmarkRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "train", lambda training: pytest.fail("trained again"))
    folder = runner.folder(Training(CALLS.name, 0, function_calling.STEPS, RECOMMENDED), "-joined")
    folder.mkdir(parents=True)
    assert runner.joined(CALLS.name, 0, function_calling.STEPS, (), keep=True).path == folder
