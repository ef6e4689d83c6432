"""Attention of an encoder, computed by operators that an exporter chooses, behind transformers' AttentionInterface.

Every token attends to all that are not padding: softmax(scaling q k^T + mask) v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from qat_edge.errors import ExportError

MASKED = -1e9  # added to a score: its exp() is 0, and a block of keys that are all masked gives no NaN
# Arguments of transformers' attention call that change nothing here.
IGNORED = ("dropout", "is_causal", "use_cache", "output_attentions")


class FullAttention(ABC):
    """Attention of every token to all that are not padding.

    Attributes:
        format: that the model is exported to, for messages.
        layers: ids of the modules that have called it.
        mask: added to the scores, (batch, 1, S).
    """

    def __init__(self, format: str) -> None:
        self.format = format
        self.layers: set[int] = set()
        self.mask: Tensor

    def begin(self, attention_mask: Tensor) -> None:
        """Prepare for texts by their mask (batch, S), 1 for a token and 0 for padding."""
        self.mask = ((1 - attention_mask.to(torch.float32)) * MASKED).unsqueeze(1)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **extras: Any,  # transformers passes what the architecture has
    ) -> tuple[Tensor, None]:
        """Return outputs (batch, S, heads, D) for queries, keys and values (batch, heads, S, D).

        Raises:
            ExportError: the layer passes an argument that this attention does not compute.
        """
        # Anything else would change the result, such as positions added to the scores.
        other = sorted(name for name, given in extras.items() if name not in IGNORED and given is not None)
        if other or attention_mask is not None:
            raise ExportError(
                f"{type(module).__name__} attends with {', '.join(other) or 'its own mask'}, and {self.format} "
                "export computes plain attention of encoders only."
            )
        self.layers.add(id(module))
        return self.compute(query, key, value, query.shape[3] ** -0.5 if scaling is None else scaling), None

    @abstractmethod
    def compute(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return the outputs of one layer; shapes as in `attend`."""
