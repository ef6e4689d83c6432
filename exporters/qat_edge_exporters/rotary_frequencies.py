"""Rotary embeddings whose frequencies depend on the length of the text, for graphs that hold one set of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from qat_edge.errors import ExportError


def fix_rotary_frequencies(model: nn.Module, context_length: int) -> None:
    """Fix, in place, rotary frequencies that would change with the length of the text: a graph holds one set of them.

    Raises:
        ExportError: the context is longer than the length up to which they stay the same.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        # Only these types recompute frequencies from the positions that they see.
        kind = getattr(module, "rope_type", None)
        if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
            continue

        # Up to the original length of the pretrained model, the frequencies stay the same.
        parameters = getattr(module.config, "rope_parameters", None) or {}
        fallback = module.config.max_position_embeddings
        fixed = parameters.get("original_max_position_embeddings", fallback)
        if context_length > fixed:
            raise ExportError(
                f"--context-length {context_length}: {kind} rotary embeddings change beyond {fixed} tokens, "
                f"and a static graph cannot follow. Give {fixed} or less."
            )
        module.rope_type = "default"  # what it computes up to that length, without a check of the positions
