"""Checkpoints of the training that appear whole or not at all, and the choice of the one to resume from.

A checkpoint is written into a hidden folder, flushed to the disk and renamed. checkpoint.json in it lists its files, so
that one which was damaged or deleted later is noticed, too. Older checkpoints are removed when a newer one is whole.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qat_edge import progress
from qat_edge.errors import RunError
from qat_edge.manifest import change_of, file_entry
from qat_edge.readers import read_json
from qat_edge.storage import remove_folder, replace_folder, write_text

MARKER = "checkpoint.json"
STATE = "trainer_state.json"
KEPT = 2  # the newest, and one more in case the disk damages it
# What the Trainer writes, to check checkpoints from before there was a marker.
TORCH_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
WEIGHT_FILES = ("adapter_model.safetensors", "model.safetensors")


def save(folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Write the checkpoint of a step, then remove older ones.

    Args:
        folder: RUN/checkpoints.
        step: Optimizer steps done.
        write: Writes the files of the checkpoint into an empty folder.

    Raises:
        RunError: It cannot be written.
    """
    with replace_folder(folder / f"checkpoint-{step}", force=True) as work:
        write(work)
        files = {p.relative_to(work).as_posix(): file_entry(p) for p in sorted(work.rglob("*")) if p.is_file()}
        write_text(work / MARKER, json.dumps({"step": step, "files": files}, indent=1) + "\n")
    for old in found(folder)[KEPT:]:
        remove_folder(old)


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint, None if there is none; incomplete ones are reported and removed."""
    incomplete, newest = [], None
    for path in found(folder):
        defect = _defect(path)
        if defect is None:
            newest = path
            break
        incomplete.append((path, defect))

    goes_on = "training starts from the beginning" if newest is None else f"continuing from {newest.name}"
    for path, defect in incomplete:
        progress.warn(f"{path} is incomplete ({defect}); {goes_on}")
        remove_folder(path)
    return newest


def found(folder: Path) -> list[Path]:
    """Return all checkpoints in RUN/checkpoints, the newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,12}", path.name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the number of optimizer steps done at a checkpoint."""
    return int(path.name.rpartition("-")[2])


def _defect(path: Path) -> str | None:
    """Return why a checkpoint is not whole, None if it is."""
    try:
        if not (path / MARKER).is_file():
            return _defect_without_marker(path)
        files = read_json(path / MARKER, RunError)["files"]
        if STATE not in files:
            return f"{MARKER} does not list {STATE}"
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if change := change_of(file, expected):
                return f"{name} changed: {change}"
    except (RunError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be used: {error}"
    return None


def _defect_without_marker(path: Path) -> str | None:
    """Return why a checkpoint of an earlier version is not whole: every format but JSON has its end marked."""
    try:
        read_json(path / STATE, RunError, allow_nan=True)
    except RunError:
        return f"{STATE} is missing or cut off"
    for name in TORCH_FILES:
        if not (path / name).is_file() or not zipfile.is_zipfile(path / name):
            return f"{name} is missing or cut off"
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            try:
                with safe_open(path / name, framework="pt"):
                    return None
            except (SafetensorError, OSError):
                return f"{name} is cut off"
    return "it has no weights"
