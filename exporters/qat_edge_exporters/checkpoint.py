"""Checkpoint that an exporter reads: a Hugging Face folder, frozen or float, with or without LoRA adapters.

Adapters stay unmerged (`qat_edge.quant.frozen_adapters`).
"""

from __future__ import annotations

from pathlib import Path

from qat_edge import readers
from qat_edge.errors import ExportError
from qat_edge.quant.frozen_adapters import read_adapters
from qat_edge_exporters.artifact import ArtifactAdapter


def is_frozen(checkpoint: Path) -> bool:
    """Return whether the folder's weights are codes and scales."""
    document = readers.read_object(checkpoint / "config.json", ExportError)
    return document.get("quantization_config") is not None


def adapter_arrays(checkpoint: Path) -> dict[str, ArtifactAdapter]:
    """Read the adapters by module name, as an artifact holds them; see `read_adapters`."""
    return {
        name: ArtifactAdapter(adapter.down.contiguous().numpy(), adapter.up.contiguous().numpy())
        for name, adapter in read_adapters(checkpoint).items()
    }
