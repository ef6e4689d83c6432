"""The tokenizer's files, which travel with the model to every artifact, and the tokens that end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qat_edge.errors import ModelError
from qat_edge.run import disk_errors

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip


def load(folder: Path) -> Any:
    """The tokenizer of a folder that qat-edge wrote."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def copy_files(source: Path, target: Path) -> None:
    """Byte for byte, so that every artifact's tokenizer is the model's."""
    for name in FILES:
        if (source / name).is_file():
            with disk_errors(target):
                shutil.copyfile(source / name, target / name)


def end_tokens(folder: Path) -> list[int]:
    """Every token that ends an answer: of generation_config.json, of config.json, of the tokenizer, in this order.

    Raises:
        ModelError: none of them names one.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found += _as_list(json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id"))
    found += _as_list(load(folder).eos_token_id)
    if not found:
        raise ModelError(
            f"{folder}: neither generation_config.json, config.json nor the tokenizer names an end token, so no answer "
            "would ever end. Set eos_token_id in the model's generation_config.json."
        )
    return list(dict.fromkeys(found))


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
