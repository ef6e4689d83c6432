"""Trains and measures: every run is made by the product's own commands in a work folder, and found again there.

WORK/data/TASK/     train.jsonl, eval.jsonl       WORK/runs/...     one run folder a training
WORK/cells/         finished figures              WORK/logs/...     what the commands said

A QAT run and the plain LoRA run of the same task, seed and steps are joined in a third run folder: adapter of the one,
`reference/` of the other. So `quantize --method`, `export` and `validate` hold both against the same FP32 fine-tune,
which had all the steps, and PTQ is done to that.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import settings
from benchmarks.cells import Cell, CellStore, digest, slug
from benchmarks.settings import FP32, RECOMMENDED, Setting, Task
from qat_edge import config, progress
from qat_edge.config import FinetuneOptions
from qat_edge.data import tokenization
from qat_edge.data.calibration import USUAL_TOKENS
from qat_edge.data.formats import load_rows
from qat_edge.errors import QatEdgeError
from qat_edge.evaluate import reference, results
from qat_edge.evaluate.metrics import Comparison, LogitComparison
from qat_edge.evaluate.reference import LogitStore
from qat_edge.evaluate.results import Measured
from qat_edge.lazy import resolve
from qat_edge.models import merge
from qat_edge.quant.ptq.methods import CALIBRATED
from qat_edge.run import PTQ_METHODS, Run, replace_folder, sha256
from qat_edge.train.trainer import qat_learning_rate
from qat_edge.verbs.finetune import TRAINING_LOG
from qat_edge.verbs.quantize import QAT, quantize_if_missing

ROOT = Path(__file__).parents[1]
MAX_NEW_TOKENS = 64
# Options that plain LoRA never reads: whatever they are, it is the same cell.
PHASE_TWO = (
    "ptq_init", "rotate", "calibration_tokens", "scales", "scale_learning_rate", "distill_weight",
    "distill_temperature", "distill_top_k", "qat_learning_rate", "lr_restart",
)  # fmt: skip
PATHS = ("model", "data", "eval_data")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One training. recipe: "fp32", "qat" or a row of the ablation, or a formulation's name where `formulation`."""

    task: str
    seed: int
    steps: int
    recipe: str
    formulation: bool = False


@dataclass
class Lab:
    """Where and what everything is measured on. model: source of the base model; device: "cpu" or "cuda";
    published: the cells behind an earlier report."""

    work: Path
    model: str
    device: str
    setting: Setting
    keep: bool = False
    published: Path | None = None
    _yardstick: tuple[Training, Yardstick] | None = field(default=None, init=False)
    _fingerprint: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.work = self.work.resolve()

    @property
    def store(self) -> CellStore:
        return CellStore(self.work / "cells", self.published)

    @property
    def fingerprint(self) -> str:
        """What identifies the base model, wherever it lies: a hash of its weights, or a Hub id."""
        if not self._fingerprint:
            path = Path(self.model).expanduser()
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] * path.is_file()
            self._fingerprint = digest([sha256(file) for file in files]) if files else self.model
        return self._fingerprint

    def data(self, task: str) -> tuple[Path, Path]:
        """Training and evaluation rows of a task, written when first asked for."""
        folder = self.work / "data" / task
        paths = folder / "train.jsonl", folder / "eval.jsonl"
        if not all(path.is_file() for path in paths):
            module, _, function = settings.TASKS[task].write.partition(":")
            resolve({task: f"{module}:{function}"}, task, "task")(folder)
        return paths

    # --- training ------------------------------------------------------------------------------------------

    def options(self, training: Training) -> FinetuneOptions:
        """The training's options, all resolved."""
        task = settings.TASKS[training.task]
        overrides = settings.FORMULATION if training.formulation else settings.recipe(training.recipe, training.steps)
        given = {
            "model": self.model, "data": str(self.data(task.name)[0]), "steps": training.steps,
            "seed": training.seed, "device": self.device, "track": (), **task.training, **overrides,
        }  # fmt: skip
        return config.load(FinetuneOptions, "finetune", None, given)

    def identity(self, training: Training) -> Figures:
        """What decides the outcome of a training, without paths of this machine."""
        resolved = self.options(training)
        resolved = replace(resolved, qat_learning_rate=qat_learning_rate(resolved))  # as used
        options = {k: v for k, v in config.plain(resolved).items() if k not in PATHS}
        if training.recipe == FP32:
            options = {k: v for k, v in options.items() if k not in PHASE_TWO}
        elif options["ptq_init"] in CALIBRATED and options["calibration_tokens"] is None:
            options["calibration_tokens"] = USUAL_TOKENS
        if training.formulation:
            options["formulation"] = training.recipe
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.data(training.task)]
        return {"model": self.fingerprint, "data": digest(files), **options}

    def folder(self, training: Training, suffix: str = "") -> Path:
        """The run folder of a training."""
        recipe = slug(training.recipe) + ("_formulation" if training.formulation else "")
        name = f"{training.task}-{recipe}-seed{training.seed}-{training.steps}-{digest(self.identity(training))}"
        return self.work / "runs" / f"{name}{suffix}"

    def is_trained(self, training: Training) -> bool:
        """Whether the training has been finished; its log is the last thing that finetune writes."""
        return (self.folder(training) / TRAINING_LOG).is_file()

    def train(self, training: Training) -> Run:
        """The finished run of a training, gone on with or begun where it is not finished."""
        run = Run(self.folder(training))
        if self.is_trained(training):
            return run
        path = self.work / "configs" / f"{run.path.name}.yaml"
        config.save(path, "finetune", self.options(training))
        what = ["benchmarks.formulations", training.recipe, str(path), str(run.path)]
        if not training.formulation:
            what = ["qat_edge", "finetune", "--config", str(path), "--out", str(run.path)]
        begun = any(run.checkpoints.glob("checkpoint-*")) and run.config.is_file()
        how = ["--resume"] if begun else ["--force"] * run.path.exists()
        progress.info(f"  training {run.path.name}{' (resumed)' if begun else ''}")
        self.command([*what, *how], run.path.name)
        return run

    def joined(self, task: str, seed: int, steps: int, methods: Sequence[str]) -> Run:
        """The QAT run with the plain LoRA run of as many steps as its FP32 reference, and PTQ done to that."""
        qat = Training(task, seed, steps, RECOMMENDED)
        run = Run(self.folder(qat, "-joined"))
        tuned, trained = self.train(Training(task, seed, steps, FP32)), self.train(qat)
        parts = [trained.path / name for name in ("config.yaml", TRAINING_LOG, "adapter", "start", "quantized")]
        parts += [tuned.reference, *(self.post_training(tuned, method) for method in methods)]
        with replace_folder(run.path, force=True) as work:
            for part in parts:
                place = work / part.relative_to(tuned.path if tuned.path in part.parents else trained.path)
                if part.is_dir():
                    shutil.copytree(part, place)
                elif part.is_file():
                    shutil.copy(part, place)
        return run

    # --- measuring -----------------------------------------------------------------------------------------

    def yardstick(self, task: str, seed: int, steps: int) -> Yardstick:
        """The FP32 fine-tune of a task, seed and number of steps; one is kept at a time."""
        training = Training(task, seed, steps, FP32)
        if self._yardstick is None or self._yardstick[0] != training:
            self.tidy()
            run = self.train(training)
            stick = Yardstick(run.reference, self.data(task)[1], settings.TASKS[task], self.setting.tokens, self.work)
            self._yardstick = training, stick
        return self._yardstick[1]

    def close(self) -> None:
        """Free the disk of the last yardstick's logits."""
        if self._yardstick is not None:
            self._yardstick[1].close()
            self._yardstick = None

    def tidy(self) -> None:
        """Close, and remove what can be made again from the finished runs that were held against the yardstick."""
        if self._yardstick is None:
            return
        tuned = self._yardstick[0]
        self.close()
        runs = (self.work / "runs").glob(f"{tuned.task}-*-seed{tuned.seed}-{tuned.steps}-*/{TRAINING_LOG}")
        for log in () if self.keep else runs:
            for name in ("checkpoints", "quantized", "exports", "ptq"):
                shutil.rmtree(log.parent / name, ignore_errors=True)

    def frozen(self, run: Run) -> Path:
        """The run's own frozen checkpoint, made where it is missing."""
        return quantize_if_missing(run, QAT).quantized

    def post_training(self, run: Run, method: str) -> Path:
        """The frozen checkpoint of one PTQ method on the run's FP32 reference, made where it is missing."""
        return quantize_if_missing(run, method).quantized

    def validated(self, run: Run, methods: Sequence[str], task: Task) -> results.Report:
        """Export QAT and the PTQ methods to every target, run the artifacts, and return what validate reports."""
        path, setting = str(run.path), self.setting
        ptq = [word for method in methods or ("none",) for word in ("--ptq", method)]
        targets = [word for target in config.FORMATS for word in ("--target", target)]
        self.command(
            ["qat_edge", "export", path, *targets, *ptq, "--context-length", "512"],
            f"{run.path.name}-export",
        )
        self.command(
            [
                "qat_edge", "validate", path, "--force", "--eval-data", str(self.data(task.name)[1]),
                "--tokens", str(setting.tokens), "--window", str(task.window),
                "--prompts", str(setting.prompts if task.answered else 0), "--max-new-tokens", str(MAX_NEW_TOKENS),
                "--prefill", "32", "--decode", "8", "--repeats", "1", "--threads", str(torch.get_num_threads()),
            ],
            f"{run.path.name}-validate",
        )  # fmt: skip
        return results.load(run.reports / "local.json")

    def measured(self, cell: Cell, measure: Callable[[], Figures]) -> Figures:
        """The cell's figures, taken where they are not there yet."""
        found = self.store.get(cell)
        if found is not None:
            return found
        began = time.monotonic()
        figures = measure()
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else ""
        self.store.put(cell, figures, time.monotonic() - began, gpu)
        return figures

    def command(self, arguments: Sequence[str], log: str) -> None:
        """Run `python -m ...` and keep what it says.

        Raises:
            QatEdgeError: it failed; its last lines are quoted.
        """
        path = self.work / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"$ python -m {shlex.join(arguments)}\n")
            file.flush()
            code = subprocess.run(
                [sys.executable, "-m", *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code != 0:
            said = "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
            raise QatEdgeError(
                f"`python -m {' '.join(arguments[:2])}` ended with exit code {code}:\n{said}\nAll of it: {path}. "
                "What is finished is kept: run the benchmark again to go on."
            )


class Yardstick:
    """An FP32 fine-tune that models are held against, on the tokens that validate would compare."""

    def __init__(self, adapter: Path, eval_data: Path, task: Task, tokens: int, work: Path) -> None:
        merged = merge.merged_model(adapter)
        self.sequences = tokenization.scored_ids(
            load_rows(str(eval_data), "eval"), merged.tokenizer, task.window, tokens
        )
        work.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=".logits-", dir=work)
        self._logits = LogitStore(Path(self._scratch.name) / "fp32")
        reference.score(merged.model, self.sequences, self._logits, lambda done: None)

    def fp32(self) -> Figures:
        """The fine-tune itself."""
        comparison = LogitComparison()
        for index, sequence in enumerate(self.sequences):
            logits = self._logits.get(index)
            comparison.add(logits, logits, sequence.targets)
        return _figures(comparison.result())

    def compare(self, model: Any) -> Figures:
        """A model against the fine-tune: perplexity, KL, top-1 agreement, on equal token ids."""
        against = _Against(self._logits, self.sequences)
        reference.score(model, self.sequences, against, lambda done: None)
        return _figures(against.comparison.result())

    def close(self) -> None:
        """Remove the logits."""
        self._scratch.cleanup()


class _Against(LogitStore):
    """Takes logits as a store does, but compares them at once instead of keeping them."""

    def __init__(self, fp32: LogitStore, sequences: Sequence[tokenization.ScoredIds]) -> None:
        self.fp32, self.sequences, self.comparison = fp32, sequences, LogitComparison()

    def put(self, index: int, logits: NDArray[np.float32]) -> None:
        self.comparison.add(self.fp32.get(index), logits, self.sequences[index].targets)


def _figures(compared: Comparison) -> Figures:
    return {
        "perplexity": compared.perplexity,
        "kl_nats": compared.kl_nats,
        "top1": compared.top1_agreement,
        "sqnr_db": compared.sqnr_db if math.isfinite(compared.sqnr_db) else None,
        "tokens": compared.tokens,
    }


def artifact_rows(report: results.Report) -> list[Figures]:
    """What validate measured, a row a model and target, under this benchmark's names."""
    return [
        {
            "model": model_name(row),
            "target": row.target,
            "perplexity": row.perplexity,
            "kl_nats": row.agreement and row.agreement.kl_nats,
            "top1": row.agreement and row.agreement.top1,
            "exact_match": row.exact_match,
            "prompts": row.prompts,
            "size_bytes": row.total_bytes,
        }
        for row in report.measured
    ]


def model_name(row: Measured) -> str:
    """base, fp32, qat, or the PTQ method."""
    known = {"fp32 base": "base", "fp32 fine-tuned": FP32, "qat": RECOMMENDED}
    return (known | {f"ptq ({words})": method for method, words in PTQ_METHODS.items()})[row.name]
