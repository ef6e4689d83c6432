"""Metadata of a GGUF file: its keys and values, and the names of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers.integrations.gguf import read_gguf_metadata

from qat_edge.errors import ModelError
from qat_edge.readers import shorten

USE_FOLDER = "Use the model's safetensors folder."  # the end of many messages


@dataclass(frozen=True)
class GgufMetadata:
    """Metadata of a GGUF file.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        values: By key. Lists of strings are given as their length.
        tensors: Names of the tensors.
    """

    architecture: str
    values: dict[str, Any]
    tensors: frozenset[str]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture, such as "rope.freq_base"."""
        return self.values.get(f"{self.architecture}.{key}", default)

    @property
    def keys(self) -> list[str]:
        """Keys of the architecture, without its name."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.values if key.startswith(prefix)]


def read_metadata(path: Path) -> GgufMetadata:
    """Read the metadata of a GGUF file.

    Raises:
        ModelError: The file is a part of a model, or no model.
    """
    values, tensors = read_gguf_metadata(str(path))
    if values.get("split.count", 1) > 1:
        raise ModelError(
            f"{path}: part {values.get('split.no', 0) + 1} of {values['split.count']} of a model. Join the parts with "
            "`llama-gguf-split --merge`, or use the model's safetensors folder."
        )
    kind = values.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path}: general.type is {kind!r}, not 'model'. Give the file of the model itself.")
    return GgufMetadata(str(values["general.architecture"]), values, frozenset(tensors))


def refuse(path: Path, metadata: GgufMetadata, key: str, value: Any) -> NoReturn:
    """Refuse a key that may change the function."""
    raise ModelError(
        f"{path}: the metadata {metadata.architecture}.{key} = {brief(value)} is not known to be used by "
        f"transformers, and may change what the model computes. {USE_FOLDER}"
    )


def brief(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    return shorten(str(value), 60)
