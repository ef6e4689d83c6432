"""Every cell of a setting, in the order of the work, with how to measure it and about how long that takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from benchmarks import cost, formulations, settings, worker
from benchmarks.cells import Cell, slug
from benchmarks.lab import Figures, Lab, Training, artifact_rows
from benchmarks.remaining import SWITCHED_OFF, TABLE_BITS, partly_rounded, with_table_bits
from benchmarks.settings import BASELINES, BETTER, FP32, METHODS, RECOMMENDED, TASKS
from qat_edge import config, progress
from qat_edge.config import FinetuneOptions
from qat_edge.data.calibration import USUAL_TOKENS
from qat_edge.evaluate.reference import load_exact
from qat_edge.quant.ptq import methods
from qat_edge.report.figures import duration

TRUSTED_S = 300.0  # of the estimates: the first cells are short, and say little of the machine
# Seconds on two cores with AMX, for the estimate alone; training is counted from Setting's seconds a step.
START_S = 15.0  # imports, model and data of one command
LOAD_S = 6.0  # a model in this process
SCORE_S = 0.004  # a compared token, emulated in torch
METHOD_S = {"rtn": 5.0, "hqq": 15.0}
EXPORT_S = 60.0  # one model to both targets
SCORE_PTE_S, SCORE_ONNX_S, ANSWER_S = 1 / 240, 1 / 800, 0.17  # a token, a token, an answered prompt

Finetune = tuple[str, int, int]  # task, seed, steps


@dataclass(frozen=True)
class Job:
    """One cell to be measured. trainings: what has to be trained for it; estimate_s: everything else."""

    cell: Cell
    measure: Callable[[], Figures]
    trainings: tuple[Training, ...]
    estimate_s: float


def plan(lab: Lab, parts: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The jobs of the parts asked for, each cell once, those of one FP32 fine-tune together."""
    makers = {
        "main": _main, "steps": _steps, "ablation": _ablation, "formulations": _formulations, "remaining": _remaining,
        "tables": _tables,
    }  # fmt: skip
    jobs: dict[str, Job] = {}
    for part in parts:
        for job in makers[part](lab, seeds) if part in makers else _cost(lab):
            jobs.setdefault(job.cell.digest, job)
    order = {name: index for index, name in enumerate(TASKS)}

    def place(job: Job) -> tuple[int, int, int, int]:
        return job.cell.kind == "cost", order.get(job.cell.task, 0), job.cell.seed, job.cell.settings["steps"]

    return sorted(jobs.values(), key=place)


def estimate_s(lab: Lab, jobs: Sequence[Job]) -> float:
    """Seconds that the unfinished jobs take, each training counted once."""
    left = [job for job in jobs if lab.store.get(job.cell) is None]
    trainings = {training for job in left for training in job.trainings if not lab.is_trained(training)}
    return sum(job.estimate_s for job in left) + sum(_training_s(lab, training) for training in trainings)


def run(lab: Lab, jobs: Sequence[Job]) -> None:
    """Measure what is missing, saying how far it is."""
    began, expected = time.monotonic(), estimate_s(lab, jobs)
    missing = sum(lab.store.get(job.cell) is None for job in jobs)
    progress.info(f"{len(jobs)} cells, {missing} to measure: about {duration(expected)}")
    try:
        for number, job in enumerate(jobs, start=1):
            if lab.store.get(job.cell) is not None:
                continue
            passed, left = time.monotonic() - began, estimate_s(lab, jobs)
            to_go = duration(left * pace(passed, expected - left))
            progress.info(f"[{number}/{len(jobs)}] {job.cell.title}  ({duration(passed)} so far, about {to_go} to go)")
            lab.measured(job.cell, job.measure)
        lab.tidy()
    finally:
        lab.close()  # stopped: what the next run can go on with stays


def pace(passed_s: float, expected_s: float) -> float:
    """What this machine takes for an estimated second, as if what was estimated at TRUSTED_S had gone as estimated."""
    return (TRUSTED_S + passed_s) / (TRUSTED_S + expected_s)


def run_side_by_side(lab: Lab, parts: Sequence[str], seeds: Sequence[int], processes: int) -> None:
    """`run` the parts in so many processes of one thread each; the costs come last, alone.

    What is held against one FP32 fine-tune stays in one process, the longest begins first.
    """
    jobs = plan(lab, parts, seeds)
    groups = _by_finetune(lab, jobs)
    progress.info(f"{len(groups)} fine-tunes to measure, {processes} at once")
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=worker.begin)
    try:
        for done in as_completed([pool.submit(_run_group, lab, parts, seeds, group) for group in groups]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
    run(lab, jobs)


def _by_finetune(lab: Lab, jobs: Sequence[Job]) -> list[Finetune]:
    """What there is to measure beside costs, the longest first."""
    groups: dict[Finetune, list[Job]] = {}
    for job in jobs:
        if job.cell.kind != "cost" and lab.store.get(job.cell) is None:
            groups.setdefault(_finetune(job), []).append(job)
    return sorted(groups, key=lambda group: -estimate_s(lab, groups[group]))


def _finetune(job: Job) -> Finetune:
    return job.cell.task, job.cell.seed, job.cell.settings["steps"]


def _run_group(lab: Lab, parts: Sequence[str], seeds: Sequence[int], group: Finetune) -> None:
    """In a process of its own, which makes the jobs anew: they do not travel."""
    run(lab, [job for job in plan(lab, parts, seeds) if job.cell.kind != "cost" and _finetune(job) == group])


def emulated(lab: Lab, task: str, seed: int, steps: int, name: str) -> Job:
    """One model in exact torch emulation: "fp32", a PTQ method, "qat" or a row of the ablation."""
    tuned = Training(task, seed, steps, FP32)
    identity: dict[str, Any] = {FP32: lab.identity(tuned)}
    trainings: tuple[Training, ...] = (tuned,)
    if name not in (FP32, *METHODS):
        trainings = (tuned, Training(task, seed, steps, name))
        identity["qat"] = lab.identity(trainings[1])
    if name in methods.CALIBRATED:
        identity["calibration_tokens"] = USUAL_TOKENS

    def measure() -> Figures:
        stick = lab.yardstick(task, seed, steps)
        if name == FP32:
            return stick.fp32()
        if name in METHODS:
            return stick.compare(load_exact(lab.post_training(lab.train(tuned), name)))
        return stick.compare(load_exact(lab.frozen(lab.train(trainings[1]))))

    seconds = _method_s(lab, name) + 2 * LOAD_S + lab.setting.tokens * SCORE_S
    return Job(_cell(lab, "emulated", task, seed, name, steps, identity), measure, trainings, seconds)


def artifacts(lab: Lab, task: str, seed: int, steps: int) -> Job:
    """QAT and PTQ as exported: .pte and ONNX folder in their own runtimes."""
    trainings = Training(task, seed, steps, FP32), Training(task, seed, steps, RECOMMENDED)
    exported, asked = lab.setting.exported, TASKS[task]
    prompts = lab.setting.prompts if asked.answered else 0
    identity: dict[str, Any] = {
        **{training.recipe: lab.identity(training) for training in trainings},
        "exported": list(exported),
        "prompts": prompts,
    }

    def measure() -> Figures:
        methods = [_better(lab, task, seed, steps)] if exported == (BETTER,) else list(exported)
        report = lab.validated(lab.joined(task, seed, steps, methods), methods, asked)
        return {"rows": artifact_rows(report), "methods": methods, "tokens": report.tokens, "machine": report.machine}

    models = 1 + (1 if exported == (BETTER,) else len(exported))
    scored = lab.setting.tokens * (SCORE_PTE_S + SCORE_ONNX_S) + 2 * ANSWER_S * prompts
    seconds = models * (EXPORT_S + scored + 10) + 3 * START_S + 4 * lab.setting.tokens * SCORE_S
    cell = _cell(lab, "artifacts", task, seed, RECOMMENDED, steps, identity)
    return Job(cell, measure, trainings, seconds)


def _main(lab: Lab, seeds: Sequence[int]) -> Iterator[Job]:
    steps = lab.setting.steps
    for task in TASKS:
        for index, seed in enumerate(seeds):
            calibrated = task in lab.setting.side_tasks and index < lab.setting.side_seeds
            methods = METHODS if calibrated else BASELINES
            for name in (FP32, *methods, RECOMMENDED):
                yield emulated(lab, task, seed, steps, name)
            yield artifacts(lab, task, seed, steps)


def _steps(lab: Lab, seeds: Sequence[int]) -> Iterator[Job]:
    for task, seed in _sides(lab, seeds):
        for factor in (1.0, *lab.setting.factors):
            for name in (FP32, *BASELINES, RECOMMENDED):
                yield emulated(lab, task, seed, round(factor * lab.setting.steps), name)


def _ablation(lab: Lab, seeds: Sequence[int]) -> Iterator[Job]:
    for task, seed in _sides(lab, seeds):
        for name in (FP32, *BASELINES, RECOMMENDED, *settings.ablation_rows(lab.setting.ablation_rows)):
            yield emulated(lab, task, seed, lab.setting.steps, name)


def _formulations(lab: Lab, seeds: Sequence[int]) -> Iterator[Job]:
    for task, seed in _sides(lab, seeds):
        for name in (FP32, *BASELINES):
            yield emulated(lab, task, seed, lab.setting.steps, name)
        for name in formulations.FORMULATIONS:
            yield _formulation(lab, task, seed, name)


def _formulation(lab: Lab, task: str, seed: int, name: str) -> Job:
    """As trained (its own forward) and as deployed: merged, then rounded."""
    steps = lab.setting.steps
    tuned, training = Training(task, seed, steps, FP32), Training(task, seed, steps, name, formulation=True)
    identity = {FP32: lab.identity(tuned), "qat": lab.identity(training)}

    def measure() -> Figures:
        run, stick = lab.train(training), lab.yardstick(task, seed, steps)
        trained = stick.compare(formulations.own_forward(run.adapter, name))
        return {"trained": trained, "deployed": stick.compare(load_exact(lab.frozen(run)))}

    seconds = 3 * LOAD_S + 3 * lab.setting.tokens * SCORE_S
    cell = _cell(lab, "formulation", task, seed, name, steps, identity)
    return Job(cell, measure, (tuned, training), seconds)


def _remaining(lab: Lab, seeds: Sequence[int]) -> Iterator[Job]:
    off = {name: list(parts) for name, parts in SWITCHED_OFF.items()}
    for task, seed in _sides(lab, seeds):
        yield _altered(lab, "remaining", task, seed, partly_rounded, SWITCHED_OFF, off=off)


def _tables(lab: Lab, seeds: Sequence[int]) -> Iterator[Job]:
    for task, seed in _sides(lab, seeds):
        yield _altered(lab, "tables", task, seed, with_table_bits, TABLE_BITS)


def _sides(lab: Lab, seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Task and seed of the parts after the first."""
    return ((task, seed) for task in lab.setting.side_tasks for seed in seeds[: lab.setting.side_seeds])


def _altered(
    lab: Lab, kind: str, task: str, seed: int, alter: Callable[..., Any], variants: Mapping[str, Any], **told: Any
) -> Job:
    """The QAT model as `alter` makes it of each variant. told: what more decides the outcome."""
    steps = lab.setting.steps
    tuned, qat = Training(task, seed, steps, FP32), Training(task, seed, steps, RECOMMENDED)
    identity = {training.recipe: lab.identity(training) for training in (tuned, qat)} | told

    def measure() -> Figures:
        run, stick = lab.train(qat), lab.yardstick(task, seed, steps)
        quantized, found = lab.frozen(run), {}
        for title, variant in variants.items():
            with alter(run.reference, quantized, variant) as model:
                found[title] = stick.compare(model)
        return found

    seconds = len(variants) * (lab.setting.tokens * SCORE_S + LOAD_S)
    return Job(_cell(lab, kind, task, seed, RECOMMENDED, steps, identity), measure, (tuned, qat), seconds)


def _cost(lab: Lab) -> Iterator[Job]:
    """One round: every scheme once, one after the other, so that a busy machine slows all alike."""
    task = next(iter(TASKS))
    steps = cost.steps_for(lab.setting.cost_steps)
    for number in range(lab.setting.cost_rounds):
        identity = {
            "recipes": {name: dict(over) for name, over in settings.COSTS.items()},
            "recommended": lab.identity(Training(task, 0, steps, RECOMMENDED)),
        }
        cell = Cell("cost", "", number, "round", {"steps": steps, "device": lab.device, **identity})
        seconds = len(settings.COSTS) * (START_S + steps * lab.setting.qat_step_s)
        yield Job(cell, lambda: _cost_round(lab, task, steps), (), seconds + lab.setting.calibrate_s)


def _cost_round(lab: Lab, task: str, steps: int) -> Figures:
    found: Figures = {}
    for name, overrides in settings.COSTS.items():
        start = float(steps if name == settings.LORA else cost.PHASE_ONE)
        options = config.plain(lab.options(Training(task, 0, steps, RECOMMENDED))) | dict(overrides)
        checked = config.load(FinetuneOptions, "finetune", None, {**options, "qat_start": start})
        stem = lab.work / "cost" / slug(name)
        config.save(stem.with_suffix(".yaml"), "finetune", checked)
        paths = [str(stem.with_suffix(".yaml")), str(stem), str(stem.with_suffix(".json"))]
        lab.command(["benchmarks.cost", *paths], f"cost-{slug(name)}")
        found[name] = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def _better(lab: Lab, task: str, seed: int, steps: int) -> str:
    """The baseline of lower emulated perplexity."""

    def perplexity(method: str) -> float:
        job = emulated(lab, task, seed, steps, method)
        return float(lab.measured(job.cell, job.measure)["perplexity"])

    return min(BASELINES, key=perplexity)


def _cell(
    lab: Lab, kind: str, task: str, seed: int, name: str, steps: int, identity: dict[str, Any]
) -> Cell:  # fmt: skip
    shared = {"steps": steps, "tokens": lab.setting.tokens, "window": TASKS[task].window}
    return Cell(kind, task, seed, name, {**shared, "trained": identity})


def _method_s(lab: Lab, method: str) -> float:
    return lab.setting.calibrate_s if method in methods.CALIBRATED else METHOD_S.get(method, 5.0)


def _training_s(lab: Lab, training: Training) -> float:
    """About how long one training takes: phase 1 is plain LoRA."""
    options, share, prepared_s = lab.options(training), 1.0, 0.0
    if training.recipe != FP32:
        share = options.qat_start if options.qat_start < 1 else min(options.qat_start / training.steps, 1.0)
        prepared_s = _method_s(lab, options.ptq_init)
    seconds = share * lab.setting.lora_step_s + (1 - share) * lab.setting.qat_step_s
    return START_S + prepared_s + training.steps * seconds * TASKS[training.task].step_tokens / 1024
