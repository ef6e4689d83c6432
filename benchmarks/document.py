"""docs/accuracy.md and its plot, from the finished cells alone. A cell that is missing reads "not measured"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import cells, chart, settings
from benchmarks.lab import Figures, Lab
from benchmarks.page import MISSING, provenance, table
from benchmarks.plan import Job
from benchmarks.remaining import SWITCHED_OFF, TABLE_BITS
from benchmarks.settings import BASELINES, FP32, METHODS, RECOMMENDED, SETTINGS, TASKS, Setting
from qat_edge.report.figures import number, percent
from qat_edge.run import write_text

NO_LOSS = "PTQ loses nothing"
NAMES = {
    "base": "base", FP32: "FP32 fine-tune", "rtn": "round-to-nearest", "hqq": "HQQ", "gptq": "GPTQ", "gptaq": "GPTAQ",
    "coordinate-descent": "coordinate descent", "awq": "AWQ",
    RECOMMENDED: "QAT",
}  # fmt: skip
TORCH = "torch"
TARGETS = {TORCH: "torch, exact emulation", "executorch": "`.pte`", "onnx": "ONNX folder"}
ARTIFACTS = ("executorch", "onnx")
FORMULAS = {
    "merged": ("qat-edge", "`fq(W + s B A) x`"),
    "split": ("torchtune's QAT-LoRA", "`fq(W) x + s B A x`"),
    "separate": ("unsloth's", "`fq(W) x + s fq(B) fq(A) x`"),
}


@dataclass(frozen=True)
class Records:
    """The finished cells of one setting, by what they measured."""

    documents: Sequence[Figures]
    setting: Setting
    seeds: tuple[int, ...]

    def find(self, kind: str, task: str, seed: int, name: str, steps: int) -> Figures | None:
        """Figures of one cell, None where it has not been measured."""
        wanted = (kind, task, seed, name, steps)
        for document in self.documents:
            cell = document["cell"]
            if (cell["kind"], cell["task"], cell["seed"], cell["name"], cell["settings"]["steps"]) == wanted:
                return dict(document["figures"])
        return None

    def emulated(self, task: str, seed: int, name: str, steps: int | None = None) -> Figures | None:
        """One model in torch emulation."""
        return self.find("emulated", task, seed, name, self.setting.steps if steps is None else steps)

    def measured_on(self, target: str, task: str, seed: int, name: str) -> Figures | None:
        """One model as it ran on a target; the FP32 fine-tune runs in torch, whatever it is compared with."""
        if target == TORCH:
            return self.emulated(task, seed, name)
        found = self.find("artifacts", task, seed, RECOMMENDED, self.setting.steps)
        wanted = TORCH if name == FP32 else target
        rows = [] if found is None else found["rows"]
        return next((dict(row) for row in rows if (row["model"], row["target"]) == (name, wanted)), None)

    def perplexity(self, target: str, task: str, seed: int, name: str) -> float | None:
        """Perplexity of one model on a target."""
        found = self.measured_on(target, task, seed, name)
        return None if found is None else float(found["perplexity"])

    def recovered(self, target: str, task: str, seed: int) -> float | None:
        """Share of the PTQ loss that QAT wins back, one seed."""
        fp32, qat = (self.perplexity(target, task, seed, name) for name in (FP32, RECOMMENDED))
        return recovery(fp32, qat, self._ptq(target, task, seed))

    def _ptq(self, target: str, task: str, seed: int) -> list[float | None]:
        """Perplexities to recover from: of both baselines in torch, of those that were exported elsewhere."""
        names: Iterable[str] = BASELINES
        if target != TORCH:
            found = self.find("artifacts", task, seed, RECOMMENDED, self.setting.steps) or {}
            names = [name for name in found.get("methods", BASELINES) if name in BASELINES]
        return [self.perplexity(target, task, seed, name) for name in names]


def recovery(fp32: float | None, qat: float | None, ptq: Sequence[float | None]) -> float | None:
    """(ppl_ptq - ppl_qat) / (ppl_ptq - ppl_fp32), PTQ the better of those given.

    None where a figure is missing, not a number where PTQ loses nothing, so that there is nothing to win back.
    """
    known = [value for value in ptq if value is not None]
    if fp32 is None or qat is None or not known or len(known) < len(ptq):
        return None
    if min(known) <= fp32:
        return math.nan
    return (min(known) - qat) / (min(known) - fp32)


def write(lab: Lab, jobs: Sequence[Job], seeds: Sequence[int], path: Path) -> Path:
    """Write the report, its plot and its cells, of those that are finished."""
    documents = [found for job in jobs if (found := lab.store.document(job.cell)) is not None]
    records = Records(documents, lab.setting, tuple(seeds))
    svg = chart.dots(
        chart.PERPLEXITIES,
        {task: {NAMES[name]: _points(records, task, name) for name in (FP32, *METHODS, RECOMMENDED)} for task in TASKS},
    )
    if svg:
        write_text(path.with_suffix(".svg"), svg)
    cells.publish(documents, path.with_suffix(".json"))
    write_text(path, render(records, path.with_suffix(".svg").name if svg else None))
    return path


def render(records: Records, plot: str | None = None) -> str:
    """The report as Markdown. plot: file name of the picture, None for none."""
    picture = [] if plot is None else [f"![Perplexity of every model, one mark a seed]({plot})"]
    blocks = [
        "# What 4 bits cost, and what is won back", _introduction(records), _ran(records),
        "## At equal steps", _recovery_words(), *picture, _summary(records), _by_seed(records), _quality(records),
        _answers_words(records), _answers(records),
        "## With more training", _steps_words(), _steps(records),
        "## One switch at a time", _ablation_words(), _ablation(records),
        "## Other formulations", _formulation_words(), _formulations(records),
        "## What the remaining loss is made of", _remaining_words(), _remaining(records),
        "## Embedding and head", _tables_words(), _tables(records),
        "## Step time and memory", _cost_words(records), _cost(records),
        "## Settings", _settings_words(), _settings(),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def spread(values: Sequence[float | None], write: Callable[[float], str] = number) -> str:
    """`18.1 (17.9 to 18.4; 3 seeds)` of what was measured; how many seeds where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    if any(map(math.isnan, known)):
        return NO_LOSS
    if len(known) == 1:
        return f"{write(known[0])} (1 seed)"
    return f"{write(mean(known))} ({write(min(known))} to {write(max(known))}; {len(known)} seeds)"


def one(value: float | None, write: Callable[[float], str] = number) -> str:
    """One figure, or that there is none."""
    if value is None:
        return MISSING
    return NO_LOSS if math.isnan(value) else write(value)


def _points(records: Records, task: str, name: str) -> list[tuple[str, float]]:
    """(target, perplexity) of every seed."""
    found = [(target, records.perplexity(target, task, seed, name)) for target in TARGETS for seed in records.seeds]
    return [(target, value) for target, value in found if value is not None and (target == TORCH or name != FP32)]


# --- text ----------------------------------------------------------------------------------------------------


def _introduction(records: Records) -> str:
    return (
        "Written by `python -m benchmarks.accuracy` from the JSON of its cells; no figure here was typed by hand, and "
        f'"{MISSING}" stands where a cell is missing. Ranges are least to greatest over the seeds. Perplexity and KL '
        "are teacher-forced on held-out rows, where training puts loss; KL is in nats per token, against the FP32 "
        "fine-tune of the same task, seed and steps.\n\n"
        "The model is SmolLM2-135M-Instruct unless `--model` named another. Where the Hub cannot be reached its "
        "weights come from a 4-bit GGUF, so they lie on an asymmetric 4-bit grid already: what post-training "
        "quantization loses on them need not be what it loses on the original weights. All methods have that start."
    )


def _ran(records: Records) -> str:
    """What was run, from the cells themselves."""
    documents, setting = records.documents, records.setting
    if not documents:
        return f"Nothing has been measured yet (setting {setting.name})."
    rows = [
        ("setting", f"{setting.name}: N = {setting.steps} steps, {setting.tokens} compared tokens"),
        ("seeds", ", ".join(map(str, records.seeds))),
        ("tasks", ", ".join(TASKS)),
        *provenance(documents),
    ]
    return table(("", ""), rows)


def _recovery_words() -> str:
    return (
        "*Recovered* = (ppl_ptq - ppl_qat) / (ppl_ptq - ppl_fp32): the share of what post-training quantization loses "
        "that QAT keeps. ppl_ptq is the better of round-to-nearest and HQQ of the FP32 fine-tune, chosen for each "
        "seed; recovery is computed for each seed, then averaged. Both sides have the same number of optimizer steps "
        "in all: plain LoRA for all of them, or the recommended QAT (the defaults of `finetune`), whose phases share "
        "them. On the `.pte` and the ONNX folder PTQ and QAT are measured on the artifacts in their own runtimes, "
        "FP32 in torch."
    )


def _answers_words(records: Records) -> str:
    answers = records.setting.prompts
    return (
        "Exact match of QAT less that of the FP32 fine-tune of the same seed, in points. Two models that part on one "
        f"answer in ten differ by {100 * math.sqrt(0.1 / answers):.1f} by chance alone, one standard error of "
        f"{answers} answers."
    )


def _steps_words() -> str:
    return "FP32 and QAT both at more steps, in torch emulation: what is bought by more training is no recovery."


def _ablation_words() -> str:
    return (
        "The defaults of `finetune` with one thing changed, at N steps, in torch emulation. KL to the FP32 fine-tune "
        "tells recipes apart that the perplexity of so few tokens does not."
    )


def _formulation_words() -> str:
    return (
        "The same data, steps, seed, optimizer and rounding, no phases or distillation; only the forward pass of the "
        "adapted layers differs. *As trained* is the perplexity of that forward pass; *deployed* that of what ships: "
        "adapters merged, then rounded to nearest. The difference is what the training never saw."
    )


def _remaining_words() -> str:
    return (
        "Perplexity above the FP32 fine-tune's with parts of the rounding switched off, in torch emulation: weights "
        "(int4, all linear layers but the head), activations (int8 inputs of those), embedding (int8), head (int8 "
        "weight and input). What is off is as it was where plain LoRA ended; *all off* is that model, which has "
        "trained for fewer steps than the FP32 fine-tune."
    )


def _tables_words() -> str:
    return (
        "The QAT model with its embedding and its head rounded to other bits, in torch emulation: 8 is one scale a row "
        "(the default), 4 in groups as linear layers are (`finetune --embedding-bits 4 --head-bits 4`). The training "
        "knew 8 and 8. Both are frozen in it, so only the last adapters could have made up for the difference."
    )


def _cost_words(records: Records) -> str:
    kind = (
        "GPU memory allocated"
        if any(d["machine"].startswith("NVIDIA") for d in records.documents)
        else "resident memory"
    )
    return (
        f"Median step and peak {kind} of a process that makes a few steps, divided by plain LoRA's of the same round; "
        "the schemes of a round run one after the other. Least and greatest over the rounds in brackets."
    )


def _settings_words() -> str:
    return "What each `--setting` runs. `reduced` is for 2 cores (`--jobs 2`), `full` is for CUDA."


# --- tables --------------------------------------------------------------------------------------------------


def _summary(records: Records) -> str:
    rows = []
    for task in TASKS:
        for target, label in TARGETS.items():
            shares = [records.recovered(target, task, seed) for seed in records.seeds]
            qat = [records.perplexity(target, task, seed, RECOMMENDED) for seed in records.seeds]
            rows.append((task, label, spread(shares, percent), spread(qat)))
    return table(("task", "measured on", "recovered", "perplexity of QAT"), rows)


def _by_seed(records: Records) -> str:
    models = (FP32, *METHODS, RECOMMENDED)
    rows = []
    for task in TASKS:
        for seed in records.seeds:
            for target, label in TARGETS.items():
                figures = [one(records.perplexity(target, task, seed, name)) for name in models]
                recovered = one(records.recovered(target, task, seed), percent)
                rows.append((task, str(seed), label, *figures, recovered))
    return table(("task", "seed", "measured on", *(NAMES[name] for name in models), "recovered"), rows)


def _quality(records: Records) -> str:
    """KL and exact match of every model that was measured anywhere."""
    rows = []
    for task in TASKS:
        for name in (FP32, *METHODS, RECOMMENDED):
            kl = [_over_seeds(records, target, task, name, "kl_nats") for target in TARGETS if name != FP32]
            match = [_over_seeds(records, t, task, name, "exact_match") for t in ARTIFACTS]
            answers = [spread(values, percent) if TASKS[task].answered else "no answers" for values in match]
            rows.append((task, NAMES[name], *(map(spread, kl) if kl else ["reference"] * len(TARGETS)), *answers))
    labels = [f"KL, {label}" for label in TARGETS.values()]
    return table(("task", "model", *labels, "exact match, `.pte`", "exact match, ONNX folder"), rows)


def _answers(records: Records) -> str:
    rows = []
    for task in (name for name, task in TASKS.items() if task.answered):
        for target in ARTIFACTS:
            fp32, qat = (_over_seeds(records, target, task, name, "exact_match") for name in (FP32, RECOMMENDED))
            less = [None if a is None or b is None else b - a for a, b in zip(fp32, qat, strict=True)]
            rows.append((TARGETS[target], task, *(one(value, _signed) for value in less), spread(less, _signed)))
    return table(("measured on", "task", *(f"seed {seed}" for seed in records.seeds), "mean"), rows)


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _over_seeds(records: Records, target: str, task: str, name: str, key: str) -> list[float | None]:
    found = (records.measured_on(target, task, seed, name) for seed in records.seeds)
    return [None if figures is None else figures.get(key) for figures in found]


def _steps(records: Records) -> str:
    setting, rows = records.setting, []
    for task in setting.side_tasks:
        for factor in (1.0, *setting.factors):
            steps = round(factor * setting.steps)
            columns: dict[str, list[float | None]] = {name: [] for name in ("fp32", "ptq", "qat", "recovered")}
            for seed in records.seeds[: setting.side_seeds]:
                fp32, qat, *ptq = (_perplexity(records, task, seed, n, steps) for n in (FP32, RECOMMENDED, *BASELINES))
                known = [value for value in ptq if value is not None]
                found = {
                    "fp32": fp32,
                    "ptq": min(known, default=None),
                    "qat": qat,
                    "recovered": recovery(fp32, qat, ptq),
                }
                for name, value in found.items():
                    columns[name].append(value)
            figures = [spread(values, percent if name == "recovered" else number) for name, values in columns.items()]
            rows.append((task, f"{steps} ({factor:g} N)", *figures))
    return table(("task", "steps", "FP32 fine-tune", "better PTQ", "QAT", "recovered"), rows)


def _perplexity(records: Records, task: str, seed: int, name: str, steps: int) -> float | None:
    found = records.emulated(task, seed, name, steps)
    return None if found is None else float(found["perplexity"])


def _ablation(records: Records) -> str:
    setting, rows = records.setting, []
    for task in setting.side_tasks:
        seeds = records.seeds[: setting.side_seeds]
        for name in (RECOMMENDED, *settings.ablation_rows(len(settings.ABLATION))):
            over = settings.recipe(name, setting.steps)
            changed = ", ".join(f"`{key}={value}`" for key, value in over.items()) or "the defaults"
            values = [_perplexity(records, task, seed, name, setting.steps) for seed in seeds]
            kl = _over_seeds(records, TORCH, task, name, "kl_nats")[: setting.side_seeds]
            shares = [_recovered_by(records, task, seed, name) for seed in seeds]
            title = "recommended" if name == RECOMMENDED else name
            rows.append((task, title, changed, spread(values), spread(kl), spread(shares, percent)))
    return table(("task", "recipe", "set", "perplexity", "KL", "recovered"), rows)


def _recovered_by(records: Records, task: str, seed: int, name: str) -> float | None:
    steps = records.setting.steps
    fp32, qat, *ptq = (_perplexity(records, task, seed, n, steps) for n in (FP32, name, *BASELINES))
    return recovery(fp32, qat, ptq)


def _formulations(records: Records) -> str:
    setting, rows = records.setting, []
    for task in setting.side_tasks:
        for name, (tool, formula) in FORMULAS.items():
            columns: list[list[float | None]] = [[], [], [], []]
            for seed in records.seeds[: setting.side_seeds]:
                found = records.find("formulation", task, seed, name, setting.steps)
                if found is None:
                    continue
                trained, deployed = found["trained"]["perplexity"], found["deployed"]["perplexity"]
                fp32, *ptq = (_perplexity(records, task, seed, n, setting.steps) for n in (FP32, *BASELINES))
                share = recovery(fp32, deployed, ptq)
                for column, value in zip(columns, (trained, deployed, deployed - trained, share), strict=True):
                    column.append(value)
            figures = [spread(values) for values in columns[:3]]
            rows.append((task, tool, formula, *figures, spread(columns[3], percent)))
    return table(("task", "formulation", "forward", "as trained", "deployed", "difference", "recovered"), rows)


def _remaining(records: Records) -> str:
    setting, rows = records.setting, []
    for task in setting.side_tasks:
        seeds = records.seeds[: setting.side_seeds]
        fp32 = [records.perplexity(TORCH, task, seed, FP32) for seed in seeds]
        found = [records.find("remaining", task, seed, RECOMMENDED, setting.steps) for seed in seeds]
        pairs = list(zip(found, fp32, strict=True))
        lost = [
            spread([None if f is None or p is None else f[off]["perplexity"] - p for f, p in pairs])
            for off in SWITCHED_OFF
        ]
        rows.append((task, NAMES[RECOMMENDED], *lost))
    return table(("task", "model", *SWITCHED_OFF), rows)


def _tables(records: Records) -> str:
    setting, rows = records.setting, []
    for task in setting.side_tasks:
        for bits in TABLE_BITS:
            found = [
                records.find("tables", task, s, RECOMMENDED, setting.steps) for s in records.seeds[: setting.side_seeds]
            ]
            figures = [[None if f is None else f[bits][key] for f in found] for key in ("perplexity", "kl_nats")]
            rows.append((task, bits, *map(spread, figures)))
    return table(("task", "bits of embedding / head", "perplexity", "KL"), rows)


def _cost(records: Records) -> str:
    rounds = [d["figures"] for d in records.documents if d["cell"]["kind"] == "cost"]
    first, rows = next(iter(settings.COSTS)), []
    for name in settings.COSTS:
        times = [round_[name]["step_s"] / round_[first]["step_s"] for round_ in rounds]
        peaks = [round_[name]["peak_bytes"] / round_[first]["peak_bytes"] for round_ in rounds]
        rows.append((name, _ratio(times), _ratio(peaks)))
    return table(("scheme", "step time", "peak memory"), rows) + _absolute(rounds, first)


def _absolute(rounds: Sequence[Mapping[str, Any]], first: str) -> str:
    if not rounds:
        return ""
    seconds, size = (median(r[first][key] for r in rounds) for key in ("step_s", "peak_bytes"))
    return f"\n\nOne step of {first}: {number(seconds)} s, {number(size / 1e9)} GB."


def _ratio(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f}; {_count(len(values), 'round')})"


def _settings() -> str:
    def row(words: str, value: Callable[[Setting], Any]) -> tuple[str, ...]:
        return words, *(str(value(setting)) for setting in SETTINGS.values())

    rows = [
        row("N, optimizer steps in all", lambda s: s.steps),
        row("compared tokens", lambda s: s.tokens),
        row("answered prompts, assistant", lambda s: s.prompts),
        row("PTQ exported beside QAT", lambda s: ", ".join(NAMES.get(m, "the better baseline") for m in s.exported)),
        row(
            "calibrated PTQ methods, and parts after the first",
            lambda s: f"{_count(s.side_seeds, 'seed')}, {_list(s.side_tasks)}",
        ),
        row(
            "recipes of the ablation (`--recipes` for more)",
            lambda s: f"the first {s.ablation_rows}" if s.name == "reduced" else "all",
        ),
        row("cost", lambda s: f"{s.cost_rounds} rounds of {s.cost_steps} timed steps"),
    ]
    batch = ", ".join(f"{t.name} {t.training['batch_size']} rows of up to {t.window} tokens" for t in TASKS.values())
    return table(("", *SETTINGS), rows) + f"\n\nA step takes: {batch}. Everything else is the default of `finetune`."


def _count(count: int, word: str) -> str:
    return f"1 {word}" if count == 1 else f"{count} {word}s"


def _list(names: Sequence[str]) -> str:
    return " and ".join(names)
