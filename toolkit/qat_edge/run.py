"""The run folder: where each verb reads and writes, and the manifest that says what made each part.

RUN/config.yaml            resolved options, one section a verb
RUN/checkpoints/           the trainer's own, for --resume
RUN/adapter/               peft adapter at the end of training
RUN/reference/             peft adapter at the end of phase 1: the FP32 fine-tune
RUN/start/                 weights and scales that phase 2 began from, where a PTQ method or learned scales need it
RUN/quantized/             frozen checkpoint: codes and scales
RUN/exports/TARGET/        artifacts of the quantized model
RUN/ptq/METHOD/            post-training quantization of the reference: quantized/, exports/TARGET/
RUN/reports/               what validate measured, one JSON file a device
RUN/answers.json           what it measured of an encoder
RUN/report.html            and history.html, where the run is the last of several in a report
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

FORMAT = 2  # of the run folder; raised when an older reader could not make sense of a newer folder
MANIFEST = "manifest.json"
OLD = ".old"  # ends the name of a hidden folder that holds what is being replaced
# And what reports call them.
PTQ_METHODS = {
    "rtn": "round-to-nearest",
    "hqq": "HQQ",
    "gptq": "GPTQ",
    "gptaq": "GPTAQ",
    "coordinate-descent": "coordinate descent",
    "awq": "AWQ",
}
LIBRARIES = (
    "torch", "torchao", "executorch", "transformers", "peft", "accelerate",
    "datasets", "onnx", "onnxruntime", "onnxruntime-genai", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One quantized model and what was exported from it: the run's own, or one of post-training quantization."""

    path: Path

    @property
    def name(self) -> str:
        """What reports call it: "ptq (GPTQ)"."""
        return f"ptq ({PTQ_METHODS.get(self.path.name, self.path.name)})"

    @property
    def quantized(self) -> Path:
        return self.path / "quantized"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    def targets(self) -> list[str]:
        """Names of the targets exported so far, sorted."""
        if not self.exports.is_dir():
            return []
        return sorted(p.name for p in self.exports.iterdir() if (p / MANIFEST).is_file())

    def require_current(self, target: str, again: str) -> None:
        """Require that an artifact was made of the checkpoint that is there; again: the command that makes it so.

        Raises:
            RunError: it was exported from an earlier one.
        """
        folder = self.exports / target
        if read_manifest(folder)["quantized_sha256"] != sha256(self.quantized / MANIFEST):
            raise RunError(f"{folder} was exported from an earlier {self.quantized}. Export again: `{again}`.")


@dataclass(frozen=True)
class Run(Variant):
    """A run folder. `Run.open` checks that it is one; `Run(path)` is for the verb that creates it."""

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run folder at `path`.

        Raises:
            RunError: there is none, or another version of qat-edge wrote it.
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
        """What a PTQ method prepared for the quantization-aware phase: weights and scales."""
        return self.path / "start"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def reports(self) -> Path:
        return self.path / "reports"

    @property
    def verified(self) -> Path:
        """What verify found."""
        return self.path / "verified.json"

    @property
    def answers(self) -> Path:
        """What validate measured of an encoder."""
        return self.path / "answers.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def name(self) -> str:
        """What reports call it."""
        return "qat"

    @property
    def ptq_folder(self) -> Path:
        return self.path / "ptq"

    def ptq(self, method: str) -> Variant:
        """The FP32 fine-tune quantized by `method` without training, exported like the run itself."""
        return Variant(self.ptq_folder / method)

    def variants(self) -> list[Variant]:
        """The run itself, then every post-training quantization of it that was made."""
        return [self, *(v for v in map(self.ptq, PTQ_METHODS) if v.path.is_dir())]


@contextmanager
def replace_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name once the block ends without an error.

    Whatever goes wrong, the final name holds either the whole new folder or what was there before.

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
    """Yield an empty hidden folder in `parent` that is gone at the end, or the next time if this process is killed."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    work = _hidden_folder(parent, name)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _hidden_folder(parent: Path, name: str) -> Path:
    """A new folder whose name says which process on which machine it belongs to."""
    return Path(tempfile.mkdtemp(prefix=f".{name}.{platform.node()}-{os.getpid()}-", dir=parent))


def _sweep(parent: Path) -> None:
    """Remove what killed processes left in `parent`; what one of them was just replacing gets its name back."""
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
        pass  # somebody else's, but there
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then give it its own: readers see the old text or the new."""
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
    """Name the file and the cause where the operating system would only say errno, and libraries not even that.

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
    """Why writing failed, None where the error is about something else."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno is not None else None
    found = re.search(r"os error (\d+)", str(error))  # safetensors, written in Rust
    if found:
        return os.strerror(int(found[1]))
    return "the write failed" if "file write failed" in str(error) else None  # torch.save


def write_manifest(folder: Path, kind: str, **facts: Any) -> None:
    """Record what made `folder`: sha256 of every file, library versions, git revision and `facts`."""
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
    """The manifest of `folder`.

    Raises:
        RunError: there is none, it cannot be parsed, or its format is another.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder}: no {MANIFEST} here, so nothing is known about it; make the folder again.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}); make the folder again.") from error
    if found != FORMAT:
        raise RunError(
            f"{path}: run folder format {found}, written by qat-edge {manifest.get('qat_edge')}; this is "
            f"qat-edge {__version__}, which reads format {FORMAT}. Use that version, or run finetune again."
        )
    return manifest


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_version(name: str) -> str | None:
    """Installed version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Commit of the checkout qat-edge runs from, None for an installed wheel."""
    here = Path(__file__).parent
    if shutil.which("git") is None or not (here.parents[1] / ".git").exists():
        return None
    answer = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return answer.stdout.strip() or None if answer.returncode == 0 else None
