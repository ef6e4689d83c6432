"""Longest sequences: the positions that a model was trained for. torch computes beyond them without an error."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from qat_edge.errors import ExportError
from qat_edge.quant import frozen_config

CHANGING_ROPE = ("dynamic", "longrope")  # rotary embeddings whose frequencies change with the length of the text


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence of a model that generates text, in tokens; None where its configuration has none.

    Where the frequencies of the rotary embedding change with the length, it is the length up to which they do not:
    training beyond it would train another function than the one that ships.
    """
    text = config.get_text_config(decoder=True)
    lengths = [getattr(text, "max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # of the model, or by layer type
        if isinstance(parameters, dict) and parameters.get("rope_type") in CHANGING_ROPE:
            lengths.append(parameters.get("original_max_position_embeddings"))
    return min((length for length in lengths if type(length) is int and length > 0), default=None)


def require_positions(length: int, most: int | None) -> None:
    """Refuse a context that is longer than a model has positions.

    Args:
        length: Tokens of the context.
        most: Positions of the model; None where it has no limit.

    Raises:
        ExportError: It is longer.
    """
    if most is not None and most < 1:
        raise ExportError(f"max_position_embeddings of the model is {most}, expected at least 1. Correct config.json.")
    if most is not None and length > most:
        raise ExportError(
            f"--context-length {length}: the model has positions for {most} tokens at most (max_position_embeddings; "
            "original_max_position_embeddings where the rotary embedding changes with the length). Give "
            f"{most} or less, or leave it out."
        )


def positions_of_folder(folder: Path) -> int | None:
    """Return `max_positions` of the model in a folder that qat-edge wrote.

    Raises:
        ModelError: config.json has a value that no model can have.
    """
    return max_positions(frozen_config.read(folder))
