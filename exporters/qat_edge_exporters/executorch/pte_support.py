"""Check from a model's configuration, before it is trained or frozen, whether it can become a .pte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge.models import tasks
from qat_edge_exporters import decoder_probe, encoder_support

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def missing(config: PretrainedConfig) -> str:
    """Return why the model cannot become a .pte, as a sentence; empty if no reason is known."""
    if tasks.is_encoder_config(config):
        return encoder_support.missing(config)

    gap = decoder_probe.layer_gap(config, "keep a state that is no key-value cache")
    return gap or decoder_probe.obstacle(config)
