"""What encoders get right: a text's label, the cosine of two texts, or which texts belong together.

    label      cross entropy of the logits
    score      (cos(a, b) - score)^2
    belonging  cross entropy of 20 times the cosines of one a with every b of the batch; its own b is the right one

The second is sentence-transformers' CosineSimilarityLoss, the third its MultipleNegativesRankingLoss
(https://arxiv.org/abs/1705.00652).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qat_edge.models.tasks import Kind, SentenceEncoder

SHARPNESS = 20.0  # what cosines are multiplied by

Objective = Callable[[Any, Mapping[str, Tensor]], Tensor]  # model, batch -> loss, summed over the rows


def of(kind: Kind) -> Objective | None:
    """What a kind of model learns; None for the next token."""
    if not kind.encodes:
        return None
    learned: Callable[[Tensor, Tensor], Tensor] = _classification
    if isinstance(kind, SentenceEncoder):
        learned = _similarity if kind.scored else _belonging

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return learned(kind.answer(model, batch["input_ids"], batch["attention_mask"]).float(), batch["labels"])

    return loss


def _classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (rows, labels), labels (rows,)."""
    return functional.cross_entropy(logits, labels, reduction="sum")


def _similarity(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Embeddings (2 rows, width) of length 1, first texts first; scores (rows,)."""
    first, second = embeddings.chunk(2)
    return functional.mse_loss((first * second).sum(-1), scores, reduction="sum")


def _belonging(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Embeddings (2 rows, width) of length 1, first texts first."""
    first, second = embeddings.chunk(2)
    own = torch.arange(len(scores), device=embeddings.device)
    return functional.cross_entropy(SHARPNESS * first @ second.T, own, reduction="sum")
