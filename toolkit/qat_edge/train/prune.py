"""Depth pruning: a model that keeps some of its decoder layers, chosen before training.

Which harm least: each layer is skipped alone, its input handed on as its output, and the harm is the mean of
KL(p || q) over calibration tokens, p of the whole model, q of the one without that layer, in nats. All are measured
against the whole model at once, not one after the other: neighbours that are redundant only together with each other
are both taken out. ShortGPT (https://arxiv.org/abs/2403.03853) does the same by the similarity of a layer's input and
output, which asks nothing of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat_edge import progress
from qat_edge.data import calibration
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import UsageError
from qat_edge.quant.layer_sensitivity import LOGIT_ROWS, decoder_layers

TOKENS = 2048  # of the training rows that harm is measured on, where there are as many


def choose_layers(
    model: Any,
    keep_layers: int,
    how: str,
    rows: TokenizedRows,
    tokenizer: Any,
    seed: int,
    device: str,
) -> list[int]:
    """Indices of the layers to keep, ascending. how: "first", or "least-harmful" to take out.

    Raises:
        UsageError: the model has fewer layers, or none would be left.
        ModelError: no list of decoder layers is found.
    """
    count = len(decoder_layers(model))
    if not 1 <= keep_layers <= count:
        raise UsageError(f"--keep-layers {keep_layers}: the model has {count} layers. Give 1 to {count - 1}.")
    if how == "first" or keep_layers == count:
        return list(range(keep_layers))
    tokens = min(TOKENS, rows.tokens)
    chosen = calibration.choose_rows(rows.rows, tokens, seed, "the training rows", "--prune least-harmful")
    progress.info(
        f"Skipping each of {count} layers alone on {tokens} tokens of the training rows, to see what it costs"
    )
    found = harms(model.to(device), calibration.batches(chosen, tokenizer))
    model.to("cpu")  # what follows is the same wherever it was measured
    least = sorted(range(count), key=lambda i: found[i])[: count - keep_layers]
    for i in sorted(least):
        progress.info(f"  layer {i} is taken out: skipped alone, KL {found[i]:.4f} nats a token")
    return [i for i in range(count) if i not in least]


def harms(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """What skipping each layer alone costs: mean KL from the whole model, nats a token."""
    layers = decoder_layers(model)
    sums, tokens = [0.0] * len(layers), 0
    with torch.no_grad(), progress.bar("measuring layers", len(layers) * len(batches)) as shown:
        for done, batch in enumerate(batches):
            wanted = batch["attention_mask"].to(model.device).bool()
            tokens += int(wanted.sum())
            log_p = _logits(model, batch)[wanted].float().log_softmax(-1)
            for i, layer in enumerate(layers):
                hook = layer.register_forward_hook(_skip, with_kwargs=True)
                try:
                    sums[i] += _divergence(log_p, _logits(model, batch)[wanted])
                finally:
                    hook.remove()
                shown.update(done * len(layers) + i + 1)
    return [total / tokens for total in sums]


def _skip(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: what went into a layer in the place of what came out."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """(rows, length, vocabulary)."""
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    return torch.as_tensor(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def _divergence(log_p: Tensor, logits: Tensor) -> float:
    """Sum of KL(p || q) over tokens, nats. log_p, logits: (tokens, vocabulary)."""
    total = 0.0
    for start in range(0, len(logits), LOGIT_ROWS):
        log_q = logits[start : start + LOGIT_ROWS].float().log_softmax(-1)
        part = functional.kl_div(log_q, log_p[start : start + LOGIT_ROWS], reduction="sum", log_target=True)
        total += float(part)
    return total
