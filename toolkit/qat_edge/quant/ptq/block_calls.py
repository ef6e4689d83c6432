"""Run a model as far as its blocks, on calibration data: their first input, and how the model calls each of them."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel


class CallArguments(NamedTuple):
    """Arguments that a block is called with besides the hidden states."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


class KeptTokens(NamedTuple):
    """Tokens of a batch that are no padding.

    Attributes:
        positions: Among all tokens, int64.
        total: Tokens with padding, rows * length.
    """

    positions: Tensor
    total: int

    @classmethod
    def of(cls, mask: Tensor) -> KeptTokens:
        """Return the tokens of an attention mask (rows, length)."""
        # Positions are found once. A mask as an index would be searched every time, and a GPU waited for.
        tokens = torch.arange(mask.numel(), device=mask.device)
        return cls(tokens[mask.flatten().bool()], mask.numel())


class StopForward(Exception):
    """Ends a forward pass early. At the last block, this saves the logits, the largest tensor of all."""


@dataclass
class BatchState:
    """One calibration batch on its way through the blocks.

    Attributes:
        hidden: Input of the next block in the rounded model, shape (rows, length, width).
        keep: Its tokens that are no padding.
        others: Other arguments of each block.
        unrounded: The same as `hidden` in the float model, kept up to date by the methods that use it.
    """

    hidden: Tensor
    keep: KeptTokens
    others: list[CallArguments]
    unrounded: Tensor


def _inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the model's forward pass, on its device."""
    device = next(model.parameters()).device
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")} | {"use_cache": False}


def blocks_return_tuple(model: PreTrainedModel, first: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Return whether blocks of this model return a tuple: the first one is computed for a row of the batch."""
    found: list[bool] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found.append(isinstance(output, tuple))
        raise StopForward

    handle = first.register_forward_hook(record)
    try:
        with suppress(StopForward):
            model(**_inputs(model, {name: values[:1] for name, values in batch.items()}))
    finally:
        handle.remove()
    return found[0]


def enter_blocks(
    model: PreTrainedModel, modules: list[nn.Module], batch: Mapping[str, Tensor], returns_tuple: bool
) -> BatchState:
    """Run the model as far as its blocks: the first block's input, and the other arguments of each.

    No block is computed: each returns the hidden states it is given.

    Args:
        model: The model.
        modules: Its blocks.
        batch: Texts, as `methods.apply` takes them.
        returns_tuple: `blocks_return_tuple` of the model.
    """
    inputs = _inputs(model, batch)
    calls = _BlockCalls(len(modules), returns_tuple)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(calls.record, with_kwargs=True).remove)
            # In the instance's dictionary, so that removing it gives back the forward of the class.
            vars(module)["forward"] = calls.pass_on
            stack.callback(vars(module).pop, "forward")

        hidden = calls.run(model, inputs)
    return BatchState(hidden, KeptTokens.of(inputs["attention_mask"]), calls.others, hidden)


class _BlockCalls:
    """Hooks that record how a model calls its blocks.

    Attributes:
        others: Arguments of each block of the latest pass, without the hidden states.
    """

    def __init__(self, count: int, returns_tuple: bool) -> None:
        self.others: list[CallArguments] = []
        self._count, self._returns_tuple = count, returns_tuple
        self._hidden: Tensor | None = None

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Run the model as far as its last block; returns the input of the first."""
        self.others.clear()
        with suppress(StopForward):
            model(**inputs)
        assert self._hidden is not None, "the first block was called"
        return self._hidden

    def record(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Record one call. A forward pre-hook of every block."""
        # Models pass the hidden states first, or by this name.
        keywords = dict(keywords)
        first = keywords.pop("hidden_states") if not arguments else arguments[0]
        self.others.append(CallArguments(arguments[1:], keywords))
        if len(self.others) == 1:
            self._hidden = first
        if len(self.others) == self._count:
            raise StopForward

    def pass_on(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return the hidden states in the form in which a block returns them. Forward of every block."""
        return (hidden_states,) if self._returns_tuple else hidden_states
