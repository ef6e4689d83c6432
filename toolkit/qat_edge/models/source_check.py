"""Check the files and the configuration of a model, and find out what to load, before any weight is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from qat_edge.errors import ModelError
from qat_edge.models import hub, sentence_modules, torchao_checkpoint, weights_check
from qat_edge.models.load_config import (
    TORCHAO,
    check_read_keys,
    check_sizes,
    check_task,
    load_config,
    quantization_method,
    snapshot_of,
)
from qat_edge.models.tasks import ModelTask, SentenceEncoder
from qat_edge.models.tokenizer import TOKENIZER_FILES
from qat_edge.path_names import is_path


def refuse_missing(source: str) -> None:
    """Refuse a source that is no file or folder here and looks like a path: the Hub's message would hide the mistake.

    Raises:
        ModelError: It is one.
    """
    if Path(source).suffix.lower() == ".gguf" or is_path(source):
        raise ModelError(f"{source}: no such file or folder. Give a Hub id, a model folder or a .gguf file.")


class CheckedFolder(NamedTuple):
    """A model folder whose files and configuration were checked before its weights are read.

    Attributes:
        config: Configuration to load: of the model, or of the text model of a multimodal one.
        is_part: It is that of a text model.
        weights: Files with weights.
        by_torchao: torchao quantized the model.
    """

    config: PretrainedConfig
    is_part: bool
    weights: list[Path]
    by_torchao: bool


def check_folder(path: Path, trust_remote_code: bool, task: ModelTask) -> CheckedFolder:
    """Check the files and the configuration of a model folder.

    Raises:
        ModelError: A file is missing, or the configuration rules the model out.
    """
    # Check the files first: the messages of transformers for a missing one do not say what to do.
    weights_check.refuse_adapters((p.name for p in path.iterdir()), str(path))
    if not os.path.lexists(path / "config.json"):
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        hint = " Give the .gguf file itself." if any(path.glob("*.gguf")) else ""
        raise ModelError(f"{path}: not a model folder, it has no config.json (found: {found}).{hint}")
    # Refuse what the configuration rules out before gigabytes of weights are read.
    config = load_config(str(path), trust_remote_code, f"{path}: config.json cannot be used")
    chosen = check_task(config, str(path), trust_remote_code, task)
    by_torchao = quantization_method(config) == TORCHAO
    weights = torchao_checkpoint.weight_files(path) if by_torchao else sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = ", ".join(p.name for p in sorted([*path.glob("*.bin"), *path.glob("*.pth")]))
        raise ModelError(
            f"{path}: no *.safetensors here (found: {pickles or 'no weights'}). Pickled weights can run code when they "
            "are read and are not loaded; save the model with save_pretrained(..., safe_serialization=True)."
        )

    for file in weights:
        if not file.is_file():
            raise ModelError(f"{file}: a link to nowhere, or no file. Copy the model again.")
    weights_check.refuse_pointers([*weights, *(path / name for name in TOKENIZER_FILES)])
    check_read_keys(chosen, path, str(path), chosen is not config)
    check_sizes(chosen, path, sum(file.stat().st_size for file in weights))
    if isinstance(task, SentenceEncoder):
        sentence_modules.check_modules(str(path))
    return CheckedFolder(chosen, chosen is not config, weights, by_torchao)


class CheckedHub(NamedTuple):
    """A model on the Hub whose configuration was checked before its weights are downloaded.

    Attributes:
        snapshot: Folder in the Hub's cache, named after the commit.
        config: Configuration to load: of the model, or of the text model of a multimodal one.
        is_part: It is that of a text model.
    """

    snapshot: Path
    config: PretrainedConfig
    is_part: bool


def check_hub(source: str, trust_remote_code: bool, task: ModelTask, revision: str | None = None) -> CheckedHub:
    """Download and check the configuration of a model on the Hub.

    Raises:
        ModelError: It is not available, or the configuration rules the model out.
    """
    # Downloads of earlier runs are in the cache, so an unreachable Hub is no error yet.
    offline = hub.unreachable_reason()
    outcome = f"cannot be reached ({offline})" if offline else "does not provide it"
    failure = f"{source}: no such local folder, and the Hub {outcome}"

    # Everything is read at the commit of the configuration: the branch may move in between.
    snapshot = snapshot_of(source, failure, revision)
    revision = snapshot.name
    config = load_config(source, trust_remote_code, failure, revision)
    chosen = check_task(config, source, trust_remote_code, task)
    check_read_keys(chosen, snapshot, source, chosen is not config)
    adapter = find_adapter_config_file(source, revision=revision)
    weights_check.refuse_adapters([Path(adapter).name] if adapter else [], source)
    if isinstance(task, SentenceEncoder):
        sentence_modules.check_modules(source, revision)
    return CheckedHub(snapshot, chosen, chosen is not config)
