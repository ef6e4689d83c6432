"""Codes of a head in groups, chosen on calibration data like those of the layers in the blocks.

Rounded to nearest, a 4-bit head is the most expensive weight of a model. That of SmolLM2, rotated and with all else in
float, cost 0.080 nats of KL on 1500 tokens of the demo's task; in codes of coordinate descent it cost 0.005 (int8:
0.0006).

H = sum x x^T is over the head's inputs in the float model, rounded as in deployment. An embedding that shares the table
gets the same codes. Its error counts by the damping, which adds lambda || W - Q ||^2 to the cost: with 0.1 of the mean
diagonal of H, the rows of that table were off by 9.9%, rounded to nearest by 9.5%.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from qat_edge import progress
from qat_edge.quant import numerics
from qat_edge.quant.ptq.block_calls import KeptTokens, StopForward
from qat_edge.quant.ptq.blockwise import Calibration, gram, output_energy, token_rows
from qat_edge.quant.ptq.gptq import Compensated, inverse_factor
from qat_edge.quant.scheme import Scheme, WeightScheme, shares_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.1  # of the Hessian's mean diagonal
ROWS = 16384  # of a table at once: a vocabulary of 128,000 tokens would take several GB

# (target, hessian, factor, scheme) -> codes, as GPTQ.choose_codes
Choice = Callable[[Tensor, Tensor, Tensor, WeightScheme], Compensated]


def quantize_tables(
    model: PreTrainedModel, scheme: Scheme, calibration: Sequence[Calibration], choose: Choice
) -> dict[str, Tensor]:
    """Change a head in groups, in place, so that rounding gives codes that keep its outputs.

    Args:
        model: A float model.
        scheme: Bits and group size by module name.
        calibration: Batches of texts.
        choose: Chooses codes, (out, in).

    Returns:
        Scales (out, in // group) of the head, and of an embedding that shares its table, by module name; none where the
        head has no groups, has an adapter, or shares a table with an embedding of other bits.

    Raises:
        DataError: The inputs do not determine the weights.
    """
    if not scheme.head or not scheme.weights[scheme.head].has_groups:
        return {}
    head: Any = model.get_submodule(scheme.head)
    shared = shares_table(model)
    if isinstance(head, BaseTunerLayer) or (shared and not scheme.tied):
        why = "has an adapter" if isinstance(head, BaseTunerLayer) else "shares a table with an embedding of other bits"
        progress.info(f"The head {why}: it is rounded to nearest")
        return {}

    spec = scheme.weights[scheme.head]
    hessian = _hessian(model, head, calibration)
    with torch.autocast(hessian.device.type, enabled=False):
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
        factor = inverse_factor(hessian, scheme.head)
        error = nearest = energy = 0.0
        scales: list[Tensor] = []
        for rows in head.weight.data.split(ROWS):  # views: rows are independent
            target = rows.float().clone()
            kept, found = choose(target, hessian, factor, spec)
            rounded = numerics.fake_quantize_weight(kept, spec.codebook, spec.group_size, found)
            by_nearest = numerics.fake_quantize_weight(target, spec.codebook, spec.group_size)
            error += float(output_energy(rounded - target, hessian))
            nearest += float(output_energy(by_nearest - target, hessian))
            energy += float(output_energy(target, hessian))
            rows.copy_(kept)
            scales.append(found)
    ours, theirs = ((cost / energy) ** 0.5 for cost in (error, nearest))
    progress.info(f"Outputs of the head are off by {ours:.1%}, rounded to nearest by {theirs:.1%}")
    names = [scheme.embedding, scheme.head] if shared else [scheme.head]
    return dict.fromkeys(names, torch.cat(scales))


def _hessian(model: PreTrainedModel, head: Any, calibration: Sequence[Calibration]) -> Tensor:
    """Return the sum of x x^T over the head's inputs in the float model, rounded to int8: (in, in), float32."""
    device = head.weight.device
    found = torch.zeros(head.weight.shape[1], head.weight.shape[1], device=device)
    keep = KeptTokens.of(torch.ones(0))

    def add(module: Any, arguments: tuple[Any, ...]) -> None:
        found.add_(gram(token_rows(numerics.fake_quantize_activation(arguments[0]), keep)))
        raise StopForward  # the logits are the largest tensor of all

    handle = head.register_forward_pre_hook(add)
    try:
        for batch in calibration:
            mask = batch["attention_mask"].to(device)
            keep = KeptTokens.of(mask)
            with suppress(StopForward):
                model(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    return found
