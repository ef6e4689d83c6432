"""Longest sequences: the positions that a model was trained for, and the context of an artifact.

torch computes beyond the positions without an error; an artifact's runtime refuses what is beyond its context.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from qat_edge import remote_code
from qat_edge.manifest import read_manifest


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the longest sequence of a model that generates text, in tokens; None where its configuration has none."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if type(found) is int and found > 0 else None


def positions_of_folder(folder: Path) -> int | None:
    """Return `max_positions` of the model in a folder that qat-edge wrote."""
    with remote_code.refusals(folder):
        trusted = remote_code.permitted()
        return max_positions(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted))


def context_of_artifact(folder: Path) -> int:
    """Return the tokens of prompt and answer together that an artifact holds, from its manifest."""
    length: int = read_manifest(folder)["options"]["context_length"]
    return length
