"""The page of function calls: shares come from the answers, and what rounding loses decides whether they are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import function_calling
from benchmarks.function_calling import REFERENCE, RUNTIMES, recovered, source_name, write
from benchmarks.runner import BenchmarkRunner, Figures, Training
from benchmarks.settings import CALLS, LONG_QAT, RECOMMENDED, SETTINGS
from qat_edge.errors import QatEdgeError
from qat_edge.public_tasks.answer_records import Answered
from qat_edge.public_tasks.function_calls import INSTRUCTION
from qat_edge.verbs.task_rows import TaskRows


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
    names = [REFERENCE, *(source_name(method, runtime) for runtime in RUNTIMES for method in function_calling.METHODS)]
    return {"answers": {name: [[f"{i}", float(i < right(name))] for i in range(50)] for name in names}}


def page_of(runner: BenchmarkRunner, path: Path, right: Callable[[str], int]) -> dict[str, str]:
    """Return the lines of the page by model and runtime."""
    runner.store.put(function_calling.cell(runner, 0, RECOMMENDED), figures(right), 1.0)
    write(runner, [0], path)
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return {" | ".join(line.split(" | ")[:2]).strip("| "): line for line in lines}


def test_recovery_is_the_share_of_what_rounding_loses(runner: BenchmarkRunner, tmp_path: Path) -> None:
    counts = {REFERENCE: 40, "onnx": 36, "rtn/onnx": 20}
    rows = page_of(runner, tmp_path / "page.md", lambda name: counts.get(name, 40))
    assert "80.0% (" in rows["FP32 fine-tune | torch"]
    assert "40.0% (" in rows["round-to-nearest | ONNX"] and "-40.0% (" in rows["round-to-nearest | ONNX"]
    assert rows["QAT, default recipe | ONNX"].split(" | ")[5].startswith("80.0% (")
    # Nothing is lost in the other runtime.
    assert "no difference shown" in rows["round-to-nearest | `.pte`"]
    assert "loses too little to tell" in rows["QAT, default recipe | `.pte`"]
    assert (tmp_path / "page.json").is_file()


def test_a_recipe_is_compared_on_the_seeds_that_it_has(runner: BenchmarkRunner, tmp_path: Path) -> None:
    counts = {REFERENCE: 40, "rtn/onnx": 20, "coordinate-descent/onnx": 28}
    for seed in (0, 1):
        right = figures(lambda name, seed=seed: counts.get(name, 40) if seed == 0 else 50)  # type: ignore[misc]
        runner.store.put(function_calling.cell(runner, seed, RECOMMENDED), right, 1.0)
    runner.store.put(function_calling.cell(runner, 0, LONG_QAT), figures(lambda name: 34), 1.0)
    write(runner, [0, 1, 2], tmp_path / "page.md")
    row = next(line for line in (tmp_path / "page.md").read_text().splitlines() if f"| {LONG_QAT} | ONNX" in line)
    _, _, right_calls, less_fp32, less_ptq, won = row.strip("| ").split(" | ")
    assert right_calls.startswith("68.0%") and less_fp32.startswith("-12.0%") and less_ptq.startswith("12.0%")
    assert won.startswith("70.0% (")


def test_the_guard_has_no_function_of_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"bfcl_simple": [["a"]], "bfcl_live_simple": [["b"]], "bfcl_multiple": [["a", "c"], ["c", "d"]]}

    def write_fake_rows(task: str, folder: Path, **options: bool) -> TaskRows:
        folder.mkdir(parents=True)
        rows = [_row(f"train_{task}", "of the system"), *(_row("\n".join(names)) for names in described.get(task, []))]
        for name, part in {"train.jsonl": rows[:1], "test.jsonl": rows[1:]}.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
        return TaskRows(folder / "train.jsonl", folder / "test.jsonl", 1, len(rows) - 1)

    monkeypatch.setattr(function_calling, "write_task_rows", write_fake_rows)
    function_calling.write_rows(tmp_path)
    counts = {name: len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "eval", "guard")}
    assert counts == {"train": 4, "eval": 4, "guard": 1}
    assert '"c\\"' in (tmp_path / "guard.jsonl").read_text() and '"d\\"' in (tmp_path / "guard.jsonl").read_text()


def _row(names: str, system: str = "") -> dict[str, object]:
    """Return a row whose system message describes functions, before the question's own system message."""
    functions = "\n".join(json.dumps({"name": name}) for name in names.split("\n"))
    content = "\n\n".join([INSTRUCTION + functions, *([system] if system else [])])
    return {"messages": [{"role": "system", "content": content}]}


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
