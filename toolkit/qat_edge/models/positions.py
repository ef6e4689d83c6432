"""Number of positions that a model was trained for. torch computes beyond it without an error; artifacts refuse to."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from qat_edge import remote_code


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence of a model that generates text, in tokens; None where its configuration has none."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if type(found) is int and found > 0 else None


def positions_of_folder(folder: Path) -> int | None:
    """Return `max_positions` of the model in a folder that qat-edge wrote."""
    with remote_code.refusals(folder):
        trusted = remote_code.permitted()
        return max_positions(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted))
