"""Tokenizer files, which are copied with the model into every artifact, and the tokens that end a generation."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qat_edge import readers, remote_code
from qat_edge.errors import ModelError
from qat_edge.storage import disk_errors

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder that qat-edge wrote."""
    with remote_code.refusals(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code.permitted())


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the tokenizer byte for byte, so that the tokenizer of every artifact is the model's own."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with disk_errors(target):
                shutil.copyfile(source / name, target / name)


def end_tokens(folder: Path) -> list[int]:
    """Return the ids of all tokens that end a generation, without repetitions.

    They come from generation_config.json, config.json and the tokenizer, in this order.

    Raises:
        ModelError: None of the three names one.
    """
    # Chat models often name a second end token in generation_config.json alone.
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found += _as_list(readers.read_object(folder / name, ModelError).get("eos_token_id"))
    found += _as_list(load_tokenizer(folder).eos_token_id)

    if not found:
        raise ModelError(
            f"{folder}: neither generation_config.json, config.json nor the tokenizer names an end token, so a "
            "generation would never end. Set eos_token_id in the model's generation_config.json."
        )
    return list(dict.fromkeys(found))


def _as_list(value: int | list[int] | None) -> list[int]:
    """Return `eos_token_id` as a list: files have one id, several or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
