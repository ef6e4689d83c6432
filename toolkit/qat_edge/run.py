"""The run folder: where each verb reads and writes.

RUN/config.yaml            resolved options, one section per verb
RUN/training.json          loss curve, time and memory of finetune
RUN/rows.jsonl             text of the rows that a trainer of `prepare` had tokenized
RUN/checkpoints/           checkpoints of the Hugging Face Trainer, for --resume
RUN/adapter/               peft adapter at the end of training
RUN/reference/             peft adapter at the end of phase 1: the FP32 fine-tune
RUN/start/                 weights and scales from PTQ initialization, at the start of QAT
RUN/quantized/             frozen checkpoint: codes and scales
RUN/exports/TARGET/        artifacts of the quantized model
RUN/schema.json            schema of the answers, of `export --schema`
RUN/ptq/METHOD/            post-training quantization of the reference: quantized/, exports/TARGET/
RUN/verified.json          results of verify
RUN/reports/DEVICE.json    results of validate, one file per device
RUN/answers.json           results of validate for an encoder
RUN/sensitivity/           results of sensitivity
RUN/compare/               results of compare
RUN/eval/TASK.json         results of eval, one file per public task
RUN/report.html            the report; history.html where the run is the last of several in one
RUN/.lock, .lock.json      lock of the command that is writing into the folder, and its name (`run_lock`)
RUN/.previous/             the run that `finetune --force` replaces, until the new one is finished (`previous_run`)

Every part appears whole or not at all (`storage`). Paths in config.yaml are absolute (`option_paths`), so a run folder
can be opened from any working directory and can be moved.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qat_edge import config, previous_run, run_lock, storage
from qat_edge.errors import RunError
from qat_edge.export_command import CONFIG, EXPORTS, PTQ, SCHEMA, export_again
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.options import SWEEP_OPTIONS
from qat_edge.quant.ptq.method_names import METHOD_OF, OWN_ADAPTERS, OWN_PTQ, PTQ_METHODS, QAT, RENAMED_METHODS, TITLES


@dataclass(frozen=True)
class Variant:
    """One quantized model and its exports: the run's own, or one made by post-training quantization."""

    path: Path

    @property
    def name(self) -> str:
        """Return its name in reports: "ptq (GPTQ)"."""
        method = RENAMED_METHODS.get(self.path.name, self.path.name)
        return f"ptq ({PTQ_METHODS.get(method, method)})"

    @property
    def quantized(self) -> Path:
        return self.path / "quantized"

    @property
    def exports(self) -> Path:
        return self.path / EXPORTS

    def targets(self) -> list[str]:
        """Return the names of the targets exported so far, sorted."""
        if not self.exports.is_dir():
            return []
        return sorted(p.name for p in self.exports.iterdir() if (p / MANIFEST).is_file())

    def damaged_exports(self) -> list[Path]:
        """Return the folders of artifacts without a manifest, as a partial copy leaves them."""
        if not self.exports.is_dir():
            return []
        folders = [p for p in self.exports.iterdir() if p.is_dir() and not p.name.startswith(".")]
        return sorted(p for p in folders if not (p / MANIFEST).is_file())

    def require_current(self, target: str) -> None:
        """Require that an artifact was exported from the current checkpoint.

        Raises:
            RunError: it was exported from an earlier checkpoint; the message has the command that exports it again.
        """
        folder = self.exports / target
        again = export_again(folder)
        if not (self.quantized / MANIFEST).is_file():
            raise RunError(f"{self.quantized}: missing, or without {MANIFEST}. Export again: `{again}`.")
        if read_manifest(folder)["quantized_sha256"] != sha256(self.quantized / MANIFEST):
            raise RunError(f"{folder} was exported from an earlier {self.quantized}. Export again: `{again}`.")


@dataclass(frozen=True)
class Run(Variant):
    """A run folder. `Run.open` checks that it is one; `Run(path)` is for the verb that creates it."""

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open the run folder at `path`.

        Raises:
            RunError: there is none, or a version of qat-edge with another format wrote it.
        """
        run = cls(path)
        _refuse_file(path)
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder. `qat-edge finetune --out {path}` makes one.")
        run._recover()
        if (path / SWEEP_OPTIONS).is_file():
            raise RunError(
                f"{path}: a sweep, not a run folder. Its page is {path / 'report.html'}; name one of its trials, which "
                f"are below {path / 'trials'}."
            )
        if not run.config.is_file():
            raise RunError(f"{path}: not a run folder (it holds no config.yaml). Name the folder given to --out.")
        # A checkpoint is checked where it is used: `quantize --force` replaces one that cannot be read.
        if (run.adapter / MANIFEST).is_file():
            read_manifest(run.adapter)
        return run

    @classmethod
    def to_resume(cls, path: Path) -> Run:
        """Return the run folder at `path` for `finetune --resume`, which may have no more than its options.

        Raises:
            RunError: there is nothing to resume.
        """
        run = cls(path)
        _refuse_file(path)
        if not path.is_dir():
            raise RunError(
                f"{path}: no such run folder, so there is nothing to resume. Check --out, or train without --resume to "
                "begin a run there."
            )
        if not run.config.is_file():
            raise RunError(
                f"--resume: {path} has no config.yaml, so there is nothing to resume. Check --out, or train without "
                "--resume."
            )
        return run

    def _recover(self) -> None:
        """Finish what a killed process left half done, where no other one is writing."""
        if (self.path / previous_run.PREVIOUS).is_dir():
            with suppress(RunError), run_lock.writing(self.path, "recovery"):
                return
        with suppress(OSError, RunError):  # a run on a read-only disk, or with links, can be read
            previous_run.refuse_links(self.path)
            for parent in (self.path, *(variant.exports for variant in self.variants())):
                storage.sweep(parent)

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def start(self) -> Path:
        """Weights and scales from PTQ initialization, at the start of QAT."""
        return self.path / "start"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rows(self) -> Path:
        """Text of the rows that a trainer of `prepare` had tokenized, unless its rows were named."""
        return self.path / "rows.jsonl"

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    @property
    def schema(self) -> Path:
        """Schema of the answers, which the exports have copies of."""
        return self.path / SCHEMA

    @property
    def verified(self) -> Path:
        """Results of verify."""
        return self.path / "verified.json"

    @property
    def answers(self) -> Path:
        """Results of validate for an encoder."""
        return self.path / "answers.json"

    @property
    def evaluations(self) -> Path:
        """Results of eval, one file per public task."""
        return self.path / "eval"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def name(self) -> str:
        """Return its name in reports: "qat", or with other weights than those of QAT "quantized (coordinate descent)".

        Raises:
            RunError: config.yaml cannot be read.
        """
        trained = config.load_trained(self.config)
        method = TITLES[METHOD_OF.get(trained.ptq_init, trained.ptq_init)]
        if trained.frozen_base is not None:
            return f"{OWN_ADAPTERS} ({method})"
        return QAT if trained.has_qat else f"{OWN_PTQ} ({method})"

    @property
    def frozen_base(self) -> str | None:
        """Return the run whose weights its adapters were trained next to; None where they are merged."""
        return config.load_trained(self.config).frozen_base

    @property
    def is_trained(self) -> bool:
        """Return whether anything was trained, so that the model differs from its base before it is rounded."""
        return config.load_trained(self.config).steps > 0

    @property
    def ptq_folder(self) -> Path:
        return self.path / PTQ

    def ptq(self, method: str) -> Variant:
        """Return the FP32 fine-tune quantized by `method` without training; its folder may not exist yet."""
        old = next((old for old, new in RENAMED_METHODS.items() if new == method), method)
        # A run of 0.1.0 keeps the folder that it has.
        in_use = old if (self.ptq_folder / old).is_dir() else method
        return Variant(self.ptq_folder / in_use)

    def variants(self) -> list[Variant]:
        """Return the run itself, then every PTQ variant that exists."""
        return [self, *(v for v in map(self.ptq, PTQ_METHODS) if v.path.is_dir())]


def _refuse_file(path: Path) -> None:
    """Refuse a file in the place of a run folder, and name the run that it is in.

    Raises:
        RunError: it is a file.
    """
    if path.is_file():
        run = next((folder for folder in path.resolve().parents if Run(folder).config.is_file()), None)
        named = "the folder given to --out" if run is None else f"its run folder, {run}"
        raise RunError(f"{path}: a file, not a run folder. Name {named}.")
