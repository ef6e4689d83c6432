"""Depth pruning: choose decoder layers to remove before training.

Each layer is skipped alone: its input is passed on as its output. Its cost is the mean of KL(p || q) over calibration
tokens in nats, where p is the prediction of the whole model and q that of the model without the layer. All costs are
measured on the whole model, not one removal after another: two neighbours may each be redundant only as long as the
other is there, and both would be removed. ShortGPT (https://arxiv.org/abs/2403.03853) ranks layers by the similarity of
their input and output instead, which does not need the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat_edge import progress
from qat_edge.data import calibration
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import UsageError
from qat_edge.models.decoder import decoder_layers
from qat_edge.quant.layer_sensitivity import LOGIT_ROWS

TOKENS = 2048  # of the training rows, or all where they have fewer


def require_layers(model: PreTrainedModel, keep_layers: int) -> int:
    """Return the number of layers of a model.

    Raises:
        UsageError: It has fewer than are to be kept.
    """
    count = len(decoder_layers(model))
    if not 1 <= keep_layers <= count:
        raise UsageError(f"--keep-layers {keep_layers}: the model has {count} layers. Give 1 to {count - 1}.")
    return count


def choose_layers(
    model: PreTrainedModel,
    keep_layers: int,
    how: str,
    rows: TokenizedRows,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    device: str,
) -> list[int]:
    """Choose the layers to keep, report the removed ones, and return the indices of the kept ones, ascending.

    Args:
        model: On the CPU.
        keep_layers: Number of layers to keep.
        how: "first" to keep the first ones, "least-harmful" to remove those of the least cost.
        rows: Training rows; the cost is measured on a part of them, chosen with `seed`.
        tokenizer: The model's tokenizer.
        device: Device to measure on.

    Raises:
        UsageError: The model does not have that many layers.
    """
    count = require_layers(model, keep_layers)
    if how == "first" or keep_layers == count:
        return list(range(keep_layers))

    tokens = min(TOKENS, rows.tokens)
    chosen = calibration.choose_rows(rows.rows, tokens, seed, "the training rows", "--prune least-harmful")
    progress.info(f"Measuring the cost of each of {count} layers on {tokens} tokens of the training rows")
    costs = layer_costs(model.to(device), calibration.make_batches(chosen, tokenizer))
    model.to("cpu")  # the steps that follow must not depend on the device

    # Remove the layers of the least cost.
    removed = sorted(range(count), key=lambda i: costs[i])[: count - keep_layers]
    for i in sorted(removed):
        progress.info(f"  removing layer {i}: without it alone, KL is {costs[i]:.4f} nats per token")
    return [i for i in range(count) if i not in removed]


def layer_costs(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Return the cost of each layer: the mean KL from the whole model to the model without it, nats per token."""
    layers = decoder_layers(model)
    sums, tokens = [0.0] * len(layers), 0
    with torch.no_grad(), progress.bar("measuring layers", len(layers) * len(batches)) as shown:
        for done, batch in enumerate(batches):
            is_token = batch["attention_mask"].to(model.device).bool()
            tokens += int(is_token.sum())
            # The prediction of the whole model, then of the model without each layer.
            log_p = _logits(model, batch)[is_token].float().log_softmax(-1)
            for i, layer in enumerate(layers):
                hook = layer.register_forward_hook(_skip, with_kwargs=True)
                try:
                    sums[i] += _divergence(log_p, _logits(model, batch)[is_token])
                finally:
                    hook.remove()
                shown.update(done * len(layers) + i + 1)
    return [total / tokens for total in sums]


def _skip(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | tuple[Any, ...]
) -> Tensor | tuple[Any, ...]:
    """Forward hook: return a layer's input in the place of its output."""
    # Architectures differ in whether hidden states are a positional argument, and whether a layer returns a tuple.
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a batch, (rows, length, vocabulary)."""
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    return torch.as_tensor(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def _divergence(log_p: Tensor, logits: Tensor) -> float:
    """Return the sum of KL(p || q) over tokens in nats. log_p, logits: (tokens, vocabulary)."""
    # In chunks, to bound the memory of the float32 copies.
    total = 0.0
    for start in range(0, len(logits), LOGIT_ROWS):
        log_q = logits[start : start + LOGIT_ROWS].float().log_softmax(-1)
        part = functional.kl_div(log_q, log_p[start : start + LOGIT_ROWS], reduction="sum", log_target=True)
        total += float(part)
    return total
