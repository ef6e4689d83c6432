"""Manifests: which files a folder holds, and which versions, options and inputs made them."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from qat_edge import __version__, readers
from qat_edge.errors import RunError
from qat_edge.export_command import EXPORTS, export_again
from qat_edge.path_names import is_inside
from qat_edge.storage import write_text

FORMAT = 2  # of the run folder; raised when an older reader could not read a newer folder
MANIFEST = "manifest.json"
LIBRARIES = (
    "torch", "torchao", "executorch", "transformers", "peft", "accelerate",
    "datasets", "onnx", "onnxruntime", "onnxruntime-genai", "onnxscript", "numpy",
)  # fmt: skip
# Files that nothing reads, and that people or systems add to a folder: notes and logs.
NOTES = (".md", ".log")
TICK_NS = 100_000_000  # longer than the clock of a local file system stands still (ext4: 4 ms)
TRAINED = ("adapter", "reference", "start")  # folders of a run that finetune writes
SHOWN_FAULTS = 5  # of the faults of a folder, named by an error

# Types of the entries that are used, by their path; "*" is every key. An entry that is absent is another fault.
ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "files": (dict,),
    "files.*": (dict,),
    "files.*.bytes": (int,),
    "files.*.sha256": (str,),
    "libraries": (dict,),
    "options": (dict,),
    "options.context_length": (int,),
    "options.kv_cache": (str,),
    "options.portable": (bool,),
    "target": (str,),
    "quantized_sha256": (str,),
    "adapter_sha256": (str, type(None)),
    "reference_sha256": (str,),
    "made_of": (str,),
    "parity": (dict,),
    "rotation_seed": (int, type(None)),
    "model_config": (dict,),
    "model_config.*": (str,),
    "scheme": (dict,),
    "scheme.group_size": (int,),
    "scheme.tied": (bool,),
    "scheme.embedding": (str,),
    "scheme.head": (str,),
    "scheme.apart": (list,),
    "scheme.apart.*": (str,),
    "scheme.weights": (dict,),
    "scheme.weights.*": (dict,),
    "scheme.weights.*.bits": (int,),
    "scheme.weights.*.group_size": (int,),
    "scheme.weights.*.quantize_input": (bool,),
    "scheme.weights.*.reason": (str,),
    "scheme.weights.*.levels": (str,),
    "data": (dict,),
    "data.rows_sha256": (str,),
    "eval_data": (dict, type(None)),
    "eval_data.rows_sha256": (str,),
    "model": (dict,),
    "model.source": (str,),
    "model.identity": (dict,),
    "model.identity.name": (str,),
    "model.trust_remote_code": (bool,),
    "model.kind": (str,),
    "model.labels": (list,),
    "model.labels.*": (str,),
    "model.pairs": (bool,),
    "model.scored": (bool,),
    "conversation": (dict, type(None)),
    "conversation.end_of_turn": (list, type(None)),
    "conversation.end_of_turn.*": (int,),
    "conversation.template_arguments": (dict, type(None)),
    "seed": (int,),
    "quantizer": (str,),
    "method": (str,),
    "bits": (dict,),
    "bits.*": (int,),
    "table_bits": (list,),
    "table_bits.*": (int,),
    "learned_scales": (bool,),
    "fixed_codes": (bool,),
    "libraries.*": (str, type(None)),
    "start": (dict, type(None)),
    "start.sha256": (str,),
    "start.rotation_seed": (int, type(None)),
    "kept_layers": (list, type(None)),
    "kept_layers.*": (int,),
    "group_size": (int,),
    "weight_bits": (int,),
    "weight_levels": (str,),
    "base": (str,),
    "device": (str,),
    "precision": (str,),
}


def how_to_restore(folder: Path) -> str:
    """Return the advice of an error about a folder that is not as it was written, with the verb that writes it."""
    if folder.parent.name == EXPORTS:
        return f"Restore the folder, or make it again: `{export_again(folder)}`."
    verb = "finetune" if folder.name in TRAINED else "quantize"
    return f"Restore the folder, or make it again: `qat-edge {verb} --force`."


class Manifest(dict[str, Any]):
    """A manifest, or an object inside one; a key that is missing is an error for people.

    Args:
        values: the entries.
        file: the manifest's file, for messages.
        prefix: path of this object inside the file, with a final dot; empty for the manifest itself.
    """

    def __init__(self, values: dict[str, Any], file: Path, prefix: str = "") -> None:
        wrapped = {
            key: Manifest(value, file, f"{prefix}{key}.") if isinstance(value, dict) else value
            for key, value in values.items()
        }
        super().__init__(wrapped)
        self.file, self.prefix = file, prefix

    def __missing__(self, key: str) -> NoReturn:
        """Name the entry that is missing.

        Raises:
            RunError: always.
        """
        raise RunError(f"{self.file}: damaged (no entry '{self.prefix}{key}'). {how_to_restore(self.file.parent)}")


class _Stamp(NamedTuple):
    """Properties of a file that change when it is written: device, inode, size and times of change."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


_hashes: dict[_Stamp, str] = {}  # files of this process, so that each is read once


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
        "files": {p.relative_to(folder).as_posix(): file_entry(p) for p in files},
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of `folder`.

    Raises:
        RunError: there is none, it cannot be parsed, an entry has another type than callers expect, or it has another
            format. Reading an entry that is missing raises it as well.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder}: no {MANIFEST} here, so its origin is unknown. {how_to_restore(folder)}")
    try:
        manifest = Manifest(readers.read_object(path, RunError), path)
    except RunError as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        raise RunError(f"{path}: damaged ({reason}). {how_to_restore(folder)}") from error

    # The format first: another version may have entries of other types.
    found = manifest["format"]
    if found != FORMAT:
        raise RunError(
            f"{path}: run folder format {readers.shorten(found)}, written by qat-edge "
            f"{readers.shorten(manifest.get('qat_edge'))}; this is qat-edge {__version__}, which reads format "
            f"{FORMAT}. Use that version, or run finetune again."
        )
    for entry, types in ENTRY_TYPES.items():
        _check_types(manifest, entry.split("."), types)
    return manifest


def check_files(folder: Path) -> Manifest:
    """Check every file of `folder` against its manifest, and return the manifest.

    Raises:
        RunError: the manifest cannot be read, or a file is missing, changed or not listed; the message names them.
    """
    manifest = read_manifest(folder)
    faults = file_faults(folder, manifest)
    if faults:
        more = f"; {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise RunError(
            f"{folder} is not as it was written: {'; '.join(faults[:SHOWN_FAULTS])}{more}. {how_to_restore(folder)}"
        )
    return manifest


def file_faults(folder: Path, manifest: Manifest, made: str = "written") -> list[str]:
    """Return how the files of `folder` differ from its manifest, a sentence without a stop for each.

    A file that is not listed is a fault, because a reader may take it for a part of the folder: a further safetensors
    file, a configuration, a tokenizer. Hidden files and notes (.md, .log) are not.

    Args:
        folder: folder with the files.
        manifest: its manifest.
        made: how the files came about, for the sentences: "written", "exported".
    """
    faults = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not is_inside(name) or not PurePosixPath(name).parts or "\\" in name:
            faults.append(f"{readers.shorten(name)}: listed in {MANIFEST}, but leads out of the folder")
        elif not path.is_file():
            faults.append(f"{name}: listed in {MANIFEST}, but missing")
        elif change := change_of(path, entry):
            faults.append(f"{name}: changed since it was {made} ({change})")

    listed = set(manifest["files"]) | {MANIFEST}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if path.is_file() and name not in listed and not hidden and path.suffix not in NOTES:
            faults.append(f"{name}: not listed in {MANIFEST}, so where it comes from is unknown")
    return faults


def file_entry(path: Path) -> dict[str, Any]:
    """Return the entry of a file in a list of files: its size and its sha256."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def change_of(path: Path, entry: Mapping[str, Any]) -> str | None:
    """Return how a file differs from its `file_entry`, None if it does not."""
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size} bytes, not {entry['bytes']}"
    return "its sha256 is not the recorded one" if sha256(path) != entry["sha256"] else None


def _check_types(value: Manifest, keys: list[str], types: tuple[type, ...]) -> None:
    """Check the type of the entry at a path of keys, where there is one.

    Raises:
        RunError: it has none of the types.
    """
    key, rest = keys[0], keys[1:]
    for name in value if key == "*" else [key]:
        if name not in value:
            continue
        found = value[name]
        items: list[tuple[int | None, Any]] = []
        if rest == ["*"] and isinstance(found, list):
            items += enumerate(found)
        if rest and not items:
            # A parent of another type has been reported under its own path, or may be None.
            if isinstance(found, Manifest):
                _check_types(found, rest, types)
            continue

        for index, item in items or [(None, found)]:
            # bool is a subclass of int, and no number of bits.
            if not isinstance(item, types) or (isinstance(item, bool) and bool not in types):
                where = f"{value.prefix}{readers.shorten(name)}" + ("" if index is None else f"[{index}]")
                expected = " or ".join("null" if one is type(None) else one.__name__ for one in types)
                raise RunError(
                    f"{value.file}: damaged ('{where}' is {readers.shorten(item)}, expected {expected}). Make the "
                    "folder again."
                )


def sha256(path: Path) -> str:
    """Return the hex digest of a file's bytes; a file that has not changed is read once a process."""
    status = path.stat()
    stamp = _Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if stamp in _hashes:
        return _hashes[stamp]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    # A file that was written a moment ago may be written again without another time: clocks of file systems tick.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > TICK_NS:
        _hashes[stamp] = digest
    return digest


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
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    return done.stdout.strip() or None if done.returncode == 0 else None
