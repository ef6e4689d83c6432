"""Next-token loss of a causal language model, computed at the positions that have a target and at no others.

In training on answers most positions have none, and the output head is the widest layer: with 49,152 tokens in the
vocabulary and targets at a sixth of the positions, skipping the others halved a step of eight decoder layers 576 wide.
A hook selects the head's input, so that the model's own code computes everything else.

The cross entropy keeps one number per position for the backward pass instead of float32 copies of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.data.token_table import IGNORED
from qat_edge.quant import fake
from qat_edge.quant.autocast import trial_pass

CHUNK = 64  # positions whose probabilities are in memory at once
PROBE = 8  # tokens of the trial pass
SAME = 1e-4  # relative difference of two losses of the same logits; float32 leaves 1e-6


class Predictions(NamedTuple):
    """Predictions at all positions with a target, row after row.

    Attributes:
        logits: Shape (positions, vocabulary).
        targets: Token ids, int64 (positions,).
    """

    logits: Tensor
    targets: Tensor


def predict_targets(model: nn.Module, batch: Mapping[str, Tensor]) -> Predictions:
    """Run a model and return its predictions where the next token is a target.

    Args:
        model: A causal language model, with or without adapters.
        batch: "input_ids", "attention_mask" and "labels", int64 (rows, length), and what else the model takes.
    """
    # The prediction at position i is for token i + 1.
    has_target = functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    targets = batch["labels"].roll(-1, dims=1)[has_target]
    with _head_at(model, has_target) as selected:
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return Predictions(logits[0] if selected else logits[has_target], targets)


def next_token_loss(predictions: Predictions) -> Tensor:
    """Return the sum of the cross entropy over all positions, in nats."""
    loss: Tensor = ChunkedCrossEntropy.apply(*predictions)
    return loss


def is_loss_of(model: nn.Module) -> bool:
    """Return whether the loss that a model computes itself is the mean of this one, by a trial on a few tokens.

    It is not for models that add to it, as for the balance of experts, or that mix positions after the head.
    """
    with trial_pass(model) as device:
        ids = torch.arange(PROBE, device=device)[None]
        labels = ids.masked_fill(ids < PROBE // 2, IGNORED)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found = next_token_loss(predict_targets(model, batch)) / (PROBE // 2)
        expected = model(**batch).loss
    return bool(torch.isclose(found, expected.to(found.dtype), rtol=SAME))


@contextmanager
def _head_at(model: nn.Module, positions: Tensor) -> Iterator[list[bool]]:
    """Give the output head its input at some positions only, as one row; yields a list that is empty until it did.

    positions: bool (rows, length).
    """
    selected: list[bool] = []

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # Without any position, the layer would have nothing to round.
        if not arguments or arguments[0].shape[:-1] != positions.shape or not bool(positions.any()):
            return None
        selected.append(True)
        return arguments[0][positions][None], *arguments[1:]

    head = fake.base_of(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        handle.remove()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of logits (positions, vocabulary), in float32.

    Probabilities are computed again in the backward pass, for a few positions at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return log sum exp(z) - z[target], summed over all positions; targets: int64 (positions,)."""
        # In the dtype of the logits or float32, whichever is wider.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizers = torch.cat([chunk.to(dtype).logsumexp(-1) for chunk in logits.split(CHUNK)])
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - logits.gather(1, targets[:, None])[:, 0]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """Return softmax(z) - onehot(target), times the gradient of the sum."""
        logits, targets, normalizers = ctx.saved_tensors
        found = torch.empty_like(logits)
        chunks = zip(*(t.split(CHUNK) for t in (found, logits, targets[:, None], normalizers[:, None])), strict=True)
        for part, chunk, target, normalizer in chunks:
            probabilities = (chunk.to(normalizer.dtype) - normalizer).exp_()
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            part.copy_(probabilities.mul_(grads[0]))
        return found, None
