"""Manifests: which files a folder holds, and which versions, options and inputs made them."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qat_edge import __version__, readers
from qat_edge.errors import RunError
from qat_edge.storage import write_text

FORMAT = 2  # of the run folder; raised when an older reader could not read a newer folder
MANIFEST = "manifest.json"
LIBRARIES = (
    "torch", "torchao", "executorch", "transformers", "peft", "accelerate",
    "datasets", "onnx", "onnxruntime", "onnxruntime-genai", "numpy",
)  # fmt: skip


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
        manifest = readers.read_object(path, RunError)
        found = manifest["format"]
    except (RunError, KeyError) as error:
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, RunError) else f"no {error}"
        raise RunError(f"{path}: damaged ({reason.rstrip('.')}). Make the folder again.") from error
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
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None if done.returncode == 0 else None
