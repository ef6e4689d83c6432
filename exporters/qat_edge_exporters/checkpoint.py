"""Checkpoint that an exporter reads: a Hugging Face folder, frozen or float, with or without LoRA adapters.

Adapters are in its folder `adapter/`, as peft saves them, and stay unmerged: the artifact computes W x + s B (A x),
with W rounded or in float, and A, B in float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qat_edge import readers
from qat_edge.errors import ExportError
from qat_edge_exporters.artifact import ArtifactAdapter

ADAPTER = "adapter"
PREFIX = "base_model.model."  # of every tensor that peft saves
# Settings of peft with which a layer computes something other than W x + s B (A x).
OTHER_FORMS = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")


@dataclass(frozen=True)
class Adapter:
    """Adapter of one layer, in float32.

    Attributes:
        down: A, shape (rank, in).
        up: s B, shape (out, rank).
    """

    down: Tensor
    up: Tensor

    @property
    def size_bytes(self) -> int:
        """Size of both matrices."""
        return self.down.nbytes + self.up.nbytes


def is_frozen(checkpoint: Path) -> bool:
    """Return whether the folder's weights are codes and scales."""
    document = readers.read_object(checkpoint / "config.json", ExportError)
    return document.get("quantization_config") is not None


def read_adapters(checkpoint: Path) -> dict[str, Adapter]:
    """Read the adapters by module name; empty where the folder has none.

    Raises:
        ExportError: adapters that do not compute W x + s B (A x).
    """
    folder = checkpoint / ADAPTER
    if not folder.is_dir():
        return {}
    settings = readers.read_object(folder / "adapter_config.json", ExportError)
    scaling = _scaling(folder, settings)

    # Every tensor must belong to a pair of matrices A and B.
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{path}: cannot be read ({readers.shorten(error)}). Write the checkpoint's adapter again, or remove the "
            "folder to export the base alone."
        ) from error
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    found = {}
    for module in sorted(modules):
        down = tensors.pop(f"{PREFIX}{module}.lora_A.weight", None)
        up = tensors.pop(f"{PREFIX}{module}.lora_B.weight", None)
        if down is None or up is None:
            raise ExportError(f"{folder}: {module or 'a tensor'} has no pair of matrices A and B of a linear layer.")
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ExportError(
                f"{folder}: the adapter of {module} has numbers that are not finite. Train it again, with a lower "
                "--learning-rate if the loss was not finite."
            )
        found[module] = Adapter(down.float(), up.float() * scaling)
    if tensors:
        raise ExportError(
            f"{folder}: {next(iter(tensors))} does not belong to an adapter that can be exported unmerged."
        )
    return found


def adapter_arrays(checkpoint: Path) -> dict[str, ArtifactAdapter]:
    """Read the adapters by module name, as an artifact holds them; see `read_adapters`."""
    return {
        name: ArtifactAdapter(adapter.down.contiguous().numpy(), adapter.up.contiguous().numpy())
        for name, adapter in read_adapters(checkpoint).items()
    }


def _scaling(folder: Path, settings: dict[str, Any]) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with rank-stabilized scaling (https://arxiv.org/abs/2312.03732)."""
    other = [name for name in OTHER_FORMS if settings.get(name)]
    if settings.get("peft_type") != "LORA" or other:
        raise ExportError(
            f"{folder}: adapters with {', '.join(other) or settings.get('peft_type')} cannot be exported unmerged; "
            "merge them first."
        )
    rank = settings["r"]
    return float(settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))
