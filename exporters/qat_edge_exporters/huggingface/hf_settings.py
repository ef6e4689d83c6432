"""config.json and generation_config.json of a Hugging Face folder, and what else transformers might load from it.

config.json is the checkpoint's with another quantization_config and two tables instead of one. generation_config.json
keeps the model's settings, names every end token of training, and ends a text at the context length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import ArtifactError, ExportError, ModelError, RunError
from qat_edge.manifest import MANIFEST
from qat_edge.models import tokenizer
from qat_edge.models.tokenizer import EOS, GENERATION_CONFIG
from qat_edge.quant import frozen, frozen_config
from qat_edge_exporters.artifact import HeldOption
from qat_edge_exporters.huggingface.compressed_config import quantization_config
from qat_edge_exporters.huggingface.float_tables import float_table_names

CONFIG, MODEL_FILE = "config.json", "model.safetensors"
CONTEXT = "max_length"  # key of generation_config.json
OTHER_CODE = "auto_map"  # key with which transformers runs code of a folder


def expected_config(checkpoint: Path) -> dict[str, Any]:
    """Return the content of config.json for a frozen checkpoint."""
    return config_of(checkpoint, float_table_names(checkpoint))


def config_of(checkpoint: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the content of config.json for a frozen checkpoint, of which the tables `names` are written in float."""
    document = readers.read_object(checkpoint / CONFIG, ExportError)
    quantization = quantization_config(frozen.read_scheme(checkpoint), names)
    return {**document, "dtype": "float32", "tie_word_embeddings": False, frozen_config.QUANTIZER: quantization}


def expected_generation(checkpoint: Path, context_length: int) -> dict[str, Any]:
    """Return the content of generation_config.json for a checkpoint."""
    path = checkpoint / GENERATION_CONFIG
    stored = readers.read_object(path, ExportError) if path.is_file() else {}
    return {**stored, EOS: tokenizer.end_tokens(checkpoint), CONTEXT: context_length}


def context_length(folder: Path) -> int:
    """Return the tokens at which a generation of a folder ends.

    Raises:
        ArtifactError: generation_config.json cannot be read or has no such number.
    """
    path = folder / GENERATION_CONFIG
    value = readers.read_object(path, ArtifactError).get(CONTEXT)
    if type(value) is not int or value < 1:
        raise ArtifactError(f"{path}: {CONTEXT} is {readers.show(value)}, no number of tokens. Export it again.")
    return value


def held_options(folder: Path) -> list[HeldOption]:
    """Return the options of an export as its files hold them.

    Raises:
        ArtifactError: a file cannot be read.
    """
    return [HeldOption("context_length", f"{CONTEXT} of {GENERATION_CONFIG}", context_length(folder))]


def setting_faults(folder: Path, checkpoint: Path) -> list[str]:
    """Return a fault for each value of the two files that the export would not write.

    Raises:
        ArtifactError: a file cannot be read.
    """
    expected = {
        CONFIG: expected_config(checkpoint),
        GENERATION_CONFIG: expected_generation(checkpoint, context_length(folder)),
    }
    return [fault for file, document in expected.items() for fault in _faults(folder, file, document)]


def check_folder(folder: Path) -> None:
    """Refuse a folder from which transformers would load more than an export has.

    Raises:
        ArtifactError: it has another file of weights or adapters, or asks for code.
    """
    permitted = {CONFIG, GENERATION_CONFIG, MODEL_FILE, MANIFEST, *tokenizer.tokenizer_files(folder)}
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    for name in others:
        if name not in permitted:
            raise ArtifactError(
                f"{folder}: {readers.shorten(name)} is no file of an export, and transformers may load it. Remove it."
            )
    for file in (CONFIG, GENERATION_CONFIG):
        if readers.read_object(folder / file, ArtifactError).get(OTHER_CODE):
            raise ArtifactError(
                f"{folder / file}: {OTHER_CODE} asks for code that an export does not have. Export it again."
            )
    try:
        frozen_config.read(folder)
    except (ModelError, RunError) as error:
        raise ArtifactError(str(error)) from error


def _faults(folder: Path, file: str, expected: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each value of one file that is another than expected."""
    found = dict(_flat(readers.read_object(folder / file, ArtifactError)))
    wanted = dict(_flat(expected))
    for key in sorted(found.keys() | wanted.keys()):
        if key not in found or key not in wanted or (type(found[key]), found[key]) != (type(wanted[key]), wanted[key]):
            yield (
                f"{file}: {readers.shorten(key)} is {readers.show(found.get(key))}, the export writes "
                f"{readers.show(wanted.get(key))}."
            )


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects under names with dots."""
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
