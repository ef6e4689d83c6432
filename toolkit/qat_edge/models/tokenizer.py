"""Tokenizer files, which are copied with the model into every artifact, and the tokens that end a generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qat_edge import remote_code
from qat_edge.errors import ModelError, RunError
from qat_edge.manifest import MANIFEST, how_to_restore, read_manifest
from qat_edge.models.hub import one_line
from qat_edge.models.tokenizer_check import (
    NAMED_TEMPLATES,
    check_settings,
    check_templates,
    native_errors,
    require_spelled,
)
from qat_edge.readers import read_json, shorten
from qat_edge.storage import disk_errors, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # which imports torch

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"
EOS = "eos_token_id"
# What the classes of tokenizers raise for files with wrong values, or of another class.
LOADING_ERRORS = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError, OSError,
    ImportError, NameError, StrictDataclassError,
)  # fmt: skip


def load_tokenizer(folder: Path, advice: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Args:
        folder: With the tokenizer's files.
        advice: What to do if it cannot be loaded, a sentence; by default that of a folder that qat-edge wrote.

    Raises:
        ModelError: It cannot be loaded, or no text could be encoded with it.
    """
    failure = f"{folder}: the tokenizer cannot be loaded from tokenizer.json, tokenizer_config.json and config.json"
    advice = advice or how_to_restore(folder)
    check_templates(folder)
    try:
        with native_errors(failure, advice), remote_code.refusals(folder):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=remote_code.permitted()
            )
    except LOADING_ERRORS as error:
        raise ModelError(f"{failure} ({one_line(error)}). {advice}") from error
    require_spelled(tokenizer, folder)
    check_settings(tokenizer, folder)
    return tokenizer


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the tokenizer's files in a folder, those of named chat templates with their folder's."""
    named = sorted(path.relative_to(folder).as_posix() for path in (folder / NAMED_TEMPLATES).glob("*.jinja"))
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()] + named


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the tokenizer byte for byte, so that the tokenizer of every artifact is the model's own."""
    for name in tokenizer_files(source):
        with disk_errors(target):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def end_tokens(folder: Path) -> list[int]:
    """Return the ids of all tokens that end a generation, without repetitions.

    They come from generation_config.json, config.json and the tokenizer, in this order.

    Raises:
        ModelError: None of the three names one, or one of the files is damaged.
    """
    # Chat models often name a second end token in generation_config.json alone.
    found: list[int] = []
    for name in (GENERATION_CONFIG, "config.json"):
        if (folder / name).is_file():
            found += _as_ids(_read_object(folder / name).get(EOS), f"{folder / name}")
    found += _as_ids(load_tokenizer(folder).eos_token_id, f"{folder}: the tokenizer")

    if not found:
        raise ModelError(
            f"{folder}: neither generation_config.json, config.json nor the tokenizer names an end token, so a "
            "generation would never end. Set eos_token_id in the model's generation_config.json."
        )
    return list(dict.fromkeys(found))


def model_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a loaded model and its tokenizer name as end tokens, without repetitions."""
    found: list[int] = []
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):  # encoders have none
        found += _as_ids(getattr(owner, EOS, None), type(owner).__name__)
    return list(dict.fromkeys(found))


def end_token_origins(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return which file of a loaded model names each of its end tokens."""
    # transformers copies the end tokens of config.json where there is no generation_config.json.
    owners = {
        "config.json": model.config,
        GENERATION_CONFIG: getattr(model, "generation_config", None),
        "the tokenizer": tokenizer,
    }
    ids = [(token, name) for name, owner in owners.items() for token in _as_ids(getattr(owner, EOS, None), name)]
    return dict(reversed(ids))


def stored_end_token_origins(folder: Path) -> dict[int, str]:
    """Return which file of a checkpoint names each of the tokens of `end_tokens`, in their order."""
    known = dict.fromkeys(end_tokens(folder), "the tokenizer")
    for name in (GENERATION_CONFIG, "config.json"):
        if (folder / name).is_file():
            known |= dict.fromkeys(_as_ids(_read_object(folder / name).get(EOS), name), name)
    return known


def trained_end_tokens(manifest: Mapping[str, Any]) -> list[int] | None:
    """Return the ids that ended the assistant's messages in training; None where a manifest has no record of them.

    Raises:
        ModelError: The record is damaged.
    """
    record = manifest.get("conversation")
    ids = record.get("end_of_turn") if isinstance(record, dict) else None
    return None if ids is None else _as_ids(ids, "manifest.json, end_of_turn")


def recorded_end_tokens(folder: Path) -> list[int] | None:
    """Return the ids that ended answers in training, from the manifest of any folder; None where it has no record."""
    try:
        return trained_end_tokens(read_manifest(folder))
    except (RunError, ModelError):
        return None


def trained_template_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments of the chat template that all conversations of the training had in common.

    Args:
        folder: frozen checkpoint or artifact; each has the record of its training.

    Raises:
        RunError: the record is damaged.
    """
    record = read_manifest(folder).get("conversation")  # folders of earlier versions have none
    arguments = {} if record is None else record.get("template_arguments", {}) if isinstance(record, dict) else None
    if not isinstance(arguments, dict):
        raise RunError(f"{folder / MANIFEST}: damaged ('conversation' has no template_arguments). Export again.")
    return arguments


def add_end_tokens(folder: Path, ids: Sequence[int]) -> None:
    """Write end tokens into a checkpoint's generation_config.json that none of its files names.

    Every exporter and runtime takes its end tokens from there. A folder that names them all is left as it is.
    """
    path = folder / GENERATION_CONFIG
    config = _read_object(path) if path.is_file() else {}
    try:
        known = end_tokens(folder)
    except ModelError:
        known = []
    if set(ids) - set(known):
        config[EOS] = list(dict.fromkeys([*known, *ids]))
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_object(path: Path) -> dict[str, Any]:
    document = read_json(path, ModelError)
    if not isinstance(document, dict):
        raise ModelError(f"{path}: damaged (no object). Copy the model again.")
    return document


def _as_ids(value: Any, where: str) -> list[int]:
    """Return `eos_token_id` as a list: files have one id, several or none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ModelError(f"{where}: {EOS} is {shorten(token)}, which is no token id.")
    return list(ids)
