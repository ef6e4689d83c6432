"""Effect of the rotation at the start of QAT on a model without its weights.

Which parts of a model can be rotated is found by trial (`quant.rotation`), which needs numbers. The trial is made on a
stand-in: the same architecture and widths with two layers, a few tokens, and random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.models.layer_removal import keep_settings
from qat_edge.options import FinetuneOptions
from qat_edge.quant import rotated_norm, rotation
from qat_edge.quant.scheme import Scheme, shares_table
from qat_edge.train import model_options

LAYERS = 2
VOCABULARY = 64


@dataclass(frozen=True)
class RotationOutcome:
    """Changes of a model by its rotation, besides those of values.

    Attributes:
        is_on: Something is rotated.
        norms: Names of the norms whose output is multiplied by a matrix (width, width) of its own.
        unties: Embedding and head no longer share a table.
    """

    is_on: bool = False
    norms: tuple[str, ...] = ()
    unties: bool = False


def find_outcome(
    model: PreTrainedModel, options: FinetuneOptions, choose_scheme: Callable[[PreTrainedModel], Scheme]
) -> RotationOutcome:
    """Return the effect of the rotation that `finetune` would make at the start of QAT.

    Args:
        model: May be on the meta device.
        options: Of finetune.
        choose_scheme: Returns the scheme of a model with the options.

    Raises:
        UsageError: --rotate on, and the model allows no rotation.
    """
    if not model_options.requests_rotation(options):
        return RotationOutcome()
    stand_in = _stand_in(model)
    scheme = choose_scheme(stand_in)
    was_shared = shares_table(stand_in)
    if options.rotate == "on":
        model_options.require_rotatable(stand_in, scheme)
    try:
        progress.info(rotation.rotate(stand_in, scheme, options.seed).describe())
    except ModelError as error:
        progress.warn(f"Rotation is off: {error}")
        return RotationOutcome()
    return RotationOutcome(
        True, tuple(rotated_norm.output_rotations(stand_in)), was_shared and not shares_table(stand_in)
    )


def apply_outcome(model: PreTrainedModel, outcome: RotationOutcome) -> None:
    """Give a model the tensors that a rotation adds; their values have no meaning."""
    width = model.get_input_embeddings().weight.shape[1]
    for name in outcome.norms:
        norm = model.get_submodule(name)
        rotated_norm.rotate_output(norm, torch.empty(width, width, device=next(norm.parameters()).device))
    if outcome.unties:
        rotation.untie(model)


def _stand_in(model: PreTrainedModel) -> PreTrainedModel:
    """Return a small model of the same architecture, with random weights."""
    config = copy.deepcopy(model.config)
    kept = list(range(min(LAYERS, config.num_hidden_layers)))
    keep_settings(config, kept)
    config.vocab_size = min(VOCABULARY, config.vocab_size)
    # A padding token beyond the vocabulary would be no row of the table.
    config.pad_token_id = None
    if getattr(config, "intermediate_size", None):
        config.intermediate_size = min(config.intermediate_size, config.hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(config).eval()
