"""The functions of the ONNX target, each of which chooses between three kinds of folders.

A decoder's folder is for onnxruntime-genai and has a genai_config.json. Its graph is that of the runtime's model
builder, or traced from the model's own code where the builder has none for it. An encoder's folder has the config.json
of its checkpoint instead. Nothing heavy is imported here: functions are named as "module:function".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qat_edge.lazy import load
from qat_edge_exporters.onnx import names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qat_edge_exporters.artifact import Artifact, FloatConstant, HeldOption

_HERE = "qat_edge_exporters.onnx"


@dataclass(frozen=True)
class _Functions:
    """Functions for one kind of folder; their signatures are those of `Target`."""

    exporter: str
    reader: str
    options_reader: str
    constants: str
    support: str
    checker: str
    settings: str


DECODER = _Functions(
    exporter=f"{_HERE}.export_onnx:export",
    reader=f"{_HERE}.onnx_reader:read",
    options_reader=f"{_HERE}.onnx_options:held_options",
    constants=f"{_HERE}.architecture:computed_constants",
    support=f"{_HERE}.onnx_support:missing",
    checker=f"{_HERE}.folder_check:check_folder",
    settings=f"{_HERE}.expected_config:setting_faults",
)
TRACED_DECODER = _Functions(
    exporter=f"{_HERE}.export_decoder:export",
    reader=f"{_HERE}.decoder_reader:read",
    options_reader=f"{_HERE}.onnx_options:held_options",
    constants="qat_edge_exporters.executorch.pte.rotary_constants:rotary_frequencies",
    support=f"{_HERE}.decoder_support:missing",
    checker=f"{_HERE}.folder_check:check_folder",
    settings=f"{_HERE}.expected_config:setting_faults",
)
ENCODER = _Functions(
    exporter=f"{_HERE}.export_encoder:export",
    reader=f"{_HERE}.encoder_reader:read",
    options_reader=f"{_HERE}.encoder_reader:held_options",
    constants="qat_edge_exporters.executorch.pte.rotary_constants:rotary_frequencies",
    support="qat_edge_exporters.encoder_support:missing",
    checker=f"{_HERE}.folder_check:check_encoder_folder",
    settings=f"{_HERE}.encoder_settings:setting_faults",
)
# What a folder is, by the function that writes it.
_KINDS = {
    DECODER.exporter: "a decoder of onnxruntime-genai's builder",
    TRACED_DECODER.exporter: "a decoder traced from its own code",
    ENCODER.exporter: "an encoder",
}


def export(frozen: Path, out: Path, context_length: int) -> None:
    """Write the ONNX folder of a checkpoint into the empty folder `out`; see the exporters."""
    load(_of_checkpoint(frozen).exporter)(frozen, out, context_length)


def read(folder: Path) -> Artifact:
    """Read codes, scales, metadata and sizes back; see the readers."""
    artifact: Artifact = load(_of_folder(folder).reader)(folder)
    return artifact


def held_options(folder: Path) -> list[HeldOption]:
    """Return the options of the export as the files hold them."""
    held: list[HeldOption] = load(_of_folder(folder).options_reader)(folder)
    return held


def computed_constants(checkpoint: Path, artifact: Artifact) -> Sequence[FloatConstant]:
    """Return the float constants that are no tensors of the checkpoint."""
    constants: Sequence[FloatConstant] = load(_of_checkpoint(checkpoint).constants)(checkpoint, artifact)
    return constants


def missing(config: PretrainedConfig) -> str:
    """Return why a model of this configuration cannot become ONNX, as a sentence; empty if nothing prevents it."""
    from qat_edge.models import tasks  # imports torch

    if tasks.is_encoder_config(config):
        return str(load(ENCODER.support)(config))
    # The model's own code can become a graph where the builder has none for it.
    return str(load(DECODER.support)(config) and load(TRACED_DECODER.support)(config))


def check_folder(folder: Path) -> None:
    """Refuse a folder that asks a runtime to load something that is not part of an export."""
    load(_of_folder(folder).checker)(folder)


def setting_faults(folder: Path, checkpoint: Path) -> list[str]:
    """Return how the settings of a folder differ from what the export of a checkpoint writes, a sentence each."""
    expected, found = _of_checkpoint(checkpoint), _of_folder(folder)
    if expected is not found:
        own, other = _KINDS[expected.exporter], _KINDS[found.exporter]
        return [f"{folder}: the files of {other}, but the export of this checkpoint writes those of {own}."]
    return list(load(found.settings)(folder, checkpoint))


def _of_checkpoint(checkpoint: Path) -> _Functions:
    from qat_edge.models import tasks  # imports torch
    from qat_edge.quant import frozen_config

    if tasks.task_of_folder(checkpoint).is_encoder:
        return ENCODER
    return TRACED_DECODER if load(DECODER.support)(frozen_config.read(checkpoint)) else DECODER


def _of_folder(folder: Path) -> _Functions:
    is_encoder = (folder / names.CONFIG).is_file() and not (folder / names.GENAI_CONFIG).exists()
    if is_encoder:
        return ENCODER
    from qat_edge_exporters.onnx import decoder_signature  # imports onnx

    return TRACED_DECODER if decoder_signature.is_traced_folder(folder) else DECODER
