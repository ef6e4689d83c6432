"""Train and measure for the accuracy benchmark, with the product's own commands, in a work folder.

    WORK/data/TASK/   train.jsonl, eval.jsonl and guard.jsonl
    WORK/runs/...     one run folder per training
    WORK/cells/       finished figures
    WORK/logs/...     output of the commands

PTQ and QAT have to be compared with the same FP32 fine-tune, which had all the steps. So a QAT run and the plain LoRA
run of the same task, seed and steps are joined in a third run folder: the adapter of the first, `reference/` of the
second. `quantize --method`, `export` and `validate` then work on that folder as on any run.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import settings
from benchmarks.cells import Cell, CellStore, digest, slug
from benchmarks.settings import FP32, RECOMMENDED, Setting, Task
from qat_edge import config, progress
from qat_edge.data import tokenization
from qat_edge.data.calibration import DEFAULT_CALIBRATION_TOKENS
from qat_edge.data.formats import load_rows
from qat_edge.errors import QatEdgeError
from qat_edge.evaluate import results
from qat_edge.evaluate.metrics import LogitComparison, LogitMetrics
from qat_edge.evaluate.reference import LogitStore, score
from qat_edge.evaluate.results import Measurement
from qat_edge.lazy import load
from qat_edge.manifest import sha256
from qat_edge.models import merge
from qat_edge.models.demo_model import fetch_demo_model
from qat_edge.options import DEFAULT_FORMATS, FinetuneOptions
from qat_edge.quant.ptq.method_names import CALIBRATED, PTQ_METHODS, QAT
from qat_edge.run import Run
from qat_edge.storage import replace_folder, write_text
from qat_edge.train.trainer import qat_learning_rate
from qat_edge.train.training_log import TRAINING_LOG
from qat_edge.verbs.quantize import quantize_if_missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
MAX_NEW_TOKENS = 64
QUOTED_LINES = 8  # of a failed command's output
# Options that plain LoRA never reads. They are no part of its identity, so changing them does not measure it again.
QAT_ONLY_OPTIONS = (
    "ptq_init", "rotate", "calibration_tokens", "scales", "scale_learning_rate", "distill_weight",
    "distill_temperature", "distill_top_k", "qat_learning_rate", "lr_restart",
)  # fmt: skip
# Options that came after the first published cells, with the values by which a training is what it was without them.
LATER_OPTIONS = {
    "weight_bits": 4, "weight_levels": None, "clip_gradients": "together", "codes": "trained", "frozen_base": None,
    "packing": False, "streaming": False, "optimizer": "adamw", "shard_base": False,
}  # fmt: skip
PATH_OPTIONS = ("model", "data", "eval_data")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One training of the benchmark.

    Attributes:
        task: name of a task in settings.
        seed: of data order and initial adapters.
        steps: optimizer steps in all.
        recipe: "fp32", "qat" or a row of settings.ABLATION; where `formulation` is set, the name of a formulation.
        formulation: train with another tool's forward pass, see benchmarks/formulations.py.
    """

    task: str
    seed: int
    steps: int
    recipe: str
    formulation: bool = False


class TaskData(NamedTuple):
    """Files of a task's rows: for training, for measuring, and for the guard of QAT."""

    train: Path
    eval: Path
    guard: Path


@dataclass
class BenchmarkRunner:
    """Trains, exports and measures in one work folder. Everything finished is found again there.

    Attributes:
        work: work folder.
        model: source of the base model: a folder, a file or a Hub id.
        device: "cpu" or "cuda".
        setting: how much is run.
        keep: keep checkpoints and artifacts of finished runs.
        published: cells of an earlier report, which are not measured again; None for none.
    """

    work: Path
    model: str
    device: str
    setting: Setting
    keep: bool = False
    published: Path | None = None
    _reference: tuple[Training, Reference] | None = field(default=None, init=False)
    _fingerprint: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.work = self.work.resolve()

    @classmethod
    def of_page(cls, work: Path, page: Path) -> BenchmarkRunner:
        """Return a runner of the demo's model on the CPU that finds the cells behind a page again.

        Raises:
            QatEdgeError: A recipe of the settings is not possible, or the model cannot be downloaded.
        """
        settings.check_recipes()
        model = str(Path(fetch_demo_model(ROOT / ".cache" / "qat-edge")).resolve())
        return cls(work, model, "cpu", settings.SETTINGS["reduced"], published=page.with_suffix(".json"))

    @property
    def store(self) -> CellStore:
        """Finished cells of the work folder, and of the earlier report."""
        return CellStore(self.work / "cells", self.published)

    @property
    def fingerprint(self) -> str:
        """Identity of the base model wherever it is stored: a hash of its weights, or its Hub id."""
        if not self._fingerprint:
            path = Path(self.model).expanduser()
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] * path.is_file()
            self._fingerprint = digest([sha256(file) for file in files]) if files else self.model
        return self._fingerprint

    def data(self, task: str) -> TaskData:
        """Return the rows of a task; they are generated at the first call."""
        folder = self.work / "data" / task
        paths = TaskData(folder / "train.jsonl", folder / "eval.jsonl", folder / "guard.jsonl")
        if not all(path.is_file() for path in paths):
            load(settings.task_named(task).write)(folder)
            if not paths.guard.is_file():
                rows = paths.eval.read_text(encoding="utf-8").splitlines(keepends=True)
                write_text(paths.guard, "".join(rows[len(rows) // 2 :]))
        return paths

    # --- training ------------------------------------------------------------------------------------------

    def options(self, training: Training) -> FinetuneOptions:
        """Return the complete options of a training."""
        task = settings.task_named(training.task)
        overrides = settings.FORMULATION if training.formulation else settings.recipe(training.recipe, training.steps)
        given = {
            "model": self.model, "data": str(self.data(task.name).train), "steps": training.steps,
            "seed": training.seed, "device": self.device, "track": (), **task.training, **overrides,
        }  # fmt: skip
        if settings.is_guarded(training.recipe):
            given["eval_data"] = str(self.data(task.name).guard)
        return config.load(FinetuneOptions, "finetune", None, given)

    def identity(self, training: Training) -> Figures:
        """Return everything that decides the outcome of a training, without paths of this machine."""
        # Defaults that depend on other options are resolved first: a changed rule has to be measured anew.
        resolved = self.options(training)
        resolved = replace(
            resolved,
            qat_learning_rate=qat_learning_rate(resolved),
            qat_start=resolved.start_of_qat,
            codes="fixed" if resolved.has_fixed_codes else "trained",
        )
        options = {
            name: value
            for name, value in config.plain(resolved).items()
            if name not in PATH_OPTIONS and not (name in LATER_OPTIONS and value == LATER_OPTIONS[name])
        }

        if training.recipe == FP32:
            options = {k: v for k, v in options.items() if k not in QAT_ONLY_OPTIONS}
        elif options["ptq_init"] in CALIBRATED and options["calibration_tokens"] is None:
            options["calibration_tokens"] = DEFAULT_CALIBRATION_TOKENS
        if training.formulation:
            options["formulation"] = training.recipe

        # Model and rows count by content, not by path.
        data = self.data(training.task)
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (data.train, data.eval)]
        guard = {"guard": sha256(data.guard)} if settings.is_guarded(training.recipe) else {}
        return {"model": self.fingerprint, "data": digest(files), **options, **guard}

    def folder(self, training: Training, suffix: str = "") -> Path:
        """Return the run folder of a training."""
        recipe = slug(training.recipe) + ("_formulation" if training.formulation else "")
        name = f"{training.task}-{recipe}-seed{training.seed}-{training.steps}-{digest(self.identity(training))}"
        return self.work / "runs" / f"{name}{suffix}"

    def is_trained(self, training: Training) -> bool:
        """Return whether a training is finished; its log is the last file that finetune writes."""
        return (self.folder(training) / TRAINING_LOG).is_file()

    def train(self, training: Training) -> Run:
        """Return the finished run of a training; start or resume it where it is not finished."""
        run = Run(self.folder(training))
        if self.is_trained(training):
            return run
        path = self.work / "configs" / f"{run.path.name}.yaml"
        config.save(path, "finetune", self.options(training))

        command = ["qat_edge", "finetune", "--config", str(path), "--out", str(run.path)]
        if training.formulation:
            command = ["benchmarks.formulations", training.recipe, str(path), str(run.path)]

        # A folder without a checkpoint cannot be resumed, so it is replaced.
        can_resume = any(run.checkpoints.glob("checkpoint-*")) and run.config.is_file()
        flags = ["--resume"] if can_resume else ["--force"] * run.path.exists()
        progress.info(f"  training {run.path.name}{' (resumed)' if can_resume else ''}")
        self.command([*command, *flags], run.path.name)
        return run

    def joined(self, task: str, seed: int, steps: int, methods: Sequence[str], keep: bool = False) -> Run:
        """Return a run of the QAT model whose FP32 reference is the plain LoRA run of as many steps.

        Args:
            task: name of a task in settings.
            seed: of both trainings.
            steps: optimizer steps of each.
            methods: PTQ methods whose checkpoints of the FP32 reference belong to the run as well.
            keep: return the folder that is there, with the exports and answers of an interrupted measurement.
        """
        qat = Training(task, seed, steps, RECOMMENDED)
        run = Run(self.folder(qat, "-joined"))
        if keep and run.path.is_dir():
            return run
        fp32_run, qat_run = self.train(Training(task, seed, steps, FP32)), self.train(qat)

        # The model from the QAT run; reference and PTQ checkpoints from the plain LoRA run.
        parts = [qat_run.path / name for name in ("config.yaml", TRAINING_LOG, "adapter", "start", "quantized")]
        parts += [fp32_run.reference, *(self.post_training(fp32_run, method) for method in methods)]
        with replace_folder(run.path, force=True) as work:
            for part in parts:
                source = fp32_run.path if fp32_run.path in part.parents else qat_run.path
                target = work / part.relative_to(source)
                if part.is_dir():
                    shutil.copytree(part, target)
                elif part.is_file():
                    shutil.copy(part, target)
        return run

    # --- measuring -----------------------------------------------------------------------------------------

    def reference(self, task: str, seed: int, steps: int) -> Reference:
        """Return the FP32 fine-tune of a task, seed and number of steps. The last one is cached."""
        training = Training(task, seed, steps, FP32)
        if self._reference is None or self._reference[0] != training:
            # Jobs are sorted by fine-tune: after the last one of a fine-tune, its checkpoints are no longer needed.
            self.tidy()
            run = self.train(training)
            made = Reference(run.reference, self.data(task).eval, settings.TASKS[task], self.setting.tokens, self.work)
            self._reference = training, made
        return self._reference[1]

    def close(self) -> None:
        """Delete the cached reference's logits from the disk."""
        if self._reference is not None:
            self._reference[1].close()
            self._reference = None

    def tidy(self) -> None:
        """Close, and delete what can be made again from finished runs compared with the cached reference.

        Unfinished runs keep their checkpoints, so that they can be resumed.
        """
        if self._reference is None:
            return
        fp32 = self._reference[0]
        self.close()
        if self.keep:
            return
        for log in (self.work / "runs").glob(f"{fp32.task}-*-seed{fp32.seed}-{fp32.steps}-*/{TRAINING_LOG}"):
            for name in ("checkpoints", "quantized", "exports", "ptq"):
                shutil.rmtree(log.parent / name, ignore_errors=True)

    def frozen(self, run: Run) -> Path:
        """Return the run's own frozen checkpoint; make it where it is missing."""
        return quantize_if_missing(run, QAT).quantized

    def post_training(self, run: Run, method: str) -> Path:
        """Return the frozen checkpoint of a PTQ method on the run's FP32 reference; make it where it is missing."""
        return quantize_if_missing(run, method).quantized

    def validated(self, run: Run, methods: Sequence[str], task: Task) -> results.Report:
        """Export QAT and the PTQ methods to every target, run the artifacts, and return the report of validate."""
        # Speed is not reported here, so validate times as little as it can.
        path, setting = str(run.path), self.setting
        ptq = [word for method in methods or ("none",) for word in ("--ptq", method)]
        targets = [word for target in DEFAULT_FORMATS for word in ("--target", target)]
        self.command(
            ["qat_edge", "export", path, *targets, *ptq, "--context-length", "512"],
            f"{run.path.name}-export",
        )
        self.command(
            [
                "qat_edge", "validate", path, "--force", "--eval-data", str(self.data(task.name).eval),
                "--tokens", str(setting.tokens), "--window", str(task.window),
                "--prompts", str(setting.prompts if task.has_answers else 0), "--max-new-tokens", str(MAX_NEW_TOKENS),
                "--prefill", "32", "--decode", "8", "--repeats", "1", "--threads", str(torch.get_num_threads()),
            ],
            f"{run.path.name}-validate",
        )  # fmt: skip
        return results.load(run.reports / "local.json")

    def measure_once(self, cell: Cell, measure: Callable[[], Figures]) -> Figures:
        """Return the figures of a cell; call `measure` and store its result only where they are missing."""
        found = self.store.get(cell)
        if found is not None:
            return found
        began = time.monotonic()
        figures = measure()
        gpu = torch.cuda.get_device_name() if self.device == "cuda" else ""
        self.store.put(cell, figures, time.monotonic() - began, gpu)
        return figures

    def command(self, arguments: Sequence[str], log: str) -> None:
        """Run `python -m ...` and append its output to a log file.

        Args:
            arguments: module and its arguments.
            log: name of the file below WORK/logs, without its suffix.

        Raises:
            QatEdgeError: the command failed; its last lines are quoted.
        """
        path = self.work / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Appended: a resumed training continues the log of its first attempt.
        with path.open("a", encoding="utf-8") as file:
            file.write(f"$ python -m {shlex.join(arguments)}\n")
            file.flush()
            code = subprocess.run(
                [sys.executable, "-m", *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code != 0:
            output = path.read_text(encoding="utf-8", errors="replace").splitlines()
            last = "\n".join(output[-QUOTED_LINES:])
            raise QatEdgeError(
                f"`python -m {' '.join(arguments[:2])}` ended with exit code {code}:\n{last}\nFull output: {path}. "
                "Finished cells are kept: run the benchmark again to resume."
            )


class Reference:
    """FP32 fine-tune that other models are compared with, on the tokens that validate would compare.

    Its logits are computed once and kept in a temporary folder.
    """

    def __init__(self, adapter: Path, eval_data: Path, task: Task, tokens: int, work: Path) -> None:
        merged = merge.merged_model(adapter)
        rows = load_rows(str(eval_data), "eval")
        self.sequences = tokenization.scored_ids(rows, merged.tokenizer, task.window, tokens)
        work.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix=".logits-", dir=work)
        self._logits = LogitStore(Path(self._scratch.name) / "fp32")
        score(merged.model, self.sequences, self._logits, lambda done: None)

    def fp32(self) -> Figures:
        """Return the figures of the fine-tune itself."""
        comparison = LogitComparison()
        for index, sequence in enumerate(self.sequences):
            logits = self._logits.get(index)
            comparison.add(logits, logits, sequence.targets)
        return _figures(comparison.result())

    def compare(self, model: PreTrainedModel) -> Figures:
        """Return perplexity, KL and top-1 agreement of a model, on the same token ids as the fine-tune."""
        comparing = _ComparingStore(self._logits, self.sequences)
        score(model, self.sequences, comparing, lambda done: None)
        return _figures(comparing.comparison.result())

    def close(self) -> None:
        """Delete the logits."""
        self._scratch.cleanup()


class _ComparingStore(LogitStore):
    """Logit store that compares each logits array with the reference's at once, and keeps none."""

    def __init__(self, fp32: LogitStore, sequences: Sequence[tokenization.ScoredIds]) -> None:
        self.fp32, self.sequences, self.comparison = fp32, sequences, LogitComparison()

    def put(self, index: int, logits: NDArray[np.float32]) -> None:
        self.comparison.add(self.fp32.get(index), logits, self.sequences[index].targets)


def _figures(compared: LogitMetrics) -> Figures:
    return {
        "perplexity": compared.perplexity,
        "kl_nats": compared.kl_nats,
        "top1": compared.top1_agreement,
        "sqnr_db": compared.sqnr_db if math.isfinite(compared.sqnr_db) else None,
        "tokens": compared.tokens,
    }


def artifact_rows(report: results.Report) -> list[Figures]:
    """Return what validate measured, one row per model and target, under the names of this benchmark."""
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


def model_name(row: Measurement) -> str:
    """Return "base", "fp32", "qat", or the name of the PTQ method."""
    known = {"fp32 base": "base", "fp32 fine-tuned": FP32, "qat": RECOMMENDED}
    known |= {f"ptq ({title})": method for method, title in PTQ_METHODS.items()}
    return known[row.name]
