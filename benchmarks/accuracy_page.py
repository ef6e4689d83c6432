"""Write docs/accuracy.md and its plot from finished cells. A cell that is missing shows as "not measured"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import accuracy_text, cells, chart, settings
from benchmarks.page import MISSING, provenance, table
from benchmarks.partial_rounding import SWITCHED_OFF, TABLE_BITS
from benchmarks.runner import BenchmarkRunner, Figures
from benchmarks.schedule import Job
from benchmarks.settings import BASELINES, FP32, METHODS, RECOMMENDED, SETTINGS, TASKS, Setting
from qat_edge.report.formatting import number, percent
from qat_edge.storage import write_text

NO_LOSS = "PTQ loses nothing"
NAMES = {
    "base": "base", FP32: "FP32 fine-tune", "rtn": "round-to-nearest", "hqq": "HQQ", "gptq": "GPTQ", "gptaq": "GPTAQ",
    "coordinate-descent": "coordinate descent", "awq": "AWQ",
    RECOMMENDED: "QAT",
}  # fmt: skip
MODELS = (FP32, *METHODS, RECOMMENDED)
TORCH = "torch"
TARGETS = {TORCH: "torch, exact emulation", "executorch": "`.pte`", "onnx": "ONNX folder"}
ARTIFACTS = ("executorch", "onnx")
# Formulation -> tool and forward pass.
FORMULAS = {
    "merged": ("qat-edge", "`fq(W + s B A) x`"),
    "split": ("torchtune's QAT-LoRA", "`fq(W) x + s B A x`"),
    "separate": ("unsloth's", "`fq(W) x + s fq(B) fq(A) x`"),
}


@dataclass(frozen=True)
class AccuracyResults:
    """Finished cells of one setting.

    Attributes:
        records: cells as the store keeps them, with figures and provenance.
        setting: amounts of the benchmark run.
        seeds: seeds of the report, measured or not.
    """

    records: Sequence[Figures]
    setting: Setting
    seeds: tuple[int, ...]

    @property
    def side_seeds(self) -> tuple[int, ...]:
        """Seeds of the parts after the first."""
        return self.seeds[: self.setting.side_seeds]

    @property
    def on_gpu(self) -> bool:
        """True where a cell was measured on a GPU."""
        return any(record["machine"].startswith("NVIDIA") for record in self.records)

    def find(self, kind: str, task: str, seed: int, name: str, steps: int) -> Figures | None:
        """Return the figures of one cell, None where it has not been measured."""
        wanted = (kind, task, seed, name, steps)
        for record in self.records:
            cell = record["cell"]
            if (cell["kind"], cell["task"], cell["seed"], cell["name"], cell["settings"]["steps"]) == wanted:
                return dict(record["figures"])
        return None

    def emulated(self, task: str, seed: int, name: str, steps: int | None = None) -> Figures | None:
        """Return the figures of one model in torch emulation; of the setting's steps where none are given."""
        return self.find("emulated", task, seed, name, self.setting.steps if steps is None else steps)

    def emulated_perplexity(self, task: str, seed: int, name: str, steps: int) -> float | None:
        """Return the perplexity of one model in torch emulation."""
        figures = self.emulated(task, seed, name, steps)
        return None if figures is None else float(figures["perplexity"])

    def measured_on(self, target: str, task: str, seed: int, name: str) -> Figures | None:
        """Return the figures of one model on a target. The FP32 fine-tune always runs in torch."""
        if target == TORCH:
            return self.emulated(task, seed, name)
        # All artifacts of a seed are validated together, so they share one cell.
        found = self.find("artifacts", task, seed, RECOMMENDED, self.setting.steps)
        wanted = TORCH if name == FP32 else target
        rows = [] if found is None else found["rows"]
        return next((dict(row) for row in rows if (row["model"], row["target"]) == (name, wanted)), None)

    def perplexity(self, target: str, task: str, seed: int, name: str) -> float | None:
        """Return the perplexity of one model on a target."""
        found = self.measured_on(target, task, seed, name)
        return None if found is None else float(found["perplexity"])

    def recovered(self, target: str, task: str, seed: int) -> float | None:
        """Return the share of the PTQ loss that QAT recovers, for one seed."""
        fp32, qat = (self.perplexity(target, task, seed, name) for name in (FP32, RECOMMENDED))
        return recovery(fp32, qat, self._ptq(target, task, seed))

    def _ptq(self, target: str, task: str, seed: int) -> list[float | None]:
        """Perplexities of the baselines: both of them in torch, only the exported ones on a target."""
        names: Iterable[str] = BASELINES
        if target != TORCH:
            found = self.find("artifacts", task, seed, RECOMMENDED, self.setting.steps) or {}
            names = [name for name in found.get("methods", BASELINES) if name in BASELINES]
        return [self.perplexity(target, task, seed, name) for name in names]


def recovery(fp32: float | None, qat: float | None, ptq: Sequence[float | None]) -> float | None:
    """Return (ppl_ptq - ppl_qat) / (ppl_ptq - ppl_fp32), where ppl_ptq is the lowest of `ptq`.

    Returns:
        None where a figure is missing; not-a-number where PTQ loses nothing, so that there is nothing to recover.
    """
    # With a baseline missing, the better one is unknown, and so is the recovery.
    known = [value for value in ptq if value is not None]
    if fp32 is None or qat is None or not known or len(known) < len(ptq):
        return None
    if min(known) <= fp32:
        return math.nan
    return (min(known) - qat) / (min(known) - fp32)


def write(runner: BenchmarkRunner, jobs: Sequence[Job], seeds: Sequence[int], path: Path) -> Path:
    """Write the report, its plot and the cells behind it.

    Args:
        runner: has the store of cells.
        jobs: all cells of the report; those that are not measured stay empty.
        seeds: seeds of the report.
        path: Markdown file; plot and cells have the same name with the suffixes .svg and .json.
    """
    found = (runner.store.record(job.cell) for job in jobs)
    records = [record for record in found if record is not None]
    results = AccuracyResults(records, runner.setting, tuple(seeds))

    svg = chart.dots(
        chart.PERPLEXITIES,
        {task: {NAMES[name]: _points(results, task, name) for name in MODELS} for task in TASKS},
    )
    if svg:
        write_text(path.with_suffix(".svg"), svg)

    # The cells are committed with the page, so that the next run measures only what is missing.
    cells.publish(records, path.with_suffix(".json"))
    write_text(path, render(results, path.with_suffix(".svg").name if svg else None))
    return path


def render(results: AccuracyResults, plot: str | None = None) -> str:
    """Return the report as Markdown.

    Args:
        results: finished cells.
        plot: file name of the picture, None for none.
    """
    picture = [] if plot is None else [f"![Perplexity of every model, one mark per seed]({plot})"]
    # One section per part of the benchmark: a heading, a text, the tables.
    blocks = [
        "# Accuracy at 4 bits: PTQ and QAT compared", accuracy_text.introduction(), _provenance(results),
        "## At equal steps", accuracy_text.recovery(), *picture,
        _summary(results), _by_seed(results), _quality(results),
        accuracy_text.exact_match(results.setting.prompts), _exact_match(results),
        "## With more training", accuracy_text.steps(), _steps(results),
        "## One change at a time", accuracy_text.ablation(), _ablation(results),
        "## Other formulations", accuracy_text.formulation(), _formulations(results),
        "## Sources of the remaining loss", accuracy_text.remaining(), _remaining(results),
        "## Embedding and head", accuracy_text.tables(), _tables(results),
        "## Step time and memory", accuracy_text.cost(results.on_gpu), _cost(results),
        "## Settings", accuracy_text.settings(), _settings(),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def spread(values: Sequence[float | None], write: Callable[[float], str] = number) -> str:
    """Return mean and range, such as `18.1 (17.9 to 18.4; 3 seeds)`; missing values are left out."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    if any(map(math.isnan, known)):
        return NO_LOSS
    if len(known) == 1:
        return f"{write(known[0])} (1 seed)"
    return f"{write(mean(known))} ({write(min(known))} to {write(max(known))}; {len(known)} seeds)"


def one(value: float | None, write: Callable[[float], str] = number) -> str:
    """Return one figure as text."""
    if value is None:
        return MISSING
    return NO_LOSS if math.isnan(value) else write(value)


def _points(results: AccuracyResults, task: str, name: str) -> list[tuple[str, float]]:
    """(target, perplexity) of every seed; the FP32 fine-tune has marks in torch only."""
    targets = [TORCH] if name == FP32 else list(TARGETS)
    found = [(target, results.perplexity(target, task, seed, name)) for target in targets for seed in results.seeds]
    return [(target, value) for target, value in found if value is not None]


# --- tables --------------------------------------------------------------------------------------------------


def _provenance(results: AccuracyResults) -> str:
    setting = results.setting
    if not results.records:
        return f"Nothing has been measured yet (setting {setting.name})."
    rows = [
        ("setting", f"{setting.name}: N = {setting.steps} steps, {setting.tokens} compared tokens"),
        ("seeds", ", ".join(map(str, results.seeds))),
        ("tasks", ", ".join(TASKS)),
        *provenance(results.records),
    ]
    return table(("", ""), rows)


def _summary(results: AccuracyResults) -> str:
    rows = []
    for task in TASKS:
        for target, label in TARGETS.items():
            shares = [results.recovered(target, task, seed) for seed in results.seeds]
            qat = [results.perplexity(target, task, seed, RECOMMENDED) for seed in results.seeds]
            rows.append((task, label, spread(shares, percent), spread(qat)))
    return table(("task", "measured on", "recovered", "perplexity of QAT"), rows)


def _by_seed(results: AccuracyResults) -> str:
    rows = []
    for task in TASKS:
        for seed in results.seeds:
            for target, label in TARGETS.items():
                figures = [one(results.perplexity(target, task, seed, name)) for name in MODELS]
                recovered = one(results.recovered(target, task, seed), percent)
                rows.append((task, str(seed), label, *figures, recovered))
    return table(("task", "seed", "measured on", *(NAMES[name] for name in MODELS), "recovered"), rows)


def _quality(results: AccuracyResults) -> str:
    """KL and exact match of every model."""
    rows = []
    for task in TASKS:
        for name in MODELS:
            # The FP32 fine-tune is what KL is relative to; a task without answers has no exact match.
            kl = [_over_seeds(results, target, task, name, "kl_nats") for target in TARGETS]
            match = [_over_seeds(results, target, task, name, "exact_match") for target in ARTIFACTS]
            divergences = ["reference"] * len(TARGETS) if name == FP32 else [spread(values) for values in kl]
            has_answers = TASKS[task].has_answers
            matches = [spread(values, percent) if has_answers else "no answers" for values in match]
            rows.append((task, NAMES[name], *divergences, *matches))
    labels = [f"KL, {label}" for label in TARGETS.values()]
    return table(("task", "model", *labels, "exact match, `.pte`", "exact match, ONNX folder"), rows)


def _exact_match(results: AccuracyResults) -> str:
    """Difference in exact match between QAT and the FP32 fine-tune, seed by seed."""
    rows = []
    for task in (name for name, task in TASKS.items() if task.has_answers):
        for target in ARTIFACTS:
            fp32, qat = (_over_seeds(results, target, task, name, "exact_match") for name in (FP32, RECOMMENDED))
            differences = [None if a is None or b is None else b - a for a, b in zip(fp32, qat, strict=True)]
            by_seed = [one(value, _points_signed) for value in differences]
            rows.append((TARGETS[target], task, *by_seed, spread(differences, _points_signed)))
    return table(("measured on", "task", *(f"seed {seed}" for seed in results.seeds), "mean"), rows)


def _points_signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _over_seeds(results: AccuracyResults, target: str, task: str, name: str, key: str) -> list[float | None]:
    found = (results.measured_on(target, task, seed, name) for seed in results.seeds)
    return [None if figures is None else figures.get(key) for figures in found]


def _steps(results: AccuracyResults) -> str:
    rows = []
    for task in results.setting.side_tasks:
        for factor in (1.0, *results.setting.factors):
            steps = round(factor * results.setting.steps)
            fp32, ptq, qat, shares = _columns([_at_steps(results, task, s, steps) for s in results.side_seeds], 4)
            figures = (spread(fp32), spread(ptq), spread(qat), spread(shares, percent))
            rows.append((task, f"{steps} ({factor:g} N)", *figures))
    return table(("task", "steps", "FP32 fine-tune", "better PTQ", "QAT", "recovered"), rows)


def _at_steps(results: AccuracyResults, task: str, seed: int, steps: int) -> list[float | None]:
    """Perplexity of FP32, of the better baseline and of QAT, and the recovery."""
    names = (FP32, RECOMMENDED, *BASELINES)
    fp32, qat, *ptq = (results.emulated_perplexity(task, seed, name, steps) for name in names)
    better = min((value for value in ptq if value is not None), default=None)
    return [fp32, better, qat, recovery(fp32, qat, ptq)]


def _columns(rows: Sequence[Sequence[float | None]], count: int) -> list[list[float | None]]:
    """Transpose rows into `count` columns, which are empty where there is no row."""
    return [[row[index] for row in rows] for index in range(count)]


def _ablation(results: AccuracyResults) -> str:
    setting, rows = results.setting, []
    for task in setting.side_tasks:
        for name in (RECOMMENDED, *settings.ablation_rows(len(settings.ABLATION))):
            overrides = settings.recipe(name, setting.steps)
            changed = ", ".join(f"`{key}={value}`" for key, value in overrides.items()) or "the defaults"

            values = [results.emulated_perplexity(task, seed, name, setting.steps) for seed in results.seeds]
            kl = _over_seeds(results, TORCH, task, name, "kl_nats")
            ratios = [
                one and other and one / other
                for one, other in zip(kl, _over_seeds(results, TORCH, task, RECOMMENDED, "kl_nats"), strict=True)
            ]
            shares = [_recovered_by(results, task, seed, name) for seed in results.seeds]
            title, compared = ("recommended", "") if name == RECOMMENDED else (name, spread(ratios))
            rows.append((task, title, changed, spread(values), spread(kl), compared, spread(shares, percent)))
    return table(("task", "recipe", "changed options", "perplexity", "KL", "of recommended", "recovered"), rows)


def _recovered_by(results: AccuracyResults, task: str, seed: int, name: str) -> float | None:
    """Recovery of one recipe in torch emulation."""
    steps = results.setting.steps
    fp32, qat, *ptq = (results.emulated_perplexity(task, seed, n, steps) for n in (FP32, name, *BASELINES))
    return recovery(fp32, qat, ptq)


def _formulations(results: AccuracyResults) -> str:
    rows = []
    for task in results.setting.side_tasks:
        for name, (tool, formula) in FORMULAS.items():
            found = [_formulation(results, task, seed, name) for seed in results.side_seeds]
            measured = [figures for figures in found if figures is not None]
            *columns, shares = _columns(measured, 4)
            rows.append((task, tool, formula, *map(spread, columns), spread(shares, percent)))
    return table(("task", "formulation", "forward", "as trained", "deployed", "difference", "recovered"), rows)


def _formulation(results: AccuracyResults, task: str, seed: int, name: str) -> list[float | None] | None:
    """Perplexity as trained and as deployed, their difference, and the recovery of the deployed model."""
    steps = results.setting.steps
    figures = results.find("formulation", task, seed, name, steps)
    if figures is None:
        return None
    trained, deployed = figures["trained"]["perplexity"], figures["deployed"]["perplexity"]
    fp32, *ptq = (results.emulated_perplexity(task, seed, n, steps) for n in (FP32, *BASELINES))
    return [trained, deployed, deployed - trained, recovery(fp32, deployed, ptq)]


def _remaining(results: AccuracyResults) -> str:
    rows = []
    for task in results.setting.side_tasks:
        by_seed = []
        for seed in results.side_seeds:
            fp32 = results.perplexity(TORCH, task, seed, FP32)
            found = results.find("remaining", task, seed, RECOMMENDED, results.setting.steps)
            if fp32 is not None and found is not None:
                by_seed.append([found[off]["perplexity"] - fp32 for off in SWITCHED_OFF])
        losses = _columns(by_seed, len(SWITCHED_OFF))
        rows.append((task, NAMES[RECOMMENDED], *map(spread, losses)))
    return table(("task", "model", *SWITCHED_OFF), rows)


def _tables(results: AccuracyResults) -> str:
    setting, rows = results.setting, []
    for task in setting.side_tasks:
        found = [results.find("tables", task, seed, RECOMMENDED, setting.steps) for seed in results.side_seeds]
        for bits in TABLE_BITS:
            figures = [
                [None if each is None else each[bits][key] for each in found] for key in ("perplexity", "kl_nats")
            ]
            rows.append((task, bits, *map(spread, figures)))
    return table(("task", "bits of embedding / head", "perplexity", "KL"), rows)


def _cost(results: AccuracyResults) -> str:
    rounds = [record["figures"] for record in results.records if record["cell"]["kind"] == "cost"]
    first, rows = next(iter(settings.COSTS)), []
    for name in settings.COSTS:
        times = [each[name]["step_s"] / each[first]["step_s"] for each in rounds]
        peaks = [each[name]["peak_bytes"] / each[first]["peak_bytes"] for each in rounds]
        rows.append((name, _ratio(times), _ratio(peaks)))
    return table(("scheme", "step time", "peak memory"), rows) + _absolute(rounds, first)


def _absolute(rounds: Sequence[Mapping[str, Any]], first: str) -> str:
    """Sentence about the scheme that the others are divided by; empty where nothing was measured."""
    if not rounds:
        return ""
    seconds, size = (median(each[first][key] for each in rounds) for key in ("step_s", "peak_bytes"))
    return f"\n\nOne step of {first}: {number(seconds)} s, {number(size / 1e9)} GB."


def _ratio(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f}; {_count(len(values), 'round')})"


def _settings() -> str:
    def row(title: str, value: Callable[[Setting], Any]) -> tuple[str, ...]:
        return title, *(str(value(setting)) for setting in SETTINGS.values())

    # A row is a title and what it shows of each setting.
    rows = [
        row("N, optimizer steps in all", lambda s: s.steps),
        row("compared tokens", lambda s: s.tokens),
        row("prompts answered, assistant", lambda s: s.prompts),
        row("PTQ exported next to QAT", lambda s: ", ".join(NAMES.get(m, "the better baseline") for m in s.exported)),
        row(
            "calibrated PTQ methods, and parts after the first",
            lambda s: f"{_count(s.side_seeds, 'seed')}, {' and '.join(s.side_tasks)}",
        ),
        row(
            "recipes of the ablation (`--recipes` for more)",
            lambda s: f"the first {s.ablation_rows}" if s.name == "reduced" else "all",
        ),
        row("cost", lambda s: f"{_count(s.cost_rounds, 'round')} of {s.cost_steps} timed steps"),
    ]

    batch = ", ".join(f"{t.name} {t.training['batch_size']} rows of up to {t.window} tokens" for t in TASKS.values())
    return table(("", *SETTINGS), rows) + f"\n\nBatch of one step: {batch}. All other options have their defaults."


def _count(count: int, word: str) -> str:
    return f"1 {word}" if count == 1 else f"{count} {word}s"
