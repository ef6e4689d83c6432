"""Training objectives of encoders: the label of a text, the cosine of two texts, or which texts belong together.

labels          cross entropy of the logits
scored pairs    (cos(a, b) - score)^2, sentence-transformers' CosineSimilarityLoss
matching pairs  cross entropy over 20 times the cosines of one a with every b of the batch; the right b is its own:
                MultipleNegativesRankingLoss (https://arxiv.org/abs/1705.00652)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.models.tasks import ModelTask, SentenceEncoder

COSINE_SCALE = 20.0  # factor of cosines as logits, sentence-transformers' default

Objective = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]  # model, batch -> loss, summed over the rows


def objective_for_task(task: ModelTask) -> Objective | None:
    """Return the objective of an encoder's task, or None for next-token prediction, which the model computes itself."""
    if not task.is_encoder:
        return None

    loss_of_outputs: Callable[[Tensor, Tensor], Tensor] = _label_loss
    if isinstance(task, SentenceEncoder):
        loss_of_outputs = _cosine_loss if task.scored else _ranking_loss

    # A sum, not a mean: the trainer divides by the rows of all accumulated batches of a step.
    def objective(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        outputs = task.predict(model, batch["input_ids"], batch["attention_mask"])
        return loss_of_outputs(outputs.float(), batch["labels"])

    return objective


def _label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of a classifier. logits: (rows, labels); labels: (rows,)."""
    return functional.cross_entropy(logits, labels, reduction="sum")


def _cosine_loss(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Squared error of the cosines. embeddings: (2 rows, width), of length 1, first texts first; scores: (rows,)."""
    # Embeddings have length 1, so the product is the cosine.
    first, second = embeddings.chunk(2)
    return functional.mse_loss((first * second).sum(-1), scores, reduction="sum")


def _ranking_loss(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Cross entropy of finding each text's partner in the batch. embeddings: (2 rows, width), first texts first."""
    first, second = embeddings.chunk(2)
    # Row i of the cosines compares text i with all partners; its own partner is the class i.
    own = torch.arange(len(scores), device=embeddings.device)
    return functional.cross_entropy(COSINE_SCALE * first @ second.T, own, reduction="sum")
