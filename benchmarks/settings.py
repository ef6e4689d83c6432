"""What the benchmark runs: tasks, training recipes, and how much of everything in each setting. The only place to edit.

Recipes are overrides of FinetuneOptions' defaults; `check_recipes` refuses a name or value that it does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qat_edge import config
from qat_edge.config import FinetuneOptions
from qat_edge.errors import UsageError

Overrides = Mapping[str, Any]

RECOMMENDED = "qat"  # no overrides: the defaults of finetune
FP32 = "fp32"
# Phase 1 takes all the steps ("qat_start" is set to their number): plain LoRA, and nothing of phase 2 is prepared.
PLAIN_LORA: Overrides = {"scales": "absmax", "ptq_init": "none", "distill_weight": 0.0, "distill_top_k": 0}
# The formulations differ in the forward pass alone: everything else that QAT may add is off, and plain LoRA's learning
# rate is theirs from the first step to the last.
FORMULATION: Overrides = {**PLAIN_LORA, "qat_start": 0.0, "lr_restart": False}
AFTER_ALL = 1e6  # of qat_start: a step that no training reaches, so that the start is made at the end and ships
# distill_top_k: a start that changes the base wants the teacher asked beforehand.
_TAUGHT: Overrides = {"distill_top_k": 64}

# One switch at a time against the defaults, most telling first: the reduced setting stops after a few. An override
# that is the default already is left out when the table is run.
ABLATION: Mapping[str, Overrides] = {
    "hidden states not turned": {"rotate": "off"},
    "no PTQ start": {"ptq_init": "none"},
    "no QAT: the start after all steps": {"qat_start": AFTER_ALL},
    "QAT after three quarters of the steps": {"qat_start": 0.75},
    "GPTAQ start": {"ptq_init": "gptaq"},
    "scales fixed at the start": {"scales": "fixed"},
    "scales of the largest weights, no PTQ start": {"scales": "absmax", "ptq_init": "none"},
    "distillation, half the loss": {"distill_weight": 0.5, **_TAUGHT},
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
    "GPTQ start": {"ptq_init": "gptq"},
    "AWQ start": {"ptq_init": "awq"},
    "HQQ start": {"ptq_init": "hqq"},
    "no distillation": {"distill_weight": 0.0, "distill_top_k": 0},
    "distillation alone": {"distill_weight": 1.0, **_TAUGHT},
    "QAT from the first step and nothing else": FORMULATION,
}

# Step time and peak memory are measured for these, in alternation; the first is what the others are divided by.
LORA = "plain LoRA"
COSTS: Mapping[str, Overrides] = {
    LORA: PLAIN_LORA,
    "QAT": PLAIN_LORA,
    "QAT, learned scales": {**PLAIN_LORA, "scales": "learned"},
    "QAT, distillation": {**PLAIN_LORA, "distill_weight": 0.5},
    "QAT, recommended": {},
}

PARTS = ("main", "steps", "ablation", "formulations", "remaining", "tables", "cost")
BASELINES = ("rtn", "hqq")  # recovery is counted against the better of these
METHODS = (*BASELINES, "gptq", "gptaq", "coordinate-descent", "awq")


@dataclass(frozen=True)
class Task:
    """Data and what depends on it. write: "module:function" that writes train.jsonl and eval.jsonl into a folder.

    window: tokens of context in a compared sequence. answered: whether its rows have one right answer.
    """

    name: str
    write: str
    training: Mapping[str, Any]
    window: int
    answered: bool
    step_tokens: int  # about, with padding


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "python-reference", "qat_edge.demo_data.python_reference:write",
            {"batch_size": 8, "max_length": 128}, window=128, answered=False, step_tokens=1024,
        ),
        Task(
            "assistant", "qat_edge.demo_data.assistant:write",
            {"batch_size": 8, "max_length": 128}, window=128, answered=True, step_tokens=512,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How much is run. steps: N, optimizer steps in all; factors: multiples of N beside it.

    tokens: compared in each model. prompts: answered for exact match. exported: PTQ methods beside QAT, "better"
    for the better baseline of each seed. The main table has every task and seed; calibrated methods and the other parts
    have side_tasks and the first side_seeds of the seeds.
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
    lora_step_s: float  # of 1024 tokens; these three are for the estimate of time alone
    qat_step_s: float
    calibrate_s: float  # a calibrated PTQ method on the whole model


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
    """Hold every override of this file against FinetuneOptions.

    Raises:
        UsageError: an override that is no option, a value that the option does not take, or a combination that
            finetune refuses.
    """
    tables = {"ABLATION": ABLATION, "COSTS": COSTS, "PLAIN_LORA": {FP32: PLAIN_LORA}, "FORMULATION": {"": FORMULATION}}
    for table, recipes in tables.items():
        for name, overrides in recipes.items():
            check_overrides(f"benchmarks/settings.py {table} {name!r}", overrides)


def check_overrides(where: str, overrides: Overrides) -> None:
    """Hold one recipe against FinetuneOptions.

    Raises:
        UsageError: as `check_recipes`; the message starts with `where`.
    """
    from qat_edge.train.phases import check_combination  # imports torch, which the command line does without

    known = [field.name for field in dataclasses.fields(FinetuneOptions)]
    for name in overrides:
        if name not in known:
            raise UsageError(f"{where}: finetune has no option {name!r}. It has {', '.join(known)}.")
    try:
        check_combination(config.load(FinetuneOptions, "finetune", None, {"model": "m", "data": "d", **overrides}))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def recipe(name: str, steps: int) -> dict[str, Any]:
    """Overrides of a recipe by name: "fp32", "qat", or a row of ABLATION."""
    if name == FP32:
        return {**PLAIN_LORA, "qat_start": float(steps)}
    overrides = {} if name == RECOMMENDED else dict(ABLATION[name])
    return {**overrides, "qat_start": float(steps)} if overrides.get("qat_start") == AFTER_ALL else overrides


def ablation_rows(rows: int) -> list[str]:
    """The first `rows` of ABLATION that change anything against the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneOptions)}
    changed = [name for name, over in ABLATION.items() if any(defaults[k] != v for k, v in over.items())]
    return changed[:rows]
