"""Function calls of BFCL: `python -m benchmarks.function_calling` writes docs/function-calling.md.

A model trains on the training half of BFCL's functions and is asked the questions of the other half, in both runtimes:
the FP32 fine-tune, round-to-nearest and the best PTQ of it, and QAT at equal steps. A cell is one seed; finished cells
are kept as in `benchmarks.accuracy`, and docs/function-calling.json has those of the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import page
from benchmarks.cells import Cell, publish
from benchmarks.page import MISSING, NONE_SHOWN
from benchmarks.runner import ROOT, BenchmarkRunner, Figures, Training
from benchmarks.settings import CALLS, FP32, RECOMMENDED
from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError
from qat_edge.logs import quiet_libraries
from qat_edge.options import DEFAULT_FORMATS
from qat_edge.public_tasks import answer_records, paired
from qat_edge.public_tasks.answer_records import Answered
from qat_edge.public_tasks.function_calls import INSTRUCTION
from qat_edge.public_tasks.paired import Interval
from qat_edge.storage import write_text
from qat_edge.verbs.task_rows import write_task_rows

STEPS, CONTEXT, SEEDS = 120, 1024, (0, 1, 2)
ASKED = ("bfcl_simple", "bfcl_live_simple")  # one function to call
TRAINED = (*ASKED, "bfcl_multiple", "bfcl_parallel")
REFERENCE, RTN, BEST = "reference", "rtn", "coordinate-descent"
NAMES = {RTN: "round-to-nearest", BEST: "PTQ: rotation and coordinate descent", "": "QAT"}
RUNTIMES = {"executorch": "`.pte`", "onnx": "ONNX"}


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
            progress.info(f"seed {seed}")
            runner.measure_once(cell(runner, seed), partial(measure, runner, seed))
        # The page has every seed that is measured, in this run or before.
        seeds = sorted({*SEEDS, *given.seeds})
        write(runner, [seed for seed in seeds if runner.store.get(cell(runner, seed)) is not None], given.out)
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error


def write_rows(folder: Path) -> None:
    """Write BFCL's rows: train.jsonl, eval.jsonl and guard.jsonl.

    The rows to train on are those of the training half of its functions, and eval.jsonl has those of the other half.
    guard.jsonl has the latter's rows without a function that a question of this benchmark has.
    """
    train, test = "", ""
    asked: set[str] = set()
    for task in TRAINED:
        rows = write_task_rows(task, folder / task, as_text=True, force=True)
        train += rows.train.read_text(encoding="utf-8")
        test += rows.test.read_text(encoding="utf-8")
        if task in ASKED:
            asked |= {name for line in rows.test.read_text(encoding="utf-8").splitlines() for name in _functions(line)}
    guard = [line for line in test.splitlines(keepends=True) if not asked & _functions(line)]
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


def cell(runner: BenchmarkRunner, seed: int) -> Cell:
    """Return the identity of one seed's figures."""
    trained = [runner.identity(Training(CALLS.name, seed, STEPS, recipe)) for recipe in (FP32, RECOMMENDED)]
    return Cell("calls", CALLS.name, seed, "all", {"steps": STEPS, "asked": ASKED, "trained": trained})


def measure(runner: BenchmarkRunner, seed: int) -> Figures:
    """Train, quantize and export where needed; return the scores of each question by model.

    Keys: "answers": model -> list of [question, score].
    """
    run = runner.joined(CALLS.name, seed, STEPS, (), keep=True)
    log = f"{run.path.name}-eval"
    runner.command(["qat_edge", "quantize", str(run.path), "--method", BEST, "--rotate"], log)
    methods = [word for method in (RTN, BEST) for word in ("--ptq", method)]
    targets = [word for target in DEFAULT_FORMATS for word in ("--target", target)]
    context = ["--context-length", str(CONTEXT)]
    runner.command(["qat_edge", "export", str(run.path), *targets, *methods, *context], log)

    sources = [REFERENCE, *(source_name(method, runtime) for runtime in RUNTIMES for method in NAMES)]
    models = [word for source in sources for word in ("--from", source)]
    answers: dict[str, list[list[object]]] = {source: [] for source in sources}
    for task in ASKED:
        flags = ["--task", task, *models, "--calls", "text", *context]
        runner.command(["qat_edge", "eval", str(run.path), *flags], log)
        found = answer_records.read(run.evaluations / f"{task}.json").sources
        for source in sources:
            answers[source] += [[f"{task}: {each.id}", each.score] for each in found[source].answers]
    return {"answers": answers}


def scores(runner: BenchmarkRunner, source: str, seeds: Sequence[int]) -> list[Answered]:
    """Return the score of every question with every seed."""
    found = []
    for seed in seeds:
        figures = runner.store.get(cell(runner, seed)) or {"answers": {source: []}}
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
    """Write the page, and the cells behind it next to it."""
    records = [record for seed in seeds if (record := runner.store.record(cell(runner, seed))) is not None]
    text = [
        "# Function calls",
        "`python -m benchmarks.function_calling` writes this page from the JSON files of its measurements. "
        f"SmolLM2-135M-Instruct trains for {STEPS} steps of {CALLS.training['batch_size']} rows on the training half "
        f"of BFCL's functions ({', '.join(TRAINED)}). It answers the questions of {' and '.join(ASKED)} about the "
        f"other half, with functions as text in the system message ({page.counted_seeds(seeds)}); no training row has "
        "a function of these questions. QAT is the default recipe; the other models are the FP32 fine-tune, quantized "
        "after as many steps. *Recovered* is the share of what round-to-nearest loses that a model wins back. Brackets "
        f'are 95% intervals, paired by question and seed; "{NONE_SHOWN}" stands where the interval contains zero.',
    ]
    text += [page.table(("", ""), page.provenance(records))] if records else []
    text.append(page.table(("model", "runtime", "right calls", "less FP32", "recovered"), _rows(runner, seeds)))
    write_text(path, "\n\n".join(text) + "\n")
    publish(records, path.with_suffix(".json"))
    progress.info(f"Wrote {path}")


def _rows(runner: BenchmarkRunner, seeds: Sequence[int]) -> list[list[str]]:
    fp32 = scores(runner, REFERENCE, seeds)
    if not fp32:
        return [["FP32 fine-tune", "torch", *[MISSING] * 3]]
    rows = [["FP32 fine-tune", "torch", _share(paired.mean(fp32)), "", ""]]
    for runtime, title in RUNTIMES.items():
        rtn = scores(runner, source_name(RTN, runtime), seeds)
        loses = paired.difference(rtn, fp32)
        for method, name in NAMES.items():
            found = scores(runner, source_name(method, runtime), seeds)
            less = paired.difference(found, fp32)
            won = ""
            if method != RTN:
                won = (
                    _share(recovered(fp32, rtn, found))
                    if loses.is_shown
                    else "round-to-nearest loses too little to tell"
                )
            rows.append(
                [name, title, _share(paired.mean(found)), _share(less.interval) if less.is_shown else NONE_SHOWN, won]
            )
    return rows


def _share(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
