"""Load a float model and its tokenizer from a Hub id, a local folder or a .gguf file.

Weights are read from safetensors or GGUF alone: a pickle can run code when it is read. Code that comes with a model
runs only with `trust_remote_code`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx2
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qat_edge import readers, remote_code
from qat_edge.errors import ModelError
from qat_edge.manifest import sha256
from qat_edge.models import hub, tasks
from qat_edge.models.hub import one_line
from qat_edge.models.tasks import CAUSAL_LM, ModelTask, SentenceEncoder
from qat_edge_exporters.targets import FORMATS, target_named

GGUF_MAGIC = b"GGUF"
# Everything that parsers raise for a file that is truncated or overwritten, depending on where it is damaged.
WRONG_VALUES = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip
PARSE_ERRORS = (*WRONG_VALUES, struct.error, OSError, SafetensorError)
DOWNLOAD_ERRORS = (*WRONG_VALUES, OSError, httpx2.HTTPError)
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights a model has; recorded in manifests.

    Attributes:
        kind: Form of the source: "hub", "folder" or "gguf".
        name: Hub id, absolute path of the folder, or name of the file.
        revision: Commit on the Hub.
        files: sha256 of local weight files by name.
    """

    kind: str
    name: str
    revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)


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
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: Hub id, model folder or .gguf file.
        trust_remote_code: Run the code that comes with the model.
        dtype: Type of the weights in memory.
        task: The task the model is used for. A head that the checkpoint lacks for it is initialized with the same
            random weights every time.

    Raises:
        ModelError: There is no such model, it does not fit the task, it has no safetensors or no tokenizer, it is
            damaged, or it is quantized already.
    """
    # What exists on disk is never looked up on the Hub.
    path = Path(source).expanduser()
    if path.is_file():
        return _load_gguf(path, dtype)
    if path.is_dir():
        return _load_folder(path, trust_remote_code, dtype, task)
    # Strings that look like paths are local too: the Hub's message would hide the typing error.
    if path.suffix.lower() == ".gguf" or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such file or folder. Give a Hub id, a model folder or a .gguf file.")
    return _load_hub(source, trust_remote_code, dtype, task)


def encoder_config(source: str, trust_remote_code: bool) -> PretrainedConfig | None:
    """Return the configuration of an encoder, and None for any other model.

    It is None also where no configuration can be read: `load_model` then reports the reason.
    """
    # A .gguf file has no encoder, and a folder without a configuration no model.
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return None
    try:
        config = _load_config(source, trust_remote_code, source)
    except ModelError:
        return None
    return config if tasks.is_encoder_config(config) else None


def export_gaps(config: PretrainedConfig) -> dict[str, str]:
    """Return the formats to which a model of this configuration cannot be exported: format -> reason, a sentence."""
    reasons = {name: target_named(name).missing_for(config) for name in FORMATS}
    return {target: reason for target, reason in reasons.items() if reason}


# --- the three kinds of source -----------------------------------------------------------------------------


def _load_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    """Load a model for text generation from a GGUF file, dequantized."""
    # The reader of transformers fails in many ways on another format.
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {magic!r}). Give a folder or a .gguf file.")

    # Quantized tensors are dequantized while reading, so the model is a float one.
    arguments = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **arguments, dtype=dtype, quantization_config=GgufConfig(dequantize=True), trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(**arguments, trust_remote_code=False)
    except PARSE_ERRORS as error:
        raise ModelError(
            f"{path}: cannot be loaded: damaged, or of an architecture that transformers cannot read from GGUF "
            f"({one_line(error)}). Download it again, or use the model's safetensors folder."
        ) from error

    identity = ModelIdentity("gguf", path.name, files={path.name: sha256(path)})
    return LoadedModel(_without_quantizer(model), tokenizer, identity)


def _load_folder(path: Path, trust_remote_code: bool, dtype: torch.dtype, task: ModelTask) -> LoadedModel:
    """Load a model from a folder with config.json and safetensors."""
    # Check the files first: the messages of transformers for a missing one do not say what to do.
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        hint = " Give the .gguf file itself." if any(path.glob("*.gguf")) else ""
        raise ModelError(f"{path}: not a model folder, it has no config.json (found: {found}).{hint}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = ", ".join(p.name for p in sorted([*path.glob("*.bin"), *path.glob("*.pth")]))
        raise ModelError(
            f"{path}: no *.safetensors here (found: {pickles or 'no weights'}). Pickled weights can run code when they "
            "are read and are not loaded; save the model with save_pretrained(..., safe_serialization=True)."
        )

    # Refuse what the configuration rules out before gigabytes of weights are read.
    config = _load_config(str(path), trust_remote_code, f"{path}: config.json cannot be used")
    _check_task(config, str(path), trust_remote_code, task)
    _check_sizes(config, path, sum(file.stat().st_size for file in weights))
    if isinstance(task, SentenceEncoder):
        _check_pooling(path)

    try:
        with _reproducible_head(task):
            model = task.auto_class.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
    except PARSE_ERRORS as error:
        raise ModelError(f"{path}: the weights cannot be loaded ({one_line(error)}). Save them again.") from error
    tokenizer = _load_tokenizer(str(path), trust_remote_code, local_files_only=True)
    task.prepare(model)

    identity = ModelIdentity("folder", str(path.resolve()), files={p.name: sha256(p) for p in weights})
    return LoadedModel(_without_quantizer(model), tokenizer, identity)


def _load_hub(source: str, trust_remote_code: bool, dtype: torch.dtype, task: ModelTask) -> LoadedModel:
    """Load a model from the Hub, or from the cache of earlier downloads."""
    # Downloads of earlier runs are in the cache, so an unreachable Hub is no error yet.
    offline = hub.unreachable_reason()
    outcome = f"cannot be reached ({offline})" if offline else "does not provide it"
    config = _load_config(source, trust_remote_code, f"{source}: no such local folder, and the Hub {outcome}")
    _check_task(config, source, trust_remote_code, task)

    # Weights and tokenizer are read at the commit of the configuration: the branch may move in between.
    try:
        with _reproducible_head(task):
            model = task.auto_class.from_pretrained(
                source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
                revision=config._commit_hash,
            )  # fmt: skip
    except (*DOWNLOAD_ERRORS, SafetensorError) as error:
        raise ModelError(
            f"{source}: its weights are not available as safetensors ({one_line(error)}). Pickled weights are not "
            "loaded; download the model to a folder, or use another one."
        ) from error
    tokenizer = _load_tokenizer(source, trust_remote_code, local_files_only=False, revision=config._commit_hash)
    task.prepare(model)

    return LoadedModel(_without_quantizer(model), tokenizer, ModelIdentity("hub", source, revision=config._commit_hash))


# --- steps they share --------------------------------------------------------------------------------------


def _load_config(source: str, trust_remote_code: bool, failure: str) -> PretrainedConfig:
    """Read a configuration. failure: the beginning of the message where that is impossible."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except DOWNLOAD_ERRORS as error:
        remote = " --trust-remote-code runs the model's own code." if "trust_remote_code" in str(error) else ""
        raise ModelError(
            f"{failure}: {one_line(error)}.{remote} Check the name, the network and the access rights, or "
            "give a local folder."
        ) from error
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"{failure}: architectures is {readers.show(names)}, expected a list of names.")
    remote_code.require_no_kernels({name: getattr(config, name, None) for name in remote_code.KERNELS}, source)
    return config


@contextmanager
def _reproducible_head(task: ModelTask) -> Iterator[None]:
    """Initialize weights that an encoder's checkpoint lacks the same way every time, and leave the global RNG alone."""
    with torch.random.fork_rng(devices=[], enabled=task.is_encoder):
        if task.is_encoder:
            torch.manual_seed(0)
        yield


def _check_task(config: PretrainedConfig, source: str, trust_remote_code: bool, task: ModelTask) -> None:
    """Refuse a model that does not fit the task or is quantized already, before its weights are read."""
    # Codes of another quantizer cannot be trained, and rounding them again would lose twice.
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ModelError(
            f"{source}: is quantized already ({settings.get('quant_method', 'unknown method')}). "
            "Start from the float model it was made from."
        )

    # Trust an encoder's configuration; a missing head is newly initialized.
    if task.is_encoder and tasks.is_encoder_config(config):
        task.configure(config)
        return

    # A model with code of its own is trusted to be what its auto_map says.
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "none")]
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not remote and (config.is_encoder_decoder or not known.intersection(names)):
        raise ModelError(
            f"{source}: not a causal language model (model type {config.model_type}, architecture "
            f"{', '.join(names)}). Use one that generates text, such as Llama, Qwen or SmolLM."
        )


def _check_sizes(config: PretrainedConfig, folder: Path, weight_bytes: int) -> None:
    """Refuse a configuration whose matrices cannot be in the weights: making them could take all memory.

    Raises:
        ModelError: A size is no positive number, or a matrix has more elements than the files have bytes.
    """

    def size(name: str, default: int = 1) -> int:
        value = getattr(config, name, None)
        if value is None:
            return default
        if type(value) is not int or value < 1:
            raise ModelError(f"{folder}: config.json has {name} {readers.show(value)}. Restore the file.")
        return value

    hidden, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    head = size("head_dim", max(1, hidden // heads))
    widest = max(size("vocab_size"), size("intermediate_size"), max(heads, size("num_key_value_heads")) * head)
    # An element takes a byte or more, and a layer has a norm of the hidden size.
    if max(widest, layers) * hidden > weight_bytes or layers > MOST_LAYERS:
        raise ModelError(
            f"{folder}: config.json describes a model of {readers.shorten(layers)} layers with matrices up to "
            f"{readers.shorten(widest)} x {readers.shorten(hidden)}, which is not in the {weight_bytes} bytes of its "
            "weights. Restore config.json."
        )


def _check_pooling(folder: Path) -> None:
    """Refuse a sentence encoder that sentence-transformers pools otherwise than by the mean."""
    # sentence-transformers keeps each module next to the model's own files in a numbered folder.
    path = folder / "1_Pooling" / "config.json"
    settings = readers.read_object(path, ModelError) if path.is_file() else {}

    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    if modes not in ([], ["pooling_mode_mean_tokens"]):
        raise ModelError(
            f"{path}: {', '.join(modes)}; qat-edge supports embeddings that are the mean of a text's tokens, and no "
            "others. Use a model with mean pooling."
        )


def _load_tokenizer(
    source: str, trust_remote_code: bool, local_files_only: bool, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and check that it can encode. revision: commit on the Hub."""
    failure = f"{source}: the model has no usable tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=local_files_only,
            revision=revision or "main",
        )  # fmt: skip
    except (*DOWNLOAD_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{failure} ({one_line(error)}). Put its tokenizer.json next to the weights.") from error

    # For some model types transformers builds an empty tokenizer where the files are missing.
    if len(tokenizer) < 2 or not tokenizer.encode("a", add_special_tokens=False):
        raise ModelError(f"{failure} (its vocabulary is empty). Put its tokenizer.json next to the weights.")
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
