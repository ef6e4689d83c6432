"""Forward pass of a model whose trainer is not ours, in the QAT phase.

Two passes of TRL's trainers would not compute what they are meant to:

    fused head       its trainers take log-probabilities from the last hidden states and from `lm_head.weight`, without
                     calling the head. Both are rounded here first, as the head itself rounds them.
    reference model  DPO compares with the model without adapters. The start of QAT has changed the weights under the
                     adapters, so such a pass goes to the base model as it was, loaded again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat_edge.errors import ModelError
from qat_edge.quant.fake import FakeQuantLinear, LoraFakeQuantLinear, Switch
from qat_edge.quant.layer_functions import RoundedInput

FUSED = "fused_lm_head"  # TRL's argument for log-probabilities in the place of logits
# Nats. Two orders of the same sums differed by 3e-5 with 128,256 tokens and a width of 2048, and a head that does not
# round by 0.13 there, by 0.015 with 288 tokens and a width of 64.
MOST_DIFFERENCE = 2e-3


def route_forward(base: PreTrainedModel, switch: Switch, load_reference: Callable[[], PreTrainedModel] | None) -> None:
    """Replace the forward of a base model, after the trainer has replaced it, by one that is right in the QAT phase.

    Args:
        base: The model that adapters were put into.
        switch: On in the QAT phase.
        load_reference: Loads the base model as it was before QAT; None where QAT does not change it.
    """
    inner = base.forward
    adapted = next(module for module in base.modules() if isinstance(module, LoraFakeQuantLinear))
    reference = None if load_reference is None else _Reference(load_reference, base)

    @functools.wraps(inner)  # `generate` looks at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not switch.enabled:
            return inner(*args, **kwargs)
        if adapted.disable_adapters:
            if reference is not None:
                return reference(*args, **kwargs)
            with _unrounded(switch):
                return inner(*args, **kwargs)
        if kwargs.get(FUSED):
            with _rounded_head(base):
                return inner(*args, **kwargs)
        return inner(*args, **kwargs)

    base.forward = forward


def require_rounded_head(base: PreTrainedModel, ids: Tensor) -> None:
    """Require that the log-probabilities of the fused head are those of the logits, in the QAT phase.

    Args:
        base: The model that adapters were put into.
        ids: Token ids of a row, (1, length).

    Raises:
        ModelError: They differ: TRL computes the head of this model in another way.
    """
    training = base.training
    base.eval()
    with torch.no_grad():
        found = base(input_ids=ids, labels=ids, **{FUSED: True}).log_probs
        expected = base(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    base.train(training)
    difference = float((found - expected).abs().max())
    if difference > MOST_DIFFERENCE:
        raise ModelError(
            f"{type(base).__name__}: TRL's log-probabilities differ from those of the rounded head by {difference:.2g} "
            f"nats on a row, more than {MOST_DIFFERENCE:g}. QAT would train another function than the exported one. "
            "Use the Trainer of transformers, or `qat-edge finetune`."
        )


class _Reference:
    """The base model before QAT, loaded at the first pass.

    Attributes:
        load: Loads it.
        like: Gives the device.
        model: None before the first pass.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], like: PreTrainedModel) -> None:
        self.load, self.like = load, like
        self.model: PreTrainedModel | None = None
        self.has_fused_head = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.model is None:
            self.model = self.load().to(self.like.device).eval().requires_grad_(False)
        if kwargs.get(FUSED) and not self.has_fused_head:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(self.model)  # as DPOTrainer does with a reference model that it is given
            self.has_fused_head = True
        return self.model(*args, **kwargs)


@contextmanager
def _unrounded(switch: Switch) -> Iterator[None]:
    """Switch rounding off inside the block."""
    switch.enabled = False
    try:
        yield
    finally:
        switch.enabled = True


@contextmanager
def _rounded_head(base: PreTrainedModel) -> Iterator[None]:
    """Inside the block, round the hidden states that leave the decoder, and the weight that stands for the head."""
    head = base.get_output_embeddings()
    if not isinstance(head, FakeQuantLinear):
        yield
        return

    def round_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.last_hidden_state = RoundedInput.apply(output.last_hidden_state)
        return output

    rounded = SimpleNamespace(weight=head.rounded_weight(), bias=head.bias)
    hook = base.base_model.register_forward_hook(round_output)
    base.get_output_embeddings = lambda: rounded
    try:
        yield
    finally:
        hook.remove()
        del base.get_output_embeddings  # the class's own is back
