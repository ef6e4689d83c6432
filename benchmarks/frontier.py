"""Accuracy against size: `python -m benchmarks.frontier` measures PTQ and QAT at equal steps, writes docs/frontier.md.

Every model trains for the same number of steps on the assistant task, is exported to ONNX, and answers the same
held-out requests in onnxruntime (`qat-edge eval --task rows`). QAT is compared with PTQ of its scheme request by
request. A cell is one model with one seed; finished cells are kept as in `benchmarks.accuracy`, and
docs/frontier.json has those of the page.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import chart, frontier_peers, page, scheme_speed, settings
from benchmarks.cells import Cell, publish
from benchmarks.frontier_peers import PEERS
from benchmarks.page import MISSING, NONE_SHOWN
from benchmarks.peers import PeerError
from benchmarks.runner import ROOT, BenchmarkRunner, Figures, Training
from benchmarks.settings import FINISHES, FP32, PTQ, SCHEMES
from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError
from qat_edge.logs import quiet_libraries
from qat_edge.public_tasks import answer_records, own_rows, paired
from qat_edge.public_tasks.answer_records import Answered
from qat_edge.report.formatting import megabytes, number
from qat_edge.storage import write_text

TASK = "assistant"
STEPS, QUESTIONS, SEEDS = 120, 200, (0, 1, 2)
# Held-out rows as `eval` names its tasks: right answers, and nats per token.
SCORES = own_rows.TASKS
MARKS = {
    PTQ: "square",
    "QAT": "diamond",
    "QAT for a tenth": "diamond",
    "QAT of scales": "circle",
    "other tools": "triangle",
}


def main() -> None:
    """Measure the missing cells and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="folder of runs and finished cells")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="seeds, one training of each model each")
    parser.add_argument(
        "--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), metavar="SCHEME",
        help=f"schemes to measure: {'; '.join(SCHEMES)}",
    )  # fmt: skip
    parser.add_argument(
        "--finishes", nargs="+", choices=list(FINISHES), default=list(FINISHES), metavar="FINISH",
        help=f"how each scheme is reached: {'; '.join(FINISHES)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "frontier.md", help="page to write")
    parser.add_argument("--peers", action="store_true", help="measure models of other tools as well")
    parser.add_argument("--speed", action="store_true", help="measure decoding speed as well")
    parser.add_argument("--page-only", action="store_true", help="write the page from finished cells")
    given = parser.parse_args()
    quiet_libraries(verbose=False)
    try:
        runner = BenchmarkRunner.of_page(given.work, given.out)
        names = [FP32, *(model_name(scheme, finish) for scheme in given.schemes for finish in given.finishes)]
        for seed in [] if given.page_only else given.seeds:
            for name in names:
                progress.info(f"{name}, seed {seed}")
                runner.measure_once(cell(runner, name, seed), partial(measure, runner, name, seed))
        for seed in given.seeds if given.peers else []:
            measure_peers(runner, seed)
        if given.speed:
            runner.measure_once(scheme_speed.cell(runner), partial(scheme_speed.measure, runner))
        # The page has every seed whose FP32 fine-tune is measured, in this run or before.
        seeds = sorted({*SEEDS, *given.seeds})
        measured = [seed for seed in seeds if runner.store.get(cell(runner, FP32, seed)) is not None]
        write(runner, measured, given.out)
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error


def model_name(scheme: str, finish: str) -> str:
    """Return the name of a model in settings.FRONTIER."""
    return f"{scheme}, {finish}"


def training_of(name: str, seed: int) -> Training:
    """Return the training of a model; the FP32 fine-tune is the reference of the run that is rounded after it."""
    return Training(TASK, seed, STEPS, model_name("4 bits", PTQ) if name == FP32 else name)


def cell(runner: BenchmarkRunner, name: str, seed: int) -> Cell:
    """Return the identity of a model's figures. name: FP32, a model of settings.FRONTIER, or one of PEERS."""
    if name in PEERS:
        return frontier_peers.cell(runner, name, training_of(FP32, seed), QUESTIONS)
    trained = runner.identity(training_of(name, seed))
    return Cell("rows", TASK, seed, name, {"steps": STEPS, "questions": QUESTIONS, "trained": trained})


def measure(runner: BenchmarkRunner, name: str, seed: int) -> Figures:
    """Train and export where needed; return the scores of each row and the size of the weights.

    Keys: "size_bytes" of the artifact's weights, None for FP32; "rows" and "rows_loss": lists of [row, score, weight].
    """
    run = runner.train(training_of(name, seed))
    source = "reference" if name == FP32 else "onnx"
    log = f"{run.path.name}-eval"
    weights = run.exports / "onnx" / "model.onnx.data"
    if not weights.is_file():
        runner.command(["qat_edge", "export", str(run.path), "--target", "onnx", "--ptq", "none"], log)
    figures: Figures = {}
    for task in SCORES:
        flags = ["--task", task, "--from", source, "--limit", str(QUESTIONS), "--threads", "2"]
        rows = str(runner.data(TASK).eval)
        runner.command(["qat_edge", "eval", str(run.path), *flags, "--data", rows, "--force"], log)
        answers = answer_records.read(run.evaluations / f"{task}.json").sources[source].answers
        figures[task] = [[each.id, each.score, each.weight] for each in answers]
    figures["size_bytes"] = None if name == FP32 else weights.stat().st_size
    if name != FP32:  # the next model is rounded from the same run
        for folder in (run.checkpoints, run.exports, run.quantized):
            shutil.rmtree(folder)
    return figures


def measure_peers(runner: BenchmarkRunner, seed: int) -> None:
    """Measure the missing models of other tools; one that cannot be made is named and left out."""
    for name in PEERS:
        progress.info(f"{name}, seed {seed}")
        made = partial(frontier_peers.measure, runner, name, training_of(FP32, seed), QUESTIONS)
        try:
            runner.measure_once(cell(runner, name, seed), made)
        except PeerError as error:
            progress.warn(f"{name}: {error}")


def scores(runner: BenchmarkRunner, name: str, seeds: Sequence[int], task: str) -> list[Answered]:
    """Return the score of every row with every seed; empty where a seed is not measured."""
    found = []
    for seed in seeds:
        figures = runner.store.get(cell(runner, name, seed))
        if figures is None:
            return []
        found += [Answered(f"{seed}: {row}", "", score, weight, "") for row, score, weight in figures[task]]
    return found


# --- page --------------------------------------------------------------------------------------------------


def write(runner: BenchmarkRunner, seeds: Sequence[int], path: Path) -> None:
    """Write the page, its plot, and the cells behind it next to it."""
    models = {model_name(scheme, finish): (scheme, finish) for scheme in SCHEMES for finish in FINISHES}
    cells = [cell(runner, name, seed) for seed in seeds for name in (FP32, *models, *PEERS)]
    records = [record for each in cells if (record := runner.store.record(each)) is not None]
    sizes = {record["cell"]["name"]: record["figures"]["size_bytes"] for record in records}
    rows = [_row(runner, FP32, FP32, "FP32 fine-tune", "float32", seeds)]
    for name, (scheme, _) in models.items():
        if sizes.get(name):
            rows.append(_row(runner, name, model_name(scheme, PTQ), name, f"{megabytes(sizes[name])} MB", seeds))
    missing = _missing(sizes)
    heads = ("model", "weights", "right answers", "QAT less PTQ", "nats per token", "QAT less PTQ")
    text = [
        "# Accuracy against size",
        "`python -m benchmarks.frontier` writes this page from the JSON files of its measurements. SmolLM2-135M-"
        f"Instruct trains for {STEPS} steps of 8 rows on the demo's assistant task: the FP32 fine-tune and the models "
        "of PTQ with LoRA alone, the models of QAT with LoRA for half of them, or for nine tenths where the name says "
        "that QAT has a tenth, which is the default at 4 bits. PTQ is rotation and coordinate descent "
        f"on {settings.FRONTIER_TOKENS} tokens, and QAT begins from its result; its guard keeps the best state on "
        f"held-out rows of its own. Models then answer {QUESTIONS} other held-out requests in "
        f"onnxruntime, FP32 in torch ({page.counted_seeds(seeds)}). Brackets are 95% intervals, of differences paired "
        f'by request and seed; "{NONE_SHOWN}" stands where the interval contains zero.',
    ]
    finishes = {name: finish for name, (_, finish) in models.items()} | dict.fromkeys(PEERS, "other tools")
    picture = _plot(runner, seeds, finishes, sizes)
    if picture:
        write_text(path.with_suffix(".svg"), picture)
        text.append(f"![Right answers against the size of the weights]({path.with_suffix('.svg').name})")
    text += [page.table(("", ""), page.provenance(records))] if records else []
    text.append(page.table(heads, rows))
    text += [f"Not measured yet: {'; '.join(missing)}."] if missing else []
    peers = _peer_rows(runner, seeds, sizes)
    text += frontier_peers.section(peers) if peers else []
    timed = runner.store.record(scheme_speed.cell(runner))
    text += scheme_speed.section(timed["figures"]) if timed is not None else []
    write_text(path, "\n\n".join(text) + "\n")
    publish([*records, *([timed] if timed is not None else [])], path.with_suffix(".json"))
    progress.info(f"Wrote {path}")


def _missing(sizes: Mapping[str, int | None]) -> list[str]:
    """Return the models that are not measured, and schemes of which none is. sizes: bytes of the measured ones."""
    found = []
    for scheme in SCHEMES:
        left = [name for finish in FINISHES if not sizes.get(name := model_name(scheme, finish))]
        found += [scheme] if len(left) == len(FINISHES) else left
    return found


def _plot(
    runner: BenchmarkRunner,
    seeds: Sequence[int],
    finishes: Mapping[str, str],
    sizes: Mapping[str, int | None],
) -> str:
    """Return a plot of right answers against size as SVG; empty where no model is measured.

    finishes: how each model is reached, a key of MARKS.
    """
    labels = {mark: finish for finish, mark in reversed(MARKS.items())}  # the first finish with a mark
    points: dict[str, list[chart.Point]] = {mark: [] for mark in dict.fromkeys(MARKS.values())}
    for name, finish in finishes.items():
        found, size = scores(runner, name, seeds, own_rows.ANSWERS), sizes.get(name)
        if found and size:
            points[MARKS[finish]].append(chart.Point(size / 1e6, paired.mean(found).value * 100, name))
    float_answers = scores(runner, FP32, seeds, own_rows.ANSWERS)
    level = paired.mean(float_answers).value * 100 if float_answers else None
    return chart.scatter(
        "frontier", "Right answers; dashed: FP32", ("MB of weights", "%"),
        {mark: (labels[mark], found) for mark, found in points.items() if found}, level,
    )  # fmt: skip


def _peer_rows(runner: BenchmarkRunner, seeds: Sequence[int], sizes: Mapping[str, int | None]) -> list[list[str]]:
    """Return a row for each measured model of another tool, compared with our PTQ on the seeds that it has."""
    rows = []
    for name, peer in PEERS.items():
        own = [seed for seed in seeds if runner.store.get(cell(runner, name, seed)) is not None]
        size = sizes.get(name)
        if own and size is not None:
            row = _row(runner, name, model_name(peer.rival, PTQ), name, f"{megabytes(size)} MB", own)
            rows.append([*row, peer.rival, page.counted_seeds(own)])
    return rows


def _row(runner: BenchmarkRunner, name: str, baseline: str, title: str, size: str, seeds: Sequence[int]) -> list[str]:
    row = [title, size]
    for task in SCORES:
        found, base = scores(runner, name, seeds, task), scores(runner, baseline, seeds, task)
        if not found:
            return [*row[:2], *[MISSING] * 4]
        mean = paired.mean(found)
        row.append(f"{_figure(task, mean.value)} ({_figure(task, mean.low)} to {_figure(task, mean.high)})")
        row.append("" if name == baseline or not base else _difference(task, paired.difference(found, base)))
    return row


def _difference(task: str, found: paired.PairedDifference) -> str:
    if not found.is_shown:
        return NONE_SHOWN
    interval = found.interval
    return f"{_figure(task, interval.value)} ({_figure(task, interval.low)} to {_figure(task, interval.high)})"


def _figure(task: str, value: float) -> str:
    return number(value) if task == own_rows.LOSS else f"{value:.1%}"


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
