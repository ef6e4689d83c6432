"""Check that a model keeps rows apart that are packed into one sequence, by its own outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat_edge.errors import UsageError
from qat_edge.quant.autocast import trial_pass

LENGTHS = (7, 12, 5)  # tokens of the rows that are compared; no model has so few positions
# Greatest difference of a logit, in standard deviations of the logits. Of the models of tools/sweep_architectures.py,
# those that keep rows apart differ by 5e-6 at most, the others by 1.4e-3 at least; SmolLM2's 30 layers by 1.2e-5.
TOLERANCE = 3e-4


def require_packing(model: PreTrainedModel) -> None:
    """Refuse a model whose outputs for a row change when other rows are in the same sequence.

    Raises:
        UsageError: They change, or the model takes no positions.
    """
    name = type(model).__name__
    try:
        difference = packing_difference(model)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = f"{name} takes no positions of tokens ({' '.join(str(error).split())[:200]})"
    else:
        if difference <= TOLERANCE:
            return
        reason = f"the outputs of {name} for a row depend on the other rows of its sequence (by {difference:.2g})"
    raise UsageError(f"--packing: {reason}, so it would be trained on another function. Leave it out.")


def packing_difference(model: PreTrainedModel) -> float:
    """Return the greatest difference between logits of packed and of separate rows, in standard deviations."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [torch.randint(vocabulary, (1, length), generator=generator).to(model.device) for length in LENGTHS]
    positions = torch.cat([torch.arange(length, device=model.device) for length in LENGTHS])[None]
    with trial_pass(model):
        separate = torch.cat([_logits(model, row) for row in rows], 1)
        packed = _logits(model, torch.cat(rows, 1), positions)
    return float((packed - separate).abs().max() / separate.std())


def _logits(model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the logits of sequences, (rows, length, vocabulary)."""
    arguments = {} if positions is None else {"position_ids": positions}
    # A cache would mean that the sequence goes on from an earlier one, and no borders are looked for.
    return torch.as_tensor(model(input_ids=ids, use_cache=False, **arguments).logits).float()
