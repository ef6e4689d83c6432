"""Tell from its configuration whether an encoder can be exported; every target computes its attention the same way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qat_edge.errors import ExportError
from qat_edge.models.tasks import ModelTask
from qat_edge.quant.frozen_adapters import read_adapters
from qat_edge_exporters import compat_transformers
from qat_edge_exporters.checkpoint import is_frozen

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def missing(config: PretrainedConfig) -> str:
    """Return why an encoder of this configuration cannot be exported, as a sentence; empty if no reason is known."""
    windows = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if windows:
        return f"{config.model_type} has layers that see only a part of the text ({', '.join(sorted(windows))})."
    if not compat_transformers.has_replaceable_attention(config):
        return f"{config.model_type} has attention of its own, which cannot be replaced."
    return ""


def require_frozen(folder: Path, task: ModelTask) -> None:
    """Refuse a checkpoint of an encoder with float weights, or with adapters that were not merged.

    Raises:
        ExportError: names the folder.
    """
    if not is_frozen(folder) or read_adapters(folder):
        raise ExportError(f"{folder} holds float weights or adapters; of {task.title} only frozen checkpoints export.")
