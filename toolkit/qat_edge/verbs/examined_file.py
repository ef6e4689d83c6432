"""Find the file that `doctor` examines, and its format, by content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.targets import EXECUTORCH, GGUF, ONNX, Target, target_named

SUFFIXES = {".pte": EXECUTORCH, ".onnx": ONNX, ".gguf": GGUF}
GENAI_CONFIG = "genai_config.json"
MAGIC_BYTES = 8  # read from the beginning of a file
SHOWN = 5  # names in a message
FILES = ".pte, .onnx or .gguf file"


class ExaminedFile(NamedTuple):
    """A file, and the target whose format it has."""

    path: Path
    target: Target


def find_file(path: Path) -> ExaminedFile:
    """Return the file at `path`, or the one in that folder, with its format.

    Raises:
        ArtifactError: there is none, several, or one of another format; the message names those that were found.
    """
    try:
        file = _file_in(path) if path.is_dir() else path
        return ExaminedFile(file, target_named(_format_of(file)))
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror}). Check its permissions and its disk."
        ) from error


def _format_of(path: Path) -> str:
    """Return the format of a file, by its first bytes or its name: a graph of ONNX has no bytes of its own."""
    begin = b""
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(MAGIC_BYTES)
    if begin.startswith(b"GGUF"):
        return GGUF
    if begin[4:6] == b"ET":
        return EXECUTORCH
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        state = f"no {FILES}" if path.exists() else "no such file or folder"
        raise ArtifactError(f"{path}: {state}. doctor examines these, and folders with one.")
    return SUFFIXES[suffix]


def _file_in(folder: Path) -> Path:
    """Return the file of a folder that is examined."""
    if (folder / GENAI_CONFIG).exists():
        return _named_by_config(folder)
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ArtifactError(f"{folder}: no {FILES} in it. {_hint(folder)}")
    first = _first_part(found)
    if len(found) > 1 and first is None:
        raise ArtifactError(
            f"{folder}: {len(found)} files that could be examined: {_listed(path.name for path in found)}. Give one of "
            f"them: `qat-edge doctor {found[0]}`."
        )
    return first or found[0]


def _first_part(found: list[Path]) -> Path | None:
    """Return the first of the parts that a GGUF model is split into; None where the files are something else."""
    parts = [path for path in found if f"-of-{len(found):05}.gguf" in path.name]
    return parts[0] if len(parts) == len(found) else None


def _named_by_config(folder: Path) -> Path:
    """Return the decoder that a folder for onnxruntime-genai names.

    Raises:
        ArtifactError: it names none, or a file that is not in the folder, or the folder has another model as well.
    """
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".pte", ".gguf"))
    if others:
        raise ArtifactError(
            f"{folder}: {GENAI_CONFIG}, and {_listed(others)} as well. Give the file that is to be examined."
        )
    path = folder / GENAI_CONFIG
    config = readers.read_object(path, ArtifactError)
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    name = decoder.get("filename") if isinstance(decoder, dict) else None
    graphs = _listed(sorted(each.name for each in folder.glob("*.onnx"))) or "none"
    if not isinstance(name, str) or Path(name).name != name or "\\" in name:
        raise ArtifactError(
            f"{path}: model.decoder.filename is {readers.show(name)}, no name of a graph next to it. Give a graph of "
            f"the folder to examine it alone: {graphs}."
        )
    if not (folder / name).exists():
        raise ArtifactError(
            f"{path}: names {readers.shorten(name)}, which is not there. Copy it there, or correct the name; graphs in "
            f"the folder: {graphs}."
        )
    return folder / name


def _hint(folder: Path) -> str:
    """Return what a folder without such a file is, and what to do with it, as sentences."""
    if any((folder / name).exists() for name in ("run.json", "exports")):
        exports = sorted(path.relative_to(folder).as_posix() for path in folder.glob("exports/*") if path.is_dir())
        return f"It is a run: give a folder of its exports ({_listed(exports) or 'none yet'})."
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        return (
            "It is a model folder of Hugging Face, which doctor does not examine: `qat-edge verify RUN` compares an "
            f"export with its run, and `qat-edge quantize {folder}` loads the model of another tool."
        )
    inner = next((path for path in sorted(folder.glob("*/*")) if path.suffix.lower() in SUFFIXES), None)
    if inner is not None:
        return f"Give the folder below it: `qat-edge doctor {inner.parent}`."
    return f"Found: {_listed(sorted(path.name for path in folder.iterdir())) or 'nothing'}."


def _listed(names: Iterator[str] | list[str]) -> str:
    found = [readers.shorten(name) for name in names]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more
