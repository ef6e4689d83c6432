"""Find the tensor at which a training diverged, and say so: no run ends with weights that are not numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from qat_edge.errors import ModelError
from qat_edge.train import checkpoints


def require_finite(tensors: Iterable[tuple[str, Tensor]], when: str) -> None:
    """Require that all tensors hold numbers only.

    Args:
        tensors: By name.
        when: Moment of the check, for the message: "at the start of QAT".

    Raises:
        ModelError: One does not; the message names it.
    """
    bad = first_not_finite(tensors)
    if bad is not None:
        raise ModelError(f"Training diverged: {when}, {bad}. Nothing is written from it. {ADVICE}")


def describe_step(model: nn.Module, loss: float, norm: float, step: int, phase: str, learning_rate: float) -> str:
    """Describe a step whose loss or gradient is not finite, before the optimizer used it.

    Args:
        model: The model in training, with the gradients of the step.
        loss: Loss of the step.
        norm: Norm of all gradients.
        step: The step, counted from 1.
        phase: Name of the phase.
        learning_rate: Learning rate of the step.

    Returns:
        "at step 5 (QAT, learning rate 0.001): the loss is nan. First tensor that is not finite: ...".
    """
    # Weights come first: a weight that is not finite makes everything after it so.
    bad = first_not_finite(model.named_parameters()) or first_not_finite(model.named_buffers())
    if bad is None:
        # The backward pass begins at the last layer, so of the bad gradients the last in the model came first.
        gradients = [(f"the gradient of {n}", p.grad) for n, p in model.named_parameters() if p.grad is not None]
        bad = first_not_finite(reversed(gradients)) or "the sum of the squares of all gradients overflows"

    figure = (
        f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.3f} and the gradient norm {norm}"
    )
    return (
        f"at step {step} ({phase}, learning rate {learning_rate:g}): {figure}. First tensor that is not finite: {bad}"
    )


def diverged(found: str, folder: Path) -> ModelError:
    """Return the error of a step that is not finite.

    Args:
        found: What `describe_step` returned.
        folder: RUN/checkpoints.
    """
    kept = checkpoints.found(folder)
    last = f"The last good checkpoint, {kept[0]}, is kept." if kept else "There was no checkpoint yet."
    return ModelError(f"Training diverged {found}. {last} {ADVICE}")


ADVICE = (
    "Train again with --force and a lower --learning-rate (--qat-learning-rate and --scale-learning-rate for QAT), or "
    "more --warmup-steps; if it is the first step, check model and data."
)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return name and count of the first tensor with values that are not finite, None if there is none."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            return f"{name} ({count} of {tensor.numel()} values are not finite)"
    return None
