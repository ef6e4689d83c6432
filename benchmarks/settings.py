"""Tasks, training recipes and amounts of the accuracy benchmark. To change what is run, edit this file only.

Recipes are overrides of FinetuneOptions' defaults; `check_recipes` refuses an unknown option or value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qat_edge import config
from qat_edge.errors import UsageError
from qat_edge.options import QAT_START, FinetuneOptions

Overrides = Mapping[str, Any]

RECOMMENDED = "qat"  # no overrides: the defaults of finetune
FP32 = "fp32"
# For plain LoRA, "qat_start" is set to the number of steps, so that QAT never begins and needs no preparation.
PLAIN_LORA: Overrides = {"scales": "absmax", "ptq_init": "none", "distill_weight": 0.0, "distill_top_k": 0}
# The formulations are compared by their forward pass alone: every other part of QAT is off, and the learning rate is
# that of plain LoRA from the first step to the last.
FORMULATION: Overrides = {**PLAIN_LORA, "qat_start": 0.0, "lr_restart": False}
# As "qat_start": a step that no training reaches, so that PTQ initialization runs after the last step and is exported.
AFTER_ALL = 1e6
# PTQ initialization changes the base model, so the teacher's outputs have to be stored before it: top-k logits.
_STORED_TEACHER: Overrides = {"distill_top_k": 64}

# One change at a time against the defaults, the most informative first: the reduced setting runs the first few. A
# recipe that equals the defaults is left out of the run.
ABLATION: Mapping[str, Overrides] = {
    "embedding and head in 4 bits": {"embedding_bits": 4, "head_bits": 4},
    "no rotation": {"rotate": "off"},
    "no PTQ initialization": {"ptq_init": "none"},
    "no QAT: PTQ initialization after the last step": {"qat_start": AFTER_ALL},
    "QAT after three quarters of the steps": {"qat_start": 0.75},
    "GPTAQ initialization": {"ptq_init": "gptaq"},
    "scales fixed after initialization": {"scales": "fixed"},
    "absmax scales, no PTQ initialization": {"scales": "absmax", "ptq_init": "none"},
    "distillation, half the loss": {"distill_weight": 0.5, **_STORED_TEACHER},
    "QAT after a quarter of the steps": {"qat_start": 0.25},
    "QAT after half of the steps": {"qat_start": 0.5},
    "QAT after nine tenths of the steps": {"qat_start": 0.9},
    "QAT from the first step": {"qat_start": 0.0},
    "learning rate restarted": {"lr_restart": True},
    "one learning rate schedule": {"lr_restart": False},
    "learning rate of QAT 3e-4": {"qat_learning_rate": 3e-4},
    "learning rate of QAT 1e-3": {"qat_learning_rate": 1e-3},
    "learning rate of the scales 1e-3": {"scale_learning_rate": 1e-3},
    "learning rate of the scales 2e-2": {"scale_learning_rate": 2e-2},
    "GPTQ initialization": {"ptq_init": "gptq"},
    "AWQ initialization": {"ptq_init": "awq"},
    "HQQ initialization": {"ptq_init": "hqq"},
    "no distillation": {"distill_weight": 0.0, "distill_top_k": 0},
    "distillation only": {"distill_weight": 1.0, **_STORED_TEACHER},
    "QAT from the first step and nothing else": FORMULATION,
}

# Models of `benchmarks.frontier`: each scheme with PTQ alone, after the last step, and with QAT for half of the steps,
# or for a tenth, as in finetune at 4 bits.
PTQ = "PTQ"
FRONTIER_TOKENS = 16384
SCHEMES: Mapping[str, Overrides] = {
    "4 bits": {},
    "4 bits, groups of 64": {"group_size": 64},
    "4 bits, embedding and head too": {"embedding_bits": 4, "head_bits": 4},
    "2 bits": {"weight_bits": 2},
    "2 bits, groups of 64": {"weight_bits": 2, "group_size": 64},
}
FINISHES: Mapping[str, Overrides] = {
    PTQ: {"qat_start": AFTER_ALL, "codes": "trained"},
    "QAT": {"qat_start": 0.5, "codes": "trained"},
    "QAT for a tenth": {"qat_start": 0.9, "codes": "trained"},
    "QAT of scales": {"qat_start": 0.5, "codes": "fixed"},
}
# QAT of weights at 2 bits diverges at the rate of 4 bits.
_RATES: Mapping[str, Overrides] = {"2 bits": {"qat_learning_rate": 5e-5}}


def _frontier() -> Iterator[tuple[str, Overrides]]:
    for scheme, changes in SCHEMES.items():
        for finish, recipe in FINISHES.items():
            rates = _RATES.get(scheme.split(",")[0], {}) if recipe["codes"] == "trained" and finish != PTQ else {}
            yield f"{scheme}, {finish}", {"calibration_tokens": FRONTIER_TOKENS, **changes, **recipe, **rates}


FRONTIER: Mapping[str, Overrides] = dict(_frontier())


# Of benchmarks/function_calling.py, next to the defaults.
LONG_QAT = "QAT for half of the steps"
CALLS_QAT: Mapping[str, Overrides] = {LONG_QAT: {"qat_start": 0.5}}


def is_guarded(recipe: str) -> bool:
    """Return whether QAT of a recipe is guarded, on rows that are neither trained nor asked."""
    return recipe in CALLS_QAT or (recipe in FRONTIER and FRONTIER[recipe]["qat_start"] != AFTER_ALL)


# Step time and peak memory are measured for these schemes, one after the other; the first is the unit of the others.
LORA = "plain LoRA"
COSTS: Mapping[str, Overrides] = {
    LORA: PLAIN_LORA,
    "QAT": PLAIN_LORA,
    "QAT, learned scales": {**PLAIN_LORA, "scales": "learned"},
    "QAT, distillation": {**PLAIN_LORA, "distill_weight": 0.5},
    "QAT, recommended": {},
}

PARTS = ("main", "steps", "ablation", "formulations", "remaining", "tables", "cost")
BASELINES = ("rtn", "hqq")  # recovery is relative to the better of these two
METHODS = (*BASELINES, "gptq", "gptaq", "coordinate-descent", "awq")


@dataclass(frozen=True)
class Task:
    """Data set of the benchmark, and the options that depend on it.

    Attributes:
        name: as in cells and reports.
        write: "module:function" that writes train.jsonl and eval.jsonl into a folder.
        training: overrides of FinetuneOptions.
        window: tokens of context in a compared sequence.
        has_answers: each row has one right answer, so exact match can be measured.
        step_tokens: about how many tokens an optimizer step takes, padding included; for time estimates.
    """

    name: str
    write: str
    training: Mapping[str, Any]
    window: int
    has_answers: bool
    step_tokens: int


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "python-reference", "qat_edge.demo_data.python_reference:write",
            {"batch_size": 8, "max_length": 128}, window=128, has_answers=False, step_tokens=1024,
        ),
        Task(
            "assistant", "qat_edge.demo_data.assistant:write",
            {"batch_size": 8, "max_length": 128}, window=128, has_answers=True, step_tokens=512,
        ),
    )
}  # fmt: skip
# Of benchmarks/function_calling.py alone.
CALLS = Task(
    "function-calls", "benchmarks.function_calling:write_rows",
    {"batch_size": 4, "max_length": 1024}, window=1024, has_answers=True, step_tokens=1300,
)  # fmt: skip


def task_named(name: str) -> Task:
    """Return one of TASKS, or CALLS."""
    return CALLS if name == CALLS.name else TASKS[name]


@dataclass(frozen=True)
class Setting:
    """Amounts of one benchmark run.

    The main table covers every task and seed. Calibrated PTQ methods and the other parts cover `side_tasks` and the
    first `side_seeds` seeds.

    Attributes:
        name: as given to `--setting`.
        steps: N, optimizer steps in all.
        tokens: compared tokens of each model.
        prompts: prompts generated for exact match.
        exported: PTQ methods exported next to QAT; "better" for the better baseline of each seed.
        factors: multiples of N for the table with more training.
        side_tasks: tasks of the parts after the first.
        side_seeds: seeds of the parts after the first.
        ablation_rows: recipes of the ablation that are run.
        cost_rounds: rounds of the cost measurement.
        cost_steps: timed steps in each of them.
        lora_step_s: seconds of a plain LoRA step of 1024 tokens; this and the following are for time estimates only.
        qat_step_s: seconds of a QAT step of 1024 tokens.
        calibrate_s: seconds of a calibrated PTQ method on the whole model.
    """

    name: str
    steps: int
    tokens: int
    prompts: int
    exported: tuple[str, ...]
    factors: tuple[float, ...]
    side_tasks: tuple[str, ...]
    side_seeds: int
    ablation_rows: int
    cost_rounds: int
    cost_steps: int
    lora_step_s: float
    qat_step_s: float
    calibrate_s: float


BETTER = "better"
SETTINGS: Mapping[str, Setting] = {
    "reduced": Setting(
        name="reduced", steps=36, tokens=2048, prompts=400, exported=(BETTER,), factors=(1.5, 2.0),
        side_tasks=("python-reference",), side_seeds=1, ablation_rows=2, cost_rounds=1, cost_steps=3,
        lora_step_s=2.0, qat_step_s=2.9, calibrate_s=100.0,
    ),
    "full": Setting(
        name="full", steps=200, tokens=8192, prompts=400, exported=BASELINES, factors=(1.5, 2.0),
        side_tasks=tuple(TASKS), side_seeds=3, ablation_rows=len(ABLATION), cost_rounds=5, cost_steps=20,
        lora_step_s=0.1, qat_step_s=0.2, calibrate_s=30.0,
    ),
}  # fmt: skip


def check_recipes() -> None:
    """Check every override of this file against FinetuneOptions.

    Raises:
        UsageError: an override that is no option, a value that the option does not take, or a combination that
            finetune refuses.
    """
    tables = {
        "ABLATION": ABLATION,
        "FRONTIER": FRONTIER,
        "CALLS_QAT": CALLS_QAT,
        "COSTS": COSTS,
        "PLAIN_LORA": {FP32: PLAIN_LORA},
        "FORMULATION": {"": FORMULATION},
    }
    for table, recipes in tables.items():
        for name, overrides in recipes.items():
            check_overrides(f"benchmarks/settings.py {table} {name!r}", overrides)


def check_overrides(where: str, overrides: Overrides) -> None:
    """Check one recipe against FinetuneOptions.

    Raises:
        UsageError: as `check_recipes`; the message starts with `where`.
    """
    from qat_edge.train.option_checks import check_combination  # imports torch, which the command line does without

    known = [field.name for field in dataclasses.fields(FinetuneOptions)]
    for name in overrides:
        if name not in known:
            raise UsageError(f"{where}: finetune has no option {name!r}. It has {', '.join(known)}.")
    try:
        given = {"model": "m", "data": "d", "steps": 1, **_at_the_end(overrides, 1)}
        check_combination(config.load(FinetuneOptions, "finetune", None, given))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def recipe(name: str, steps: int) -> dict[str, Any]:
    """Return the overrides of a recipe: "fp32", "qat", or a row of ABLATION, FRONTIER or CALLS_QAT."""
    if name == FP32:
        return {**PLAIN_LORA, "qat_start": float(steps)}
    return {} if name == RECOMMENDED else _at_the_end({**ABLATION, **FRONTIER, **CALLS_QAT}[name], steps)


def _at_the_end(overrides: Overrides, steps: int) -> dict[str, Any]:
    """Return overrides with the number of steps in place of AFTER_ALL."""
    return {**overrides, "qat_start": float(steps)} if overrides.get("qat_start") == AFTER_ALL else dict(overrides)


def ablation_rows(rows: int) -> list[str]:
    """Return the first `rows` recipes of ABLATION that differ from the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneOptions)}
    defaults |= {"qat_start": QAT_START, "codes": "trained"}  # at 4 bits
    changed = [name for name, over in ABLATION.items() if any(defaults[k] != v for k, v in over.items())]
    return changed[:rows]
