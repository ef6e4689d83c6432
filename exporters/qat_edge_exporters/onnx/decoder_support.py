"""Tell from a configuration whether a decoder can be traced from its own code, before it is trained or frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge_exporters import decoder_probe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NO_CACHE = "have no plain key-value cache"  # layers of other types
OPERATOR = "onnxruntime's operator"


def missing(config: PretrainedConfig) -> str:
    """Return why the model cannot be traced, as a sentence; empty if no reason is known."""
    return decoder_probe.layer_gap(config, NO_CACHE) or decoder_probe.obstacle(config, OPERATOR)
