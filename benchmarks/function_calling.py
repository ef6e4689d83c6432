"""Function calls of BFCL: `python -m benchmarks.function_calling` writes docs/function-calling.md.

A model trains on the training half of BFCL's functions and is asked the questions of the other half, in both runtimes:
the FP32 fine-tune, round-to-nearest and the best PTQ of it, and QAT at equal steps: the default recipe, and QAT for
half of the steps. A cell is one training of QAT with one seed, and the default's has the models without QAT too;
finished cells are kept as in `benchmarks.accuracy`, and docs/function-calling.json has those of the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import page
from benchmarks.cells import Cell, publish
from benchmarks.page import MISSING, NONE_SHOWN
from benchmarks.runner import ROOT, BenchmarkRunner, Figures, Training
from benchmarks.settings import CALLS, FP32, LONG_QAT, RECOMMENDED
from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError
from qat_edge.logs import quiet_libraries
from qat_edge.public_tasks import answer_records, paired
from qat_edge.public_tasks.answer_records import Answered
from qat_edge.public_tasks.function_calls import INSTRUCTION
from qat_edge.public_tasks.paired import Interval
from qat_edge.run import Run
from qat_edge.storage import write_text
from qat_edge.verbs.task_rows import write_task_rows

STEPS, SEEDS = 120, (0, 1, 2)
CONTEXT_FLAGS = ("--context-length", "1024")
TRAINED = ("bfcl_simple", "bfcl_live_simple", "bfcl_multiple", "bfcl_parallel")
ASKED = "bfcl_simple"  # one function to call
UNSEEN = (ASKED, "bfcl_live_simple")  # the guard has no function of their questions
REFERENCE, RTN, BEST = "reference", "rtn", "coordinate-descent"
METHODS = (RTN, BEST, "")  # "" for QAT
RUNTIMES = {"executorch": "`.pte`", "onnx": "ONNX"}


class Model(NamedTuple):
    """A quantized model of the page. method: as in METHODS; recipe: of the QAT whose cell has it."""

    name: str
    method: str
    recipe: str = RECOMMENDED


MODELS = (
    Model("round-to-nearest", RTN),
    Model("best PTQ: rotation and coordinate descent", BEST),
    Model("QAT, default recipe", ""),
    Model(LONG_QAT, "", LONG_QAT),
)


def main() -> None:
    """Measure the missing cells and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.function_calling", description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/calls"), help="folder of runs and finished cells")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds, one training each")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "function-calling.md", help="page to write")
    parser.add_argument("--page-only", action="store_true", help="write the page from finished cells")
    given = parser.parse_args()
    quiet_libraries(verbose=False)
    try:
        runner = BenchmarkRunner.of_page(given.work, given.out)
        for seed in [] if given.page_only else given.seeds:
            for recipe, measure in MEASURES.items():
                progress.info(f"seed {seed}, {recipe}")
                runner.measure_once(cell(runner, seed, recipe), partial(measure, runner, seed))
        write(runner, sorted({*SEEDS, *given.seeds}), given.out)
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error


def write_rows(folder: Path) -> None:
    """Write BFCL's rows: train.jsonl, eval.jsonl and guard.jsonl.

    The rows to train on are those of the training half of its functions, and eval.jsonl has those of the other half.
    guard.jsonl has the latter's rows without a function that a question of UNSEEN has.
    """
    train, test = "", ""
    unseen: set[str] = set()
    for task in TRAINED:
        rows = write_task_rows(task, folder / task, as_text=True, force=True)
        train += rows.train.read_text(encoding="utf-8")
        questions = rows.test.read_text(encoding="utf-8")
        test += questions
        if task in UNSEEN:
            unseen |= {name for line in questions.splitlines() for name in _functions(line)}
    guard = [line for line in test.splitlines(keepends=True) if not unseen & _functions(line)]
    for name, text in {"train": train, "eval": test, "guard": "".join(guard)}.items():
        write_text(folder / f"{name}.jsonl", text)


def _functions(line: str) -> set[str]:
    """Return the names of the functions that a row describes in its system message."""
    text = json.loads(line)["messages"][0]["content"].removeprefix(INSTRUCTION)
    described, _, _ = text.partition("\n\n")  # a system message of the question itself follows
    return {json.loads(function)["name"] for function in described.split("\n")}


def source_name(method: str, runtime: str) -> str:
    """Return a model as `eval --from` has it. method: "" for QAT."""
    return f"{method}/{runtime}" if method else runtime


def cell(runner: BenchmarkRunner, seed: int, recipe: str) -> Cell:
    """Return the identity of the figures of one seed and recipe of QAT."""
    recipes, part = ((FP32, recipe), "all") if recipe == RECOMMENDED else ((recipe,), recipe)
    trained = [runner.identity(Training(CALLS.name, seed, STEPS, each)) for each in recipes]
    return Cell("calls", CALLS.name, seed, part, {"steps": STEPS, "asked": ASKED, "trained": trained})


def measure_default(runner: BenchmarkRunner, seed: int) -> Figures:
    """Train, quantize and export the default recipe and the models without QAT; return the scores of each question.

    Keys: "answers": model -> list of [question, score].
    """
    run = runner.joined(CALLS.name, seed, STEPS, (), keep=True)
    log = f"{run.path.name}-eval"
    runner.command(["qat_edge", "quantize", str(run.path), "--method", BEST, "--rotate"], log)
    methods = [word for method in (RTN, BEST) for word in ("--ptq", method)]
    runner.command(["qat_edge", "export", str(run.path), *methods, *CONTEXT_FLAGS], log)
    sources = [REFERENCE, *(source_name(method, runtime) for runtime in RUNTIMES for method in METHODS)]
    return _ask(runner, run, sources, log)


def measure_long(runner: BenchmarkRunner, seed: int) -> Figures:
    """Train and export QAT for half of the steps; return the scores of each question, as `measure_default` does."""
    run = runner.train(Training(CALLS.name, seed, STEPS, LONG_QAT))
    log = f"{run.path.name}-eval"
    runner.command(["qat_edge", "export", str(run.path), "--ptq", "none", *CONTEXT_FLAGS], log)
    return _ask(runner, run, list(RUNTIMES), log)


MEASURES = {RECOMMENDED: measure_default, LONG_QAT: measure_long}


def _ask(runner: BenchmarkRunner, run: Run, sources: Sequence[str], log: str) -> Figures:
    """Ask models of a run the questions. Answers that are there already are kept."""
    models = [word for source in sources for word in ("--from", source)]
    flags = ["--task", ASKED, *models, "--calls", "text", *CONTEXT_FLAGS]
    runner.command(["qat_edge", "eval", str(run.path), *flags], log)
    found = answer_records.read(run.evaluations / f"{ASKED}.json").sources
    return {"answers": {source: [[each.id, each.score] for each in found[source].answers] for source in sources}}


def scores(runner: BenchmarkRunner, source: str, seeds: Sequence[int], recipe: str = RECOMMENDED) -> list[Answered]:
    """Return the score of every question with every seed."""
    found = []
    for seed in seeds:
        figures = runner.store.get(cell(runner, seed, recipe)) or {"answers": {source: []}}
        found += [Answered(f"{seed}: {name}", "", score, 1, "") for name, score in figures["answers"][source]]
    return found


def recovered(fp32: Sequence[Answered], rtn: Sequence[Answered], other: Sequence[Answered]) -> Interval:
    """Return the share of what round-to-nearest loses that another model wins back, with its 95% interval.

    Questions are resampled, the same ones for all three models. A resample in which round-to-nearest loses nothing
    counts as infinite.
    """
    ids = [each.id for each in fp32]
    if any([each.id for each in model] != ids for model in (rtn, other)):
        raise QatEdgeError("The models were not asked the same questions. Measure the seed again.")
    high, low, own = (np.array([each.score for each in model]) for model in (fp32, rtn, other))
    drawn = np.random.default_rng(paired.SEED).integers(len(ids), size=(paired.RESAMPLES, len(ids)))
    lost, won = (high - low)[drawn].sum(axis=1), (own - low)[drawn].sum(axis=1)
    shares = np.divide(won, lost, out=np.full(len(won), np.inf), where=lost > 0)
    low_end, high_end = np.quantile(shares, paired.QUANTILES)
    return Interval(float((own - low).sum() / (high - low).sum()), float(low_end), float(high_end))


# --- page --------------------------------------------------------------------------------------------------


def write(runner: BenchmarkRunner, seeds: Sequence[int], path: Path) -> None:
    """Write the page of the seeds that are measured, and the cells behind it next to it."""
    seeds = [seed for seed in seeds if _is_measured(runner, seed, RECOMMENDED)]
    cells = [cell(runner, seed, recipe) for seed in seeds for recipe in MEASURES]
    records = [record for each in cells if (record := runner.store.record(each)) is not None]
    text = [
        "# Function calls",
        "`python -m benchmarks.function_calling` writes this page from the JSON files of its measurements. "
        f"SmolLM2-135M-Instruct trains for {STEPS} steps of {CALLS.training['batch_size']} rows on the training half "
        f"of BFCL's functions ({', '.join(TRAINED)}). It answers the questions of {ASKED} about the "
        f"other half, with functions as text in the system message ({page.counted_seeds(seeds)}); no training row has "
        "a function of these questions. The FP32 fine-tune and both models of PTQ trained for as many steps as QAT. "
        f"*{LONG_QAT}* is guarded on rows with neither a trained function nor one of these questions. *Recovered* is "
        "the share of what round-to-nearest loses that a model wins back. Brackets are 95% intervals, of differences "
        f'paired by question and seed; "{NONE_SHOWN}" stands where the interval contains zero. A cell that went on '
        "after an interruption has the time of its last part.",
    ]
    text += [page.table(("", ""), page.provenance(records))] if records else []
    text.append(
        page.table(
            ("model", "runtime", "right calls", "less FP32", "less best PTQ", "recovered"), [*_rows(runner, seeds)]
        )
    )
    write_text(path, "\n\n".join(text) + "\n")
    publish(records, path.with_suffix(".json"))
    progress.info(f"Wrote {path}")


def _is_measured(runner: BenchmarkRunner, seed: int, recipe: str) -> bool:
    return runner.store.get(cell(runner, seed, recipe)) is not None


def _rows(runner: BenchmarkRunner, seeds: Sequence[int]) -> Iterator[list[str]]:
    fp32 = scores(runner, REFERENCE, seeds)
    yield ["FP32 fine-tune", "torch", _share(paired.mean(fp32)) if fp32 else MISSING, "", "", ""]
    for runtime, title in RUNTIMES.items():
        for model in MODELS:
            measured = [seed for seed in seeds if _is_measured(runner, seed, model.recipe)]
            figures = _figures(runner, model, runtime, measured) if measured else [MISSING] * 4
            yield [model.name, title, *figures]


def _figures(runner: BenchmarkRunner, model: Model, runtime: str, seeds: Sequence[int]) -> list[str]:
    """Return right calls, differences and the recovered share of a model; empty where one says nothing."""
    fp32 = scores(runner, REFERENCE, seeds)
    rtn, best = (scores(runner, source_name(method, runtime), seeds) for method in (RTN, BEST))
    found = scores(runner, source_name(model.method, runtime), seeds, model.recipe)
    if not paired.difference(rtn, fp32).is_shown:
        won = "round-to-nearest loses too little to tell"
    else:
        won = _share(recovered(fp32, rtn, found))
    less_ptq = "" if model.method else _less(found, best)
    return [_share(paired.mean(found)), _less(found, fp32), less_ptq, "" if model.method == RTN else won]


def _less(found: Sequence[Answered], other: Sequence[Answered]) -> str:
    difference = paired.difference(found, other)
    return _share(difference.interval) if difference.is_shown else NONE_SHOWN


def _share(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
