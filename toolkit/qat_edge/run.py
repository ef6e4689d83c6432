"""The run folder: where each verb reads and writes, and the manifest that says what made each part.

RUN/config.yaml            resolved options, one section per verb
RUN/training.json          loss curve, time and memory of finetune
RUN/checkpoints/           checkpoints of the Hugging Face Trainer, for --resume
RUN/adapter/               peft adapter at the end of training
RUN/reference/             peft adapter at the end of phase 1: the FP32 fine-tune
RUN/start/                 weights and scales from PTQ initialization, at the start of QAT
RUN/quantized/             frozen checkpoint: codes and scales
RUN/exports/TARGET/        artifacts of the quantized model
RUN/ptq/METHOD/            post-training quantization of the reference: quantized/, exports/TARGET/
RUN/verified.json          results of verify
RUN/reports/DEVICE.json    results of validate, one file per device
RUN/answers.json           results of validate for an encoder
RUN/sensitivity/           results of sensitivity
RUN/compare/               results of compare
RUN/report.html            the report; history.html where the run is the last of several in one
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qat_edge import __version__
from qat_edge.errors import RunError
from qat_edge.quant.ptq.method_names import PTQ_METHODS, RENAMED_METHODS

FORMAT = 2  # of the run folder; raised when an older reader could not read a newer folder
MANIFEST = "manifest.json"
OLD = ".old"  # suffix of the hidden folder that keeps what is being replaced
LIBRARIES = (
    "torch", "torchao", "executorch", "transformers", "peft", "accelerate",
    "datasets", "onnx", "onnxruntime", "onnxruntime-genai", "numpy",
)  # fmt: skip


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
        return self.path / "exports"

    def targets(self) -> list[str]:
        """Return the names of the targets exported so far, sorted."""
        if not self.exports.is_dir():
            return []
        return sorted(p.name for p in self.exports.iterdir() if (p / MANIFEST).is_file())

    def require_current(self, target: str, again: str) -> None:
        """Require that an artifact was exported from the current checkpoint.

        Args:
            target: name of the artifact.
            again: command that exports it again, for the error.

        Raises:
            RunError: it was exported from an earlier checkpoint.
        """
        folder = self.exports / target
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
        if not path.is_dir():
            raise RunError(f"{path}: no such run folder. `qat-edge finetune --out {path}` makes one.")
        if not run.config.is_file():
            raise RunError(f"{path}: not a run folder (it holds no config.yaml). Name the folder given to --out.")
        for part in (run.adapter, run.quantized):
            if (part / MANIFEST).is_file():
                read_manifest(part)
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

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
    def reports(self) -> Path:
        return self.path / "reports"

    @property
    def verified(self) -> Path:
        """Results of verify."""
        return self.path / "verified.json"

    @property
    def answers(self) -> Path:
        """Results of validate for an encoder."""
        return self.path / "answers.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def name(self) -> str:
        """Return its name in reports."""
        return "qat"

    @property
    def ptq_folder(self) -> Path:
        return self.path / "ptq"

    def ptq(self, method: str) -> Variant:
        """Return the FP32 fine-tune quantized by `method` without training; its folder may not exist yet."""
        old = next((old for old, new in RENAMED_METHODS.items() if new == method), method)
        # A run of 0.1.0 keeps the folder that it has.
        in_use = old if (self.ptq_folder / old).is_dir() else method
        return Variant(self.ptq_folder / in_use)

    def variants(self) -> list[Variant]:
        """Return the run itself, then every PTQ variant that exists."""
        return [self, *(v for v in map(self.ptq, PTQ_METHODS) if v.path.is_dir())]


@contextmanager
def replace_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder next to `target` that takes its name when the block ends without an error.

    Whatever goes wrong, `target` is either the whole new folder or the old one, unchanged.

    Raises:
        RunError: `target` exists and `force` is not set, or the disk is full.
    """
    with disk_errors(target), work_folder(target.parent, target.name) as work:
        if target.exists() and not force:
            raise RunError(f"{target} exists already. Give --force to replace it.")
        yield work
        work.chmod(0o755)
        if target.exists():
            old = _hidden_folder(target.parent, f"{target.name}{OLD}")
            target.rename(old / target.name)
            work.rename(target)
            shutil.rmtree(old)
        else:
            work.rename(target)


@contextmanager
def work_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty hidden folder in `parent`, removed at the end (or by the next call, if this process is killed)."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    work = _hidden_folder(parent, name)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _hidden_folder(parent: Path, name: str) -> Path:
    """Make a hidden folder whose name holds the machine and process that it belongs to."""
    return Path(tempfile.mkdtemp(prefix=f".{name}.{platform.node()}-{os.getpid()}-", dir=parent))


def _sweep(parent: Path) -> None:
    """Remove the work folders of killed processes; a folder that one of them was replacing gets its name back."""
    ours = re.compile(rf"\.(.+?)({re.escape(OLD)})?\.{re.escape(platform.node())}-(\d{{1,9}})-[a-z0-9_]{{8}}")
    for folder in list(parent.glob(".*")):
        found = ours.fullmatch(folder.name)
        if found is None or _is_running(int(found[3])):
            continue
        name = found[1]
        if found[2] and (folder / name).exists() and not (parent / name).exists():
            (folder / name).rename(parent / name)
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, under another user
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of writing to disk into a RunError that names the file and the cause.

    Raises:
        RunError: no space, no permission, a read-only file system.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _storage_reason(error)
        if reason is None:
            raise
        raise RunError(
            f"{target}: cannot be written ({reason}). Make room or choose another place, then repeat."
        ) from error


def _storage_reason(error: Exception) -> str | None:
    """Return why writing failed, or None where the error is about something else."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno is not None else None
    found = re.search(r"os error (\d+)", str(error))  # safetensors, written in Rust
    if found:
        return os.strerror(int(found[1]))
    return "the write failed" if "file write failed" in str(error) else None  # torch.save


def write_manifest(folder: Path, kind: str, **facts: Any) -> None:
    """Write the manifest of `folder`: sha256 of every file, library versions, git revision, and `facts`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "qat_edge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "git_revision": git_revision(),
        **facts,
        "files": {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of `folder`.

    Raises:
        RunError: there is none, it cannot be parsed, or it has another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder}: no {MANIFEST} here, so its origin is unknown. Make the folder again.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}). Make the folder again.") from error
    if found != FORMAT:
        raise RunError(
            f"{path}: run folder format {found}, written by qat-edge {manifest.get('qat_edge')}; this is "
            f"qat-edge {__version__}, which reads format {FORMAT}. Use that version, or run finetune again."
        )
    return manifest


def sha256(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the commit of the checkout that qat-edge runs from, or None for an installed wheel."""
    here = Path(__file__).parent
    if shutil.which("git") is None or not (here.parents[1] / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None if done.returncode == 0 else None
