"""Load a float model and its tokenizer from a Hub id, a local folder or a .gguf file.

Weights are read from safetensors or GGUF alone: a pickle can run code when it is read. Those of models that torchao
quantized are the exception (`torchao_checkpoint`). Code that comes with a model runs only with `trust_remote_code`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qat_edge import progress, remote_code
from qat_edge.errors import ModelError
from qat_edge.manifest import sha256
from qat_edge.models import (
    config_check,
    gguf_metadata,
    gguf_model,
    gguf_tokenizer,
    source_check,
    tasks,
    text_model,
    tokenizer_check,
    torchao_checkpoint,
    weights_check,
)
from qat_edge.models.hub import one_line
from qat_edge.models.load_config import (
    DOWNLOAD_ERRORS,
    TORCHAO,
    WRONG_VALUES,
    load_config,
    quantization_method,
    snapshot_of,
)
from qat_edge.models.tasks import CAUSAL_LM, ModelTask
from qat_edge.models.tokenizer import GENERATION_CONFIG, TOKENIZER_FILES, tokenizer_files
from qat_edge.models.weights_check import LoadReport
from qat_edge.readers import counted
from qat_edge_exporters.targets import DEFAULT_FORMATS, target_named

GGUF_MAGIC = b"GGUF"
PARSE_ERRORS = (*WRONG_VALUES, struct.error, OSError, SafetensorError)
# The classes of tokenizers fail in further ways where the files are of another class.
TOKENIZER_ERRORS = (*DOWNLOAD_ERRORS, ImportError, NameError)


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights and settings a model has; recorded in manifests.

    Attributes:
        kind: Form of the source: "hub", "folder" or "gguf".
        name: Hub id, absolute path of the folder, or name of the file.
        revision: Commit on the Hub.
        files: sha256 of local weight files by name.
        settings: sha256 of a local folder's other files that decide what the model computes, by path in the folder:
            configuration, tokenizer, chat templates.
    """

    kind: str
    name: str
    revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


class LoadedModel(NamedTuple):
    """A model in evaluation mode on the CPU, its tokenizer, and which weights it has."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity


def load_model(
    source: str,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    task: ModelTask = CAUSAL_LM,
    revision: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: Hub id, model folder or .gguf file.
        trust_remote_code: Run the code that comes with the model.
        dtype: Type of the weights in memory.
        task: The task the model is used for. A head that the checkpoint lacks for it is initialized with the same
            random weights every time.
        revision: Commit on the Hub; by default the newest one. A model that is not on the Hub has none.

    Raises:
        ModelError: There is no such model, it does not fit the task, it has no safetensors or no tokenizer, its tensors
            or tokens do not match, it is damaged, or another tool than torchao quantized it.
    """
    # What exists on disk is never looked up on the Hub.
    path = Path(source).expanduser()
    if path.is_file():
        return _load_gguf(path, dtype)
    if path.is_dir():
        return _load_folder(path, trust_remote_code, dtype, task)
    source_check.refuse_missing(source)
    return _load_hub(source, trust_remote_code, dtype, task, revision)


def encoder_config(source: str, trust_remote_code: bool) -> PretrainedConfig | None:
    """Return the configuration of an encoder, and None for any other model.

    It is None also where no configuration can be read: `load_model` then reports the reason.
    """
    # A .gguf file has no encoder, and a folder without a configuration no model.
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not os.path.lexists(path / "config.json")):
        return None
    try:
        config = load_config(source, trust_remote_code, source)
    except ModelError:
        return None
    return config if tasks.is_encoder_config(config) else None


def folder_of(identity: ModelIdentity) -> Path | None:
    """Return the folder with the files of a model that was loaded; None for a .gguf file."""
    if identity.kind == "hub":
        return snapshot_of(identity.name, identity.name, identity.revision)
    return Path(identity.name) if identity.kind == "folder" else None


def export_gaps(config: PretrainedConfig, formats: Sequence[str] = DEFAULT_FORMATS) -> dict[str, str]:
    """Return those of `formats` to which a model of this configuration cannot be exported, with a sentence why."""
    reasons = {name: target_named(name).missing_for(config) for name in formats}
    return {target: reason for target, reason in reasons.items() if reason}


# --- the three kinds of source -----------------------------------------------------------------------------


def _load_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    """Load a model for text generation from a GGUF file, dequantized."""
    # Settings and tensors that transformers would leave out are applied here, or refused by name.
    with reading_gguf(path):
        metadata = gguf_metadata.read_metadata(path)
        model, report = gguf_model.load(path, metadata, dtype)
        tokenizer = gguf_tokenizer_of(path)

    weights_check.check_loaded(model, report, str(path), CAUSAL_LM)
    weights_check.check_finite(model, str(path))
    weights_check.check_vocabulary(model, tokenizer, str(path))
    gguf_tokenizer.check_tokenizer(tokenizer, metadata, path)
    tokenizer_check.warn_of_losses(tokenizer, str(path))
    identity = ModelIdentity("gguf", path.name, files={path.name: sha256(path)})
    return LoadedModel(_without_quantizer(model), tokenizer, identity)


@contextmanager
def reading_gguf(path: Path) -> Iterator[None]:
    """Parse a GGUF file once inside the block, and report a file that cannot be read.

    Raises:
        ModelError: It is no GGUF file, damaged, or of an unknown architecture.
    """
    weights_check.refuse_pointers([path])
    # The reader of transformers fails in many ways on another format.
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}). Give a folder or a .gguf file.")
    try:
        with gguf_model.parsed_once():
            yield
    except PARSE_ERRORS as error:
        raise ModelError(
            f"{path}: cannot be loaded: damaged, or of an architecture that transformers cannot read from GGUF "
            f"({one_line(error)}). Download it again, or use the model's safetensors folder."
        ) from error


def gguf_tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a GGUF file."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _load_folder(path: Path, trust_remote_code: bool, dtype: torch.dtype, task: ModelTask) -> LoadedModel:
    """Load a model from a folder with config.json and safetensors."""
    checked = source_check.check_folder(path, trust_remote_code, task)
    chosen, weights, by_torchao = checked.config, checked.weights, checked.by_torchao
    try:
        if by_torchao:
            files = [file for file in weights if file.suffix == ".safetensors"]
            model, report = torchao_checkpoint.load_floats(path, chosen, dtype, str(path))
        else:
            files = weights_check.check_files(path)
            model, report = read_weights(
                str(path), chosen, trust_remote_code, dtype, task, checked.is_part, local_files_only=True
            )
    except PARSE_ERRORS as error:
        raise ModelError(
            f"{path}: the weights cannot be loaded ({one_line(error)}). Save the model again, or correct config.json."
        ) from error
    tokenizer = load_source_tokenizer(str(path), path, task, trust_remote_code, local_files_only=True)
    _check_model(model, report, files, tokenizer, str(path), task, checked.is_part)
    task.prepare(model)

    hashes = {p.name: sha256(p) for p in weights}
    identity = ModelIdentity("folder", str(path.resolve()), files=hashes, settings=_settings(path))
    return LoadedModel(_without_quantizer(model), tokenizer, identity)


def _load_hub(
    source: str, trust_remote_code: bool, dtype: torch.dtype, task: ModelTask, revision: str | None
) -> LoadedModel:
    """Load a model from the Hub, or from the cache of earlier downloads."""
    snapshot, chosen, is_part = source_check.check_hub(source, trust_remote_code, task, revision)
    revision = snapshot.name

    by_torchao = quantization_method(chosen) == TORCHAO
    try:
        if by_torchao:
            snapshot_download(source, revision=revision, allow_patterns=torchao_checkpoint.PATTERNS)
            model, report = torchao_checkpoint.load_floats(snapshot, chosen, dtype, source)
        else:
            model, report = read_weights(source, chosen, trust_remote_code, dtype, task, is_part, revision=revision)
    except (*DOWNLOAD_ERRORS, SafetensorError) as error:
        raise ModelError(
            f"{source}: its weights are not available as safetensors ({one_line(error)}). Pickled weights are not "
            "loaded; download the model to a folder, or use another one."
        ) from error
    tokenizer = load_source_tokenizer(
        source, snapshot, task, trust_remote_code, local_files_only=False, revision=revision
    )
    files = [] if by_torchao else weights_check.check_files(snapshot)
    config_check.read_config(snapshot, source)  # again, because the other files are here only now
    _check_model(model, report, files, tokenizer, source, task, is_part)
    task.prepare(model)

    return LoadedModel(_without_quantizer(model), tokenizer, ModelIdentity("hub", source, revision=revision))


def _settings(folder: Path) -> dict[str, str]:
    """Return the sha256 of the files of a model folder that decide what it computes, apart from its weights."""
    names = ["config.json", GENERATION_CONFIG, *tokenizer_files(folder), *(p.name for p in folder.glob("*.model"))]
    return {name: sha256(folder / name) for name in sorted({*names}) if (folder / name).is_file()}


# --- steps they share --------------------------------------------------------------------------------------


def read_weights(
    source: str,
    config: PretrainedConfig,
    trust_remote_code: bool,
    dtype: torch.dtype,
    task: ModelTask,
    is_part: bool,
    **where: Any,
) -> tuple[PreTrainedModel, LoadReport]:
    """Read the weights of a folder or a Hub id, and report which names did not match.

    Args:
        source: Folder or Hub id.
        config: Configuration of the model, or of the text model of a multimodal one.
        trust_remote_code: Run the code that comes with the model.
        dtype: Type of the weights in memory.
        task: The task the model is used for.
        is_part: The model is the text model of a multimodal one.
        where: `local_files_only` or `revision`.
    """
    with _reproducible_head(task):
        model, info = task.auto_class.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
            # Other shapes are part of the report, and refused there with their names.
            ignore_mismatched_sizes=True, output_loading_info=True,
            key_mapping=text_model.KEY_MAPPING if is_part else None, **where,
        )  # fmt: skip
    return model, LoadReport.from_transformers(info)


def _check_model(
    model: PreTrainedModel,
    report: LoadReport,
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    task: ModelTask,
    is_part: bool,
) -> None:
    """Refuse a model whose tensors, values or tokens do not match.

    Args:
        model: As it was loaded.
        report: Names that did not match.
        files: The safetensors files of the source.
        tokenizer: The model's tokenizer.
        source: Folder or Hub id, for messages.
        task: The task the model is used for.
        is_part: The model is the text model of a multimodal one.

    Raises:
        ModelError: Something does not match.
    """
    check_names(model, report, source, task, is_part)
    weights_check.check_buffers(model, files, source)
    weights_check.check_finite(model, source)
    weights_check.check_vocabulary(model, tokenizer, source)


def check_names(model: PreTrainedModel, report: LoadReport, source: str, task: ModelTask, is_part: bool) -> None:
    """Refuse a model whose tensors do not match those of its files by name and shape; arguments as in `_check_model`.

    Raises:
        ModelError: A tensor does not match.
    """
    if is_part:
        # The other models of a multimodal one are not needed for text.
        others, own = text_model.left_out(report.unexpected, model)
        parts = sorted({name.removeprefix("model.").partition(".")[0] for name in others})
        progress.info(
            f"{source}: a multimodal model, used for text alone as {type(model).__name__}; left out: "
            f"{', '.join(parts) or 'nothing'} ({counted(len(others), 'tensor')})"
        )
        report = LoadReport(report.missing, own, report.mismatched)
    weights_check.check_loaded(model, report, source, task)


@contextmanager
def _reproducible_head(task: ModelTask) -> Iterator[None]:
    """Initialize weights that an encoder's checkpoint lacks the same way every time, and leave the global RNG alone."""
    with torch.random.fork_rng(devices=[], enabled=task.is_encoder):
        if task.is_encoder:
            torch.manual_seed(0)
        yield


def load_source_tokenizer(
    source: str,
    folder: Path,
    task: ModelTask,
    trust_remote_code: bool,
    local_files_only: bool,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and check that it can encode and is the one in its files.

    Args:
        source: Folder or Hub id.
        folder: The folder, or the one in the Hub's cache.
        task: The task the model is used for.
        trust_remote_code: Run the code that comes with the tokenizer.
        local_files_only: Download nothing.
        revision: Commit on the Hub.
    """
    failure, advice = f"{source}: the model has no usable tokenizer", tokenizer_check.advice_for(folder)
    tokenizer_check.require_files(folder, TOKENIZER_FILES)
    tokenizer_check.check_templates(folder)
    try:
        with tokenizer_check.native_errors(failure, advice), remote_code.refusals(Path(source)):
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=trust_remote_code, local_files_only=local_files_only,
                revision=revision or "main",
            )  # fmt: skip
            # Where the files are missing, transformers builds a tokenizer of a class's special tokens for some types.
            words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
            is_empty = len(words) < 2 or not tokenizer.encode("a", add_special_tokens=False)
    except TOKENIZER_ERRORS as error:
        raise ModelError(f"{failure} ({one_line(error)}). {advice}") from error

    if is_empty:
        raise ModelError(f"{failure} (its vocabulary is empty). {advice}")
    tokenizer_check.check_tokenizer(tokenizer, folder, is_encoder=task.is_encoder)
    if not task.is_encoder:
        tokenizer_check.warn_of_losses(tokenizer, source)
    return tokenizer


def _without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the attributes that a dequantizing loader leaves behind: save_pretrained would refuse such a model."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    return model.eval()
