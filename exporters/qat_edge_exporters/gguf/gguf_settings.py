"""All metadata of a GGUF file, computed from a checkpoint, and its comparison with that of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qat_edge import readers
from qat_edge.errors import ExportError
from qat_edge.quant import frozen_config
from qat_edge_exporters.artifact import Artifact, FloatConstant
from qat_edge_exporters.checkpoint import is_frozen
from qat_edge_exporters.gguf import gguf_file
from qat_edge_exporters.gguf.gguf_families import architecture_metadata, family_of
from qat_edge_exporters.gguf.gguf_file import ARCHITECTURE, MODEL_FILE
from qat_edge_exporters.gguf.gguf_rope import rotary_settings
from qat_edge_exporters.gguf.vocabulary import tokenizer_metadata

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# llama.cpp's numbers of the kinds of files, which say nothing about single tensors.
FLOAT_FILE, INT4_FILE = 0, 2
QUANTIZATION_VERSION = 2  # of ggml's blocks


def read_config(checkpoint: Path) -> PretrainedConfig:
    """Read the configuration of a checkpoint."""
    return frozen_config.read(checkpoint)


def file_metadata(checkpoint: Path, context_length: int) -> dict[str, Any]:
    """Return the metadata of a file by key, without the architecture's name, which the writer adds.

    Raises:
        ExportError: llama.cpp has no such model or tokenizer.
    """
    config = read_config(checkpoint)
    family = family_of(config)
    rotary = rotary_settings(config, family.architecture).metadata
    return {
        "general.type": "model",
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": INT4_FILE if is_frozen(checkpoint) else FLOAT_FILE,
        **architecture_metadata(config, family, context_length),
        **{f"{family.architecture}.{key}": value for key, value in rotary.items()},
        **tokenizer_metadata(checkpoint, config.vocab_size),
    }


def setting_faults(folder: Path, checkpoint: Path) -> list[str]:
    """Return how the metadata of an artifact's file differs from what the export writes, a sentence for each key."""
    stored = gguf_file.read(folder / MODEL_FILE).metadata
    config = read_config(checkpoint)
    architecture = family_of(config).architecture
    context = stored.get(f"{architecture}.context_length")
    if type(context) is not int or context < 1:
        return [f"{MODEL_FILE}: {architecture}.context_length is {readers.show(context)}, no number of tokens."]
    try:
        expected = {ARCHITECTURE: architecture, **file_metadata(checkpoint, context)}
    except ExportError as error:
        return [f"{MODEL_FILE}: {error}"]
    return [
        f"{MODEL_FILE}: {readers.shorten(key)} is {readers.show(stored.get(key))}, the export writes "
        f"{readers.show(expected.get(key))}."
        for key in gguf_file.same_values(stored, expected, sorted(stored.keys() | expected.keys()))
    ]


def computed_constants(checkpoint: Path, artifact: Artifact) -> list[FloatConstant]:
    """Return the factors of rotary frequencies that the export computes from a checkpoint's configuration."""
    config = read_config(checkpoint)
    factors = rotary_settings(config, family_of(config).architecture).factors
    return [FloatConstant(name, np.asarray(values)) for name, values in factors.items()]
