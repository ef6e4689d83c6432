"""Cells of the accuracy benchmark, in the order they are measured, with a time estimate for each.

`make_jobs` lists them for a setting; `run` and `run_in_parallel` measure the missing ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import cost, formulations, settings, worker
from benchmarks.cells import Cell, slug
from benchmarks.partial_rounding import SWITCHED_OFF, TABLE_BITS, partly_rounded, with_table_bits
from benchmarks.runner import BenchmarkRunner, Figures, Training, artifact_rows
from benchmarks.settings import BASELINES, BETTER, FP32, METHODS, RECOMMENDED, TASKS
from qat_edge import config, progress
from qat_edge.data.calibration import DEFAULT_CALIBRATION_TOKENS
from qat_edge.evaluate.reference import load_exact
from qat_edge.options import FinetuneOptions
from qat_edge.quant.ptq.method_names import CALIBRATED
from qat_edge.report.formatting import duration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Seconds of estimated work after which the measured pace is trusted: the first cells are short, and not typical.
TRUSTED_S = 300.0
# Seconds on two cores with AMX, for time estimates only; a training step's seconds are in Setting.
START_S = 15.0  # imports, model and data of one command
LOAD_S = 6.0  # loading a model in this process
SCORE_S = 0.004  # a compared token, emulated in torch
METHOD_S = {"rtn": 5.0, "hqq": 15.0}
EXPORT_S = 60.0  # one model to both targets
CLOSING_S = 10.0  # the rest of an exported model: tokenizers, manifests, loading in both runtimes
SCORE_PTE_S, SCORE_ONNX_S = 1 / 240, 1 / 800  # a compared token
ANSWER_S = 0.17  # a generated answer

# A frozen model changed for the time of a `with` block: (snapshot, quantized checkpoint, variant) -> model.
Variation = Callable[[Path, Path, Any], "AbstractContextManager[PreTrainedModel]"]


class Finetune(NamedTuple):
    """Identity of the FP32 fine-tune that a cell is compared with."""

    task: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Job:
    """One cell and the way to measure it.

    Attributes:
        cell: identity of the figures.
        measure: returns the figures.
        trainings: trainings that `measure` needs.
        estimate_s: about how long it takes without those trainings.
    """

    cell: Cell
    measure: Callable[[], Figures]
    trainings: tuple[Training, ...]
    estimate_s: float

    @property
    def finetune(self) -> Finetune:
        """FP32 fine-tune that this cell is compared with."""
        return Finetune(self.cell.task, self.cell.seed, self.cell.settings["steps"])

    @property
    def is_cost(self) -> bool:
        """Time and memory are measured, so this job has to run alone."""
        return self.cell.kind == "cost"


def make_jobs(runner: BenchmarkRunner, parts: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Return the jobs of the requested parts.

    Cells that several parts share are listed once; the cells of one FP32 fine-tune are next to each other, and the
    cost measurements come last.
    """
    makers: dict[str, Callable[[BenchmarkRunner, Sequence[int]], Iterator[Job]]] = {
        "main": _main, "steps": _steps, "ablation": _ablation, "formulations": _formulations, "remaining": _remaining,
        "tables": _tables, "cost": _cost,
    }  # fmt: skip
    jobs: dict[str, Job] = {}
    for part in parts:
        for job in makers[part](runner, seeds):
            jobs.setdefault(job.cell.digest, job)

    # The runner caches one FP32 fine-tune at a time, so its jobs have to be next to each other.
    order = {name: index for index, name in enumerate(TASKS)}

    def position(job: Job) -> tuple[bool, int, int, int]:
        return job.is_cost, order.get(job.cell.task, 0), job.finetune.seed, job.finetune.steps

    return sorted(jobs.values(), key=position)


def estimate_s(runner: BenchmarkRunner, jobs: Sequence[Job]) -> float:
    """Return about how many seconds the unfinished jobs take; each training counts once."""
    missing = [job for job in jobs if runner.store.get(job.cell) is None]
    trainings = {training for job in missing for training in job.trainings if not runner.is_trained(training)}
    return sum(job.estimate_s for job in missing) + sum(_training_s(runner, training) for training in trainings)


def run(runner: BenchmarkRunner, jobs: Sequence[Job]) -> None:
    """Measure the missing cells one after the other, and report progress and the remaining time."""
    began, expected = time.monotonic(), estimate_s(runner, jobs)
    missing = sum(runner.store.get(job.cell) is None for job in jobs)
    progress.info(f"{len(jobs)} cells, {missing} to measure: about {duration(expected)}")
    try:
        for number, job in enumerate(jobs, start=1):
            if runner.store.get(job.cell) is not None:
                continue
            # The estimate is made anew for each cell, and scaled by the pace so far.
            passed, remaining = time.monotonic() - began, estimate_s(runner, jobs)
            to_go = duration(remaining * pace(passed, expected - remaining))
            progress.info(f"[{number}/{len(jobs)}] {job.cell.title}  ({duration(passed)} so far, about {to_go} to go)")
            runner.measure_once(job.cell, job.measure)
        runner.tidy()
    finally:
        runner.close()  # when interrupted, too; checkpoints stay for the next run


def pace(passed_s: float, expected_s: float) -> float:
    """Return how many seconds this machine needs for an estimated second.

    The first TRUSTED_S of the estimate count as if they had been exact, so that a few short cells decide little.
    """
    return (TRUSTED_S + passed_s) / (TRUSTED_S + expected_s)


def run_in_parallel(runner: BenchmarkRunner, parts: Sequence[str], seeds: Sequence[int], processes: int) -> None:
    """Measure the missing cells of the parts in several processes of one thread each.

    All cells that are compared with one FP32 fine-tune run in the same process, so that it is trained once; the
    longest group starts first. Costs are measured afterwards, with the machine to themselves.
    """
    jobs = make_jobs(runner, parts, seeds)
    groups = _by_finetune(runner, jobs)
    progress.info(f"{len(groups)} fine-tunes to measure, {processes} at once")
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=worker.initialize)
    try:
        for done in as_completed([pool.submit(_run_group, runner, parts, seeds, group) for group in groups]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    run(runner, jobs)


def _by_finetune(runner: BenchmarkRunner, jobs: Sequence[Job]) -> list[Finetune]:
    """Fine-tunes with missing cells other than costs, the longest first."""
    groups: dict[Finetune, list[Job]] = {}
    for job in jobs:
        if not job.is_cost and runner.store.get(job.cell) is None:
            groups.setdefault(job.finetune, []).append(job)
    return sorted(groups, key=lambda group: -estimate_s(runner, groups[group]))


def _run_group(runner: BenchmarkRunner, parts: Sequence[str], seeds: Sequence[int], group: Finetune) -> None:
    """Measure the cells of one fine-tune. The jobs are made anew: their functions cannot be pickled."""
    run(runner, [job for job in make_jobs(runner, parts, seeds) if not job.is_cost and job.finetune == group])


# --- one job ---------------------------------------------------------------------------------------------------


def emulated(runner: BenchmarkRunner, task: str, seed: int, steps: int, name: str) -> Job:
    """Return the job of one model in exact torch emulation.

    Args:
        runner: where it is measured.
        task: key of settings.TASKS.
        seed: of the trainings.
        steps: optimizer steps of each training.
        name: "fp32", a PTQ method, "qat" or a row of the ablation.
    """
    # Every model is compared with the FP32 fine-tune, so that one has to be trained in any case.
    fp32 = Training(task, seed, steps, FP32)
    trainings: tuple[Training, ...] = (fp32,)
    identity: dict[str, Any] = {FP32: runner.identity(fp32)}
    if name not in (FP32, *METHODS):
        trainings = (fp32, Training(task, seed, steps, name))
        identity["qat"] = runner.identity(trainings[1])
    if name in CALIBRATED:
        identity["calibration_tokens"] = DEFAULT_CALIBRATION_TOKENS

    def measure() -> Figures:
        reference = runner.reference(task, seed, steps)
        if name == FP32:
            return reference.fp32()
        if name in METHODS:
            return reference.compare(load_exact(runner.post_training(runner.train(fp32), name)))
        return reference.compare(load_exact(runner.frozen(runner.train(trainings[1]))))

    seconds = _method_s(runner, name) + 2 * LOAD_S + runner.setting.tokens * SCORE_S
    return Job(_cell(runner, "emulated", task, seed, name, steps, identity), measure, trainings, seconds)


def artifacts(runner: BenchmarkRunner, task: str, seed: int, steps: int) -> Job:
    """Return the job of QAT and PTQ as exported: .pte and ONNX folder, each in its own runtime."""
    trainings = Training(task, seed, steps, FP32), Training(task, seed, steps, RECOMMENDED)
    exported = runner.setting.exported
    prompts = runner.setting.prompts if TASKS[task].has_answers else 0
    identity: dict[str, Any] = {
        **{training.recipe: runner.identity(training) for training in trainings},
        "exported": list(exported),
        "prompts": prompts,
    }

    def measure() -> Figures:
        methods = [_better(runner, task, seed, steps)] if exported == (BETTER,) else list(exported)
        report = runner.validated(runner.joined(task, seed, steps, methods), methods, TASKS[task])
        return {"rows": artifact_rows(report), "methods": methods, "tokens": report.tokens, "machine": report.machine}

    # Each model is exported once and runs on both targets.
    tokens = runner.setting.tokens
    models = 1 + (1 if exported == (BETTER,) else len(exported))
    model_s = EXPORT_S + CLOSING_S + tokens * (SCORE_PTE_S + SCORE_ONNX_S) + 2 * ANSWER_S * prompts
    seconds = models * model_s + 3 * START_S + 4 * tokens * SCORE_S
    cell = _cell(runner, "artifacts", task, seed, RECOMMENDED, steps, identity)
    return Job(cell, measure, trainings, seconds)


def _formulation(runner: BenchmarkRunner, task: str, seed: int, name: str) -> Job:
    """Return the job of one formulation as trained (its own forward pass) and as deployed (merged, then rounded)."""
    steps = runner.setting.steps
    fp32, training = Training(task, seed, steps, FP32), Training(task, seed, steps, name, formulation=True)
    identity = {FP32: runner.identity(fp32), "qat": runner.identity(training)}

    def measure() -> Figures:
        trained, reference = runner.train(training), runner.reference(task, seed, steps)
        own_figures = reference.compare(formulations.own_forward(trained.adapter, name))
        return {"trained": own_figures, "deployed": reference.compare(load_exact(runner.frozen(trained)))}

    seconds = 3 * LOAD_S + 3 * runner.setting.tokens * SCORE_S
    cell = _cell(runner, "formulation", task, seed, name, steps, identity)
    return Job(cell, measure, (fp32, training), seconds)


def _altered(
    runner: BenchmarkRunner,
    kind: str,
    task: str,
    seed: int,
    alter: Variation,
    variants: Mapping[str, Any],
    **identity: Any,
) -> Job:
    """Return the job of the QAT model in several variants.

    Args:
        runner: where it is measured.
        kind: type of measurement.
        task: key of settings.TASKS.
        seed: of the trainings.
        alter: changes the model into one variant.
        variants: title -> what `alter` is given.
        identity: anything else that decides the figures.
    """
    # All variants are made from one trained model, so they form one cell.
    steps = runner.setting.steps
    fp32, qat = Training(task, seed, steps, FP32), Training(task, seed, steps, RECOMMENDED)
    trained = {training.recipe: runner.identity(training) for training in (fp32, qat)} | identity

    def measure() -> Figures:
        qat_run, reference = runner.train(qat), runner.reference(task, seed, steps)
        quantized, figures = runner.frozen(qat_run), {}
        for title, variant in variants.items():
            with alter(qat_run.reference, quantized, variant) as model:
                figures[title] = reference.compare(model)
        return figures

    seconds = len(variants) * (runner.setting.tokens * SCORE_S + LOAD_S)
    return Job(_cell(runner, kind, task, seed, RECOMMENDED, steps, trained), measure, (fp32, qat), seconds)


def _cost_round(runner: BenchmarkRunner, task: str, steps: int) -> Figures:
    """Measure step time and peak memory of every scheme, each in a process of its own."""
    figures: Figures = {}
    for name, overrides in settings.COSTS.items():
        # QAT begins after a phase of plain LoRA, whose steps are not timed.
        start = float(steps if name == settings.LORA else cost.PHASE_ONE)
        options = config.plain(runner.options(Training(task, 0, steps, RECOMMENDED))) | dict(overrides)
        checked = config.load(FinetuneOptions, "finetune", None, {**options, "qat_start": start})

        stem = runner.work / "cost" / slug(name)
        config.save(stem.with_suffix(".yaml"), "finetune", checked)
        paths = [str(stem.with_suffix(".yaml")), str(stem), str(stem.with_suffix(".json"))]
        runner.command(["benchmarks.cost", *paths], f"cost-{slug(name)}")
        figures[name] = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    return figures


def _better(runner: BenchmarkRunner, task: str, seed: int, steps: int) -> str:
    """Return the baseline with the lower perplexity in emulation."""

    def perplexity(method: str) -> float:
        job = emulated(runner, task, seed, steps, method)
        return float(runner.measure_once(job.cell, job.measure)["perplexity"])

    return min(BASELINES, key=perplexity)


def _cell(
    runner: BenchmarkRunner, kind: str, task: str, seed: int, name: str, steps: int, identity: dict[str, Any]
) -> Cell:  # fmt: skip
    shared = {"steps": steps, "tokens": runner.setting.tokens, "window": TASKS[task].window}
    return Cell(kind, task, seed, name, {**shared, "trained": identity})


# --- the jobs of each part -------------------------------------------------------------------------------------


def _main(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[Job]:
    setting = runner.setting
    for task in TASKS:
        for index, seed in enumerate(seeds):
            with_calibrated = task in setting.side_tasks and index < setting.side_seeds
            methods = METHODS if with_calibrated else BASELINES
            for name in (FP32, *methods, RECOMMENDED):
                yield emulated(runner, task, seed, setting.steps, name)
            yield artifacts(runner, task, seed, setting.steps)


def _steps(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[Job]:
    for task, seed in _side_trainings(runner, seeds):
        for factor in (1.0, *runner.setting.factors):
            for name in (FP32, *BASELINES, RECOMMENDED):
                yield emulated(runner, task, seed, round(factor * runner.setting.steps), name)


def _ablation(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[Job]:
    recipes = settings.ablation_rows(runner.setting.ablation_rows)
    for task, seed in _side_trainings(runner, seeds):
        for name in (FP32, *BASELINES, RECOMMENDED, *recipes):
            yield emulated(runner, task, seed, runner.setting.steps, name)


def _formulations(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[Job]:
    for task, seed in _side_trainings(runner, seeds):
        for name in (FP32, *BASELINES):
            yield emulated(runner, task, seed, runner.setting.steps, name)
        for name in formulations.FORMULATIONS:
            yield _formulation(runner, task, seed, name)


def _remaining(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[Job]:
    off = {name: list(parts) for name, parts in SWITCHED_OFF.items()}
    for task, seed in _side_trainings(runner, seeds):
        yield _altered(runner, "remaining", task, seed, partly_rounded, SWITCHED_OFF, off=off)


def _tables(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[Job]:
    for task, seed in _side_trainings(runner, seeds):
        yield _altered(runner, "tables", task, seed, with_table_bits, TABLE_BITS)


def _cost(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[Job]:
    """One job per round: all schemes one after the other, so that a busy machine slows all of them alike."""
    task = next(iter(TASKS))
    steps = cost.steps_for(runner.setting.cost_steps)
    for number in range(runner.setting.cost_rounds):
        identity = {
            "recipes": {name: dict(over) for name, over in settings.COSTS.items()},
            "recommended": runner.identity(Training(task, 0, steps, RECOMMENDED)),
        }
        cell = Cell("cost", "", number, "round", {"steps": steps, "device": runner.device, **identity})
        seconds = len(settings.COSTS) * (START_S + steps * runner.setting.qat_step_s)
        yield Job(cell, lambda: _cost_round(runner, task, steps), (), seconds + runner.setting.calibrate_s)


def _side_trainings(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield task and seed of every part after the first."""
    setting = runner.setting
    return ((task, seed) for task in setting.side_tasks for seed in seeds[: setting.side_seeds])


# --- time estimates --------------------------------------------------------------------------------------------


def _method_s(runner: BenchmarkRunner, method: str) -> float:
    return runner.setting.calibrate_s if method in CALIBRATED else METHOD_S.get(method, 5.0)


def _training_s(runner: BenchmarkRunner, training: Training) -> float:
    """About how many seconds one training takes."""
    options, lora_share, prepare_s = runner.options(training), 1.0, 0.0
    if training.recipe != FP32:
        # --qat-start is a share of the steps below 1, and a step from there on.
        start = options.start_of_qat
        lora_share = start if start < 1 else min(start / training.steps, 1.0)
        prepare_s = _method_s(runner, options.ptq_init)
    setting = runner.setting
    step_s = lora_share * setting.lora_step_s + (1 - lora_share) * setting.qat_step_s
    return START_S + prepare_s + training.steps * step_s * TASKS[training.task].step_tokens / 1024
