"""Accuracy benchmark: cells and resuming, recovery, tables with missing cells, recipes, a tiny end-to-end run."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import accuracy_page, formulations, schedule, settings
from benchmarks.accuracy_page import MISSING, NO_LOSS, AccuracyResults, recovery, spread
from benchmarks.cells import Cell, CellStore, publish
from benchmarks.partial_rounding import partly_rounded, with_table_bits
from benchmarks.runner import LATER_OPTIONS, ROOT, BenchmarkRunner, Training
from benchmarks.settings import FP32, RECOMMENDED, SETTINGS, TASKS
from qat_edge import config
from qat_edge.diagnose.error_budget import PARTS
from qat_edge.errors import RunError, UsageError
from qat_edge.evaluate.reference import load_exact
from qat_edge.models.merge import merged_model
from qat_edge.options import FinetuneOptions
from qat_edge.train import trainer
from qat_edge.verbs.finetune import finetune

CELL = Cell("emulated", "assistant", 0, "qat", {"steps": 4, "tokens": 64, "trained": {"qat": {"lora_rank": 4}}})
TINY = replace(SETTINGS["reduced"], steps=3, tokens=32, factors=(), side_tasks=("python-reference",))


# --- cells -------------------------------------------------------------------------------------------------------


def test_a_changed_setting_is_another_cell() -> None:
    others = [
        replace(CELL, seed=1),
        replace(CELL, name="rtn"),
        replace(CELL, settings={**CELL.settings, "tokens": 65}),
        replace(CELL, settings={**CELL.settings, "trained": {"qat": {"lora_rank": 8}}}),
    ]
    assert len({cell.file_name for cell in (CELL, *others)}) == 5
    reordered = replace(CELL, settings=dict(reversed(CELL.settings.items())))
    assert reordered.file_name == CELL.file_name


def test_a_finished_cell_is_not_measured_again(tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path, "model", "cpu", TINY)
    counted: list[int] = []

    def measure() -> dict[str, Any]:
        counted.append(1)
        return {"perplexity": 2.5, "rows": [{"target": "onnx"}]}

    first = runner.measure_once(CELL, measure)
    assert runner.measure_once(CELL, measure) == first == {"perplexity": 2.5, "rows": [{"target": "onnx"}]}
    assert len(counted) == 1
    runner.measure_once(replace(CELL, seed=1), measure)
    assert len(counted) == 2


def test_a_failed_cell_is_not_stored(tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path, "model", "cpu", TINY)
    with pytest.raises(ZeroDivisionError):
        runner.measure_once(CELL, lambda: {"perplexity": 1 / 0})
    assert runner.store.get(CELL) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}'])
def test_a_damaged_cell_is_named(tmp_path: Path, content: str) -> None:
    store = CellStore(tmp_path)
    (tmp_path / CELL.file_name).write_text(content)
    with pytest.raises(RunError, match=CELL.digest):
        store.get(CELL)


def test_published_cells_are_not_measured_again(tmp_path: Path) -> None:
    before = CellStore(tmp_path / "before")
    before.put(CELL, {"perplexity": 2.5}, 1.0)
    publish([before.record(CELL) or {}], tmp_path / "page.json")
    store = CellStore(tmp_path / "after", tmp_path / "page.json")
    assert store.get(CELL) == {"perplexity": 2.5} and store.get(replace(CELL, seed=1)) is None
    store.put(CELL, {"perplexity": 2.0}, 1.0)
    assert store.get(CELL) == {"perplexity": 2.0}, "the work folder takes precedence"
    assert CellStore(tmp_path / "after", tmp_path / "missing.json").get(replace(CELL, seed=1)) is None


def test_a_cell_names_its_machine_and_the_gpu_that_was_used(tmp_path: Path) -> None:
    found = []
    for gpu in ("", "NVIDIA A100"):
        store = CellStore(tmp_path)
        store.put(CELL, {}, 1.0, gpu)
        found.append((store.record(CELL) or {})["machine"])
    assert found[1] == f"NVIDIA A100, {found[0]}" and found[0].startswith(f"{platform.machine()}, {os.cpu_count()} ")


@pytest.mark.parametrize("content", ["{", "[1]", '[{"format": 1}]'])
def test_damaged_published_cells_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "page.json").write_text(content)
    with pytest.raises(RunError, match=r"page\.json"):
        CellStore(tmp_path, tmp_path / "page.json").get(CELL)


# --- recovery and tables -------------------------------------------------------------------------------------------


def test_recovery_by_hand() -> None:
    # PTQ loses 23 - 17 = 6, of which QAT recovers 23 - 18.5 = 4.5; relative to the worse baseline it would be more.
    assert recovery(17.0, 18.5, [24.0, 23.0]) == pytest.approx(0.75)
    assert recovery(17.0, 16.0, [23.0, 24.0]) == pytest.approx(7 / 6)
    assert recovery(17.0, 24.0, [23.0, 24.0]) == pytest.approx(-1 / 6)
    assert recovery(17.0, 18.5, [23.0, None]) is None
    assert recovery(None, 18.5, [23.0]) is None and recovery(17.0, None, [23.0]) is None
    assert recovery(17.0, 18.5, []) is None
    assert math.isnan(recovery(17.0, 18.5, [16.9, 18.0]) or 0.0)


def test_spread_counts_measured_seeds_only() -> None:
    assert spread([1.0, 3.0, None]) == "2.00 (1.00 to 3.00; 2 seeds)"
    assert spread([None, 3.0]) == "3.00 (1 seed)"
    assert spread([None]) == MISSING and spread([math.nan]) == NO_LOSS


def made(kind: str, seed: int, name: str, figures: dict[str, Any], steps: int = 40) -> dict[str, Any]:
    """Return a finished cell as the store returns it."""
    return {
        "cell": {"kind": kind, "task": "assistant", "seed": seed, "name": name, "settings": {"steps": steps}},
        "figures": figures, "wall_s": 60.0, "created": "2026-01-02T03:04:05+00:00", "machine": "x86_64, 2 cores",
        "python": "3.11.7", "libraries": {"torch": "2.13.0", "peft": None}, "git_revision": "abc",
    }  # fmt: skip


@pytest.fixture
def accuracy_results() -> AccuracyResults:
    """Two seeds in torch, artifacts of the first one only, one formulation, one round of cost."""
    documents = []
    for seed, qat in enumerate((18.5, 17.6)):
        for name, value in (("fp32", 17.0), ("rtn", 23.0), ("hqq", 24.0), ("qat", qat)):
            documents.append(made("emulated", seed, name, {"perplexity": value, "kl_nats": 0.25}))
    rows = [
        {"model": "fp32", "target": "torch", "perplexity": 17.0, "kl_nats": None, "exact_match": 0.9},
        {"model": "rtn", "target": "onnx", "perplexity": 27.0, "kl_nats": 0.5, "exact_match": 0.7},
        {"model": "qat", "target": "onnx", "perplexity": 18.0, "kl_nats": 0.125, "exact_match": 0.85},
    ]
    documents.append(made("artifacts", 0, "qat", {"rows": rows, "methods": ["rtn"]}))
    trained = {"trained": {"perplexity": 18.0}, "deployed": {"perplexity": 20.0}}
    documents.append(made("formulation", 0, "split", trained))
    times = {name: {"step_s": 2.0 + i, "peak_bytes": 1e9 * (1 + i)} for i, name in enumerate(settings.COSTS)}
    documents.append(made("cost", 0, "round", times, steps=7))
    return AccuracyResults(documents, replace(SETTINGS["reduced"], steps=40, side_tasks=("assistant",)), (0, 1))


def row(page: str, *starts: str) -> list[str]:
    """Return the cells of the only table row that starts with these."""
    found = [line for line in page.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_recovery_is_averaged_over_seeds(accuracy_results: AccuracyResults) -> None:
    assert [accuracy_results.recovered("torch", "assistant", seed) for seed in (0, 1)] == pytest.approx([0.75, 0.9])
    assert accuracy_results.recovered("onnx", "assistant", 0) == pytest.approx(0.9)
    assert (
        accuracy_results.recovered("onnx", "assistant", 1) is None
        and accuracy_results.recovered("executorch", "assistant", 0) is None
    )
    page = accuracy_page.render(accuracy_results)
    assert row(page, "assistant", "torch, exact emulation")[2] == "82.5% (75% to 90%; 2 seeds)"
    assert row(page, "assistant", "ONNX folder")[2:] == ["90% (1 seed)", "18.0 (1 seed)"]


def test_missing_cells_show_as_not_measured(accuracy_results: AccuracyResults) -> None:
    page = accuracy_page.render(accuracy_results)
    assert row(page, "assistant", "`.pte`")[2:] == [MISSING, MISSING]
    assert row(page, "python-reference", "torch, exact emulation")[2:] == [MISSING, MISSING]
    by_seed = row(page, "assistant", "0", "ONNX folder")
    assert by_seed[3:] == ["17.0", "27.0", *[MISSING] * (len(settings.METHODS) - 1), "18.0", "90%"]
    assert row(page, "assistant", "80 (2 N)")[2:] == [MISSING] * 4
    assert set(row(page, "assistant", "QAT", MISSING)[2:]) == {MISSING}
    empty = accuracy_page.render(AccuracyResults([], SETTINGS["reduced"], (0, 1, 2)))
    assert "Nothing has been measured yet" in empty and "%" not in empty.split("## With more training")[0]


def test_the_loss_on_deployment_is_shown(accuracy_results: AccuracyResults) -> None:
    cells = row(accuracy_page.render(accuracy_results), "assistant", "torchtune's QAT-LoRA", "`fq(W) x + s B A x`")
    assert cells[3:] == ["18.0 (1 seed)", "20.0 (1 seed)", "2.00 (1 seed)", "50% (1 seed)"]


def test_cost_is_a_ratio_to_plain_lora(accuracy_results: AccuracyResults) -> None:
    page = accuracy_page.render(accuracy_results)
    assert row(page, "QAT")[1:] == ["1.50 (1.50 to 1.50; 1 round)", "2.00 (2.00 to 2.00; 1 round)"]
    assert "One step of plain LoRA: 2.00 s, 1.00 GB." in page


def test_exact_match_of_the_fine_tune_is_that_in_torch(accuracy_results: AccuracyResults) -> None:
    page = accuracy_page.render(accuracy_results)
    assert row(page, "assistant", "FP32 fine-tune")[-1] == "90% (1 seed)"
    assert row(page, "assistant", "QAT", "0.250 (0.250 to 0.250; 2 seeds)")[-2:] == [MISSING, "85% (1 seed)"]


def test_exact_match_is_compared_with_the_fine_tune_seed_by_seed(accuracy_results: AccuracyResults) -> None:
    page = accuracy_page.render(accuracy_results)
    assert row(page, "ONNX folder", "assistant")[2:] == ["-5.0", MISSING, "-5.0 (1 seed)"]
    assert row(page, "`.pte`", "assistant")[2:] == [MISSING] * 3


def test_the_committed_report_has_the_shape_of_this_version() -> None:
    page = accuracy_page.render(AccuracyResults([], SETTINGS["reduced"], (0, 1, 2)))
    headings = [line for line in page.splitlines() if line.startswith("#")]
    path = ROOT / "docs" / "accuracy.md"
    if not path.is_file():
        pytest.skip("the benchmark has not been run yet")
    assert [line for line in path.read_text().splitlines() if line.startswith("#")] == headings


def test_the_committed_report_agrees_with_the_committed_cells() -> None:
    path = ROOT / "docs" / "accuracy.json"
    if not path.is_file():
        pytest.skip("the benchmark has not been run yet")
    whole = replace(SETTINGS["reduced"], ablation_rows=len(settings.ABLATION))
    committed = AccuracyResults(json.loads(path.read_text()), whole, (0, 1, 2))
    assert accuracy_page.render(committed, "accuracy.svg") == path.with_suffix(".md").read_text()


def test_every_committed_recipe_is_known() -> None:
    path = ROOT / "docs" / "accuracy.json"
    if not path.is_file():
        pytest.skip("the benchmark has not been run yet")
    cells = [record["cell"] for record in json.loads(path.read_text())]
    names = {cell["name"] for cell in cells if cell["kind"] == "emulated"}
    assert names <= {FP32, RECOMMENDED, *settings.METHODS, *settings.ABLATION}


# --- recipes and the schedule ---------------------------------------------------------------------------------------


def test_finetune_accepts_every_recipe() -> None:
    settings.check_recipes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scale": "learned"}, r"TABLE 'x': finetune has no option 'scale'. It has .*scales"),
        ({"scales": "guessed"}, r"TABLE 'x': finetune.scales: 'guessed' is not one of"),
        ({"ptq_init": "gptq", "scales": "absmax"}, r"TABLE 'x': --ptq-init gptq and --scales absmax"),
    ],
)
def test_an_invalid_recipe_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings.check_overrides("TABLE 'x'", overrides)


def test_recipes_that_equal_the_defaults_are_left_out() -> None:
    rows = settings.ablation_rows(len(settings.ABLATION))
    assert 0 < len(rows) <= len(settings.ABLATION)
    for name in rows:
        over = settings.ABLATION[name]
        assert FinetuneOptions("m", "d") != FinetuneOptions("m", "d", **over)


def test_both_settings_measure_every_part_and_all_seeds(tiny_model_folder: Path, tmp_path: Path) -> None:
    for setting in SETTINGS.values():
        runner = BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", setting)
        jobs = schedule.make_jobs(runner, settings.PARTS, (0, 1, 2))
        kinds = {job.cell.kind for job in jobs}
        assert kinds == {"emulated", "artifacts", "formulation", "remaining", "tables", "cost"}
        artifacts = {(job.cell.task, job.cell.seed) for job in jobs if job.cell.kind == "artifacts"}
        assert artifacts == {(task, seed) for task in TASKS for seed in (0, 1, 2)}
        assert len({job.cell.file_name for job in jobs}) == len(jobs)


def test_cells_of_one_fine_tune_stay_in_one_process(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = replace(SETTINGS["reduced"], factors=(2.0,))
    runner = BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", setting)
    jobs = schedule.make_jobs(runner, settings.PARTS, (0, 1))
    groups = schedule._by_finetune(runner, jobs)
    assert groups[0] == ("python-reference", 0, 36), "the longest first"
    tasks = {(task, seed, 36) for task in TASKS for seed in (0, 1)}
    assert len(groups) == 5 and set(groups) == {*tasks, ("python-reference", 0, 72)}
    ran: list[Cell] = []
    monkeypatch.setattr(schedule, "run", lambda runner, jobs: ran.extend(job.cell for job in jobs))
    for group in groups:
        schedule._run_group(runner, settings.PARTS, (0, 1), group)
    assert {cell.digest for cell in ran} == {job.cell.digest for job in jobs if job.cell.kind != "cost"}
    assert len(ran) == len(jobs) - setting.cost_rounds


def test_a_worker_has_one_thread_and_prints_nothing() -> None:
    code = "from benchmarks import worker; worker.initialize(); import torch, torchao; print(torch.get_num_threads())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("1\n", "")


def test_more_recipes_add_cells_and_keep_the_others(tiny_model_folder: Path, tmp_path: Path) -> None:
    few, many = (
        BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", replace(SETTINGS["reduced"], ablation_rows=rows))
        for rows in (2, 5)
    )
    cells = [{job.cell.file_name for job in schedule.make_jobs(runner, settings.PARTS, (0,))} for runner in (few, many)]
    assert cells[0] < cells[1] and len(cells[1]) == len(cells[0]) + 3


def test_the_reduced_setting_is_estimated_below_two_hours(tiny_model_folder: Path, tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", SETTINGS["reduced"])
    assert schedule.estimate_s(runner, schedule.make_jobs(runner, settings.PARTS, (0, 1, 2))) < 7200


def test_the_remaining_time_follows_the_pace_of_this_machine() -> None:
    assert schedule.pace(0, 0) == 1 and schedule.pace(600, 300) == 1.5 and schedule.pace(60, 5) < 1.2


def test_options_of_qat_do_not_change_the_cell_of_plain_lora(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", TINY)
    tuned, qat = (Training("assistant", 0, 3, name) for name in (FP32, RECOMMENDED))
    before = runner.identity(tuned), runner.identity(qat)
    recipe = settings.recipe
    monkeypatch.setattr(settings, "recipe", lambda name, steps: {**recipe(name, steps), "scale_learning_rate": 0.5})
    assert runner.identity(tuned) == before[0] and runner.identity(qat) != before[1]
    assert runner.options(tuned).qat_start == 3 and "data" in before[0] and str(tmp_path) not in str(before)


@pytest.mark.parametrize("name", formulations.FORMULATIONS)
def test_other_formulations_have_the_learning_rate_of_the_fine_tune(
    tiny_model_folder: Path, tmp_path: Path, name: str
) -> None:
    runner = BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", TINY)
    tuned = runner.options(Training("assistant", 0, 36, FP32))
    other = runner.options(Training("assistant", 0, 36, name, formulation=True))
    rates = [
        [options.learning_rate * trainer.learning_rate_factor(options, start)(step) for step in range(36)]
        for options, start in ((tuned, 36), (other, 0))
    ]
    assert rates[0] == rates[1]


def test_a_changed_default_learning_rate_is_another_cell(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", TINY)
    tuned, qat = (Training("assistant", 0, 3, name) for name in (FP32, RECOMMENDED))
    before = runner.identity(tuned), runner.identity(qat)
    monkeypatch.setattr(trainer, "COMPENSATED_RATIO", 2 * trainer.COMPENSATED_RATIO)
    assert runner.options(qat).qat_learning_rate is None
    assert runner.identity(tuned) == before[0] and runner.identity(qat) != before[1]


def test_options_that_came_later_do_not_change_published_cells(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = BenchmarkRunner(tmp_path, str(tiny_model_folder), "cpu", TINY)
    training = Training("assistant", 0, 3, FP32)
    before = runner.identity(training)
    assert not before.keys() & set(LATER_OPTIONS)
    monkeypatch.setitem(settings.TASKS["assistant"].training, "weight_bits", 2)  # type: ignore[arg-type]
    assert runner.identity(training) == {**before, "weight_bits": 2}


def test_tidying_keeps_checkpoints_of_unfinished_runs(tmp_path: Path) -> None:
    runner = BenchmarkRunner(tmp_path, "model", "cpu", TINY)
    runs = {name: tmp_path / "runs" / f"assistant-{name}-seed0-3-abc" for name in ("fp32", "qat")}
    for folder in runs.values():
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "adapter").mkdir()
    (runs["fp32"] / "training.json").write_text("{}")
    closed: list[bool] = []
    runner._reference = Training("assistant", 0, 3, FP32), SimpleNamespace(close=lambda: closed.append(True))  # type: ignore[assignment]
    runner.tidy()
    assert closed == [True] and runner._reference is None
    assert (runs["qat"] / "checkpoints").is_dir() and not (runs["fp32"] / "checkpoints").exists()
    assert all((folder / "adapter").is_dir() for folder in runs.values())


# --- end to end on a tiny model ------------------------------------------------------------------------------------


class InThisProcess(BenchmarkRunner):
    """Runner that calls commands in this process: a new one takes seconds to import the libraries."""

    commands = 0

    def command(self, arguments: Sequence[str], log: str) -> None:
        self.commands += 1
        path, out = Path(arguments[3]), Path(arguments[-1])
        if arguments[0] == "benchmarks.formulations":
            options = config.load(FinetuneOptions, "finetune", Path(arguments[2]), {})
            formulations.train(arguments[1], options, out)
        else:
            finetune(config.load(FinetuneOptions, "finetune", path, {}), out)


def test_partial_rounding_and_a_formulation_on_a_tiny_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    runner = InThisProcess(tmp_path, str(tiny_model_folder), "cpu", TINY, keep=True)
    jobs = [
        job for job in schedule.make_jobs(runner, ("formulations",), (0,)) if job.cell.name in (FP32, "rtn", "split")
    ]
    schedule.run(runner, jobs)
    figures = {job.cell.name: runner.store.get(job.cell) for job in jobs}
    assert figures[FP32] is not None and figures[FP32]["kl_nats"] == 0
    assert figures["rtn"] is not None and figures["rtn"]["kl_nats"] > 0
    assert figures["split"] is not None and figures["split"]["trained"] != figures["split"]["deployed"]
    schedule.run(runner, jobs)
    assert runner.commands == 2

    run = runner.train(Training("python-reference", 0, 3, FP32))
    ids, quantized = torch.arange(20).unsqueeze(0), runner.post_training(run, "rtn")
    with torch.no_grad():
        exact = load_exact(quantized)(ids).logits
        whole = merged_model(run.reference).model(ids).logits

    def logits(*off: str) -> torch.Tensor:
        with torch.no_grad(), partly_rounded(run.reference, quantized, off) as model:
            found: torch.Tensor = model(ids).logits
        return found

    assert torch.equal(logits(), exact)
    assert torch.equal(logits(*PARTS), whole)
    one = logits("activations")
    assert not torch.equal(one, exact) and not torch.equal(one, whole)

    def with_bits(embedding: int, head: int) -> torch.Tensor:
        with torch.no_grad(), with_table_bits(run.reference, quantized, (embedding, head)) as model:
            found: torch.Tensor = model(ids).logits
        return found

    assert torch.equal(with_bits(8, 8), exact)
    distances = [float((with_bits(*bits) - whole).square().mean()) for bits in ((8, 8), (8, 4), (4, 4))]
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[2]
