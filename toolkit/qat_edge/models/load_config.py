"""Read the configuration of a model from a folder or the Hub, and refuse what it rules out before weights are read."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub.errors import RepositoryNotFoundError, StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from qat_edge import readers, remote_code
from qat_edge.errors import ModelError
from qat_edge.models import config_check, config_keys, experts, hub, tasks, text_model
from qat_edge.models.hub import one_line
from qat_edge.models.tasks import ModelTask
from qat_edge.options import MOST_LAYERS

# Everything that parsers raise for a file that is truncated or overwritten, depending on where it is damaged.
WRONG_VALUES = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip
TORCHAO = "torchao"  # method of a quantized model that `models.torchao_checkpoint` reads
DOWNLOAD_ERRORS = (*WRONG_VALUES, OSError, httpx2.HTTPError)


def snapshot_of(source: str, failure: str, revision: str | None) -> Path:
    """Return the folder in the Hub's cache with the files of a model's commit; it is named after the commit.

    Args:
        source: Hub id.
        failure: The beginning of the message where there is none.
        revision: The commit; the newest one by default.
    """
    try:
        return Path(str(cached_file(source, "config.json", revision=revision or "main"))).parent
    except DOWNLOAD_ERRORS as error:
        raise _unavailable(failure, error, source=source) from error


def load_config(source: str, trust_remote_code: bool, failure: str, revision: str | None = None) -> PretrainedConfig:
    """Read a configuration.

    Args:
        source: Folder or Hub id.
        trust_remote_code: Run the code that comes with the model.
        failure: The beginning of the message where that is impossible.
        revision: Commit on the Hub.
    """
    is_local = Path(source).is_dir()
    folder = Path(source) if is_local else snapshot_of(source, failure, revision)
    document = config_check.read_config(folder, source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision or "main")
    except DOWNLOAD_ERRORS as error:
        raise _unavailable(failure, error, is_local) from error
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"{failure}: architectures is {readers.show(names)}, expected a list of names.")
    other = getattr(config, "transformers_weights", None)
    if other is not None:
        raise ModelError(
            f"{failure}: transformers_weights names {readers.show(other)}, and weights are read from model.safetensors "
            "or the files of its index alone. Rename the file, and remove the entry."
        )
    remote_code.require_no_kernels({name: getattr(config, name, None) for name in remote_code.KERNELS}, source)
    config_check.return_plain_outputs(config)
    text_model.remove_unstated_ids(config, document)
    return config


def check_read_keys(config: PretrainedConfig, folder: Path, source: str, is_part: bool) -> None:
    """Refuse keys of a model's config.json that its class does not read.

    Args:
        config: The configuration to load.
        folder: Folder with config.json.
        source: Folder or Hub id, for messages.
        is_part: The configuration is that of the text model of a multimodal one.
    """
    document = config_check.read_config(folder, source)
    config_keys.check_keys(config, document.get("text_config") or {} if is_part else document, source)


def _unavailable(failure: str, error: BaseException, is_local: bool = False, source: str = "") -> ModelError:
    cause = error.__cause__
    if source and isinstance(cause, RepositoryNotFoundError):
        return ModelError(f"{failure}: {hub.refused_access(source, cause)}")
    remote = " --trust-remote-code runs the model's own code." if "trust_remote_code" in str(error) else ""
    remedy = "Check the name, the network and the access rights, or give a local folder."
    if is_local:
        remedy = "Correct the file, or save the model again."
    return ModelError(f"{failure}: {one_line(error)}.{remote} {remedy}")


def check_task(config: PretrainedConfig, source: str, trust_remote_code: bool, task: ModelTask) -> PretrainedConfig:
    """Refuse a model that does not fit the task or is quantized already, before its weights are read.

    Returns:
        The configuration to load: the given one, or that of the text model of a multimodal one.
    """
    # Codes of another quantizer cannot be trained, and rounding them again would lose twice.
    method = quantization_method(config)
    is_read = method == TORCHAO and not task.is_encoder and not text_model.is_multimodal(config)
    if method is not None and not is_read:
        raise ModelError(f"{source}: is quantized already ({method}). Start from the float model it was made from.")

    # Trust an encoder's configuration; a missing head is newly initialized.
    if task.is_encoder and tasks.is_encoder_config(config):
        task.configure(config)
        return config

    # A model with code of its own is trusted to be what its auto_map says.
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and text_model.is_multimodal(config):
        return _text_part(config, source)
    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "none")]
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not remote and (config.is_encoder_decoder or not known.intersection(names)):
        raise ModelError(
            f"{source}: not a causal language model (model type {config.model_type}, architecture "
            f"{', '.join(names)}). Use one that generates text, such as Llama, Qwen or SmolLM."
        )
    refuse_unlike_layers(config)
    experts.refuse_expert_config(config)
    return config


def _text_part(config: PretrainedConfig, source: str) -> PretrainedConfig:
    """Return the configuration of the text model of a multimodal one, and refuse where it cannot be loaded alone."""
    text = text_model.text_config(config)
    if text is None:
        raise ModelError(
            f"{source}: a multimodal model ({', '.join(config.architectures or [config.model_type])}), whose text "
            f"model ({config.text_config.model_type}) transformers cannot load alone. Use the text model it "
            "was made from."
        )
    refuse_unlike_layers(text)
    experts.refuse_expert_config(text)
    return text


def refuse_unlike_layers(config: PretrainedConfig) -> None:
    """Refuse a model whose layers differ in settings that exporters read once for all, such as the width of a head."""
    if config.is_heterogeneous:
        names = ", ".join(sorted(config.per_layer_attributes or ()))
        raise ModelError(
            f"{config.model_type}: its layers differ in {names} (per_layer_config), and targets take layers that are "
            "alike. Use another model."
        )


def quantization_method(config: PretrainedConfig) -> str | None:
    """Return the method by which a model is quantized already, as config.json names it; None for a float model."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = (settings if isinstance(settings, dict) else settings.to_dict()).get("quant_method", "unknown method")
    return str(getattr(method, "value", method))


def check_sizes(config: PretrainedConfig, folder: Path, weight_bytes: int) -> None:
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
