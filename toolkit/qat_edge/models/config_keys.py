"""Check that the class of a model reads the keys of its config.json that change the function of models.

transformers keeps keys that no class reads as attributes. A key that changes the function in other families has to be
one that this class reads, and names of functions have to be ones that transformers knows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qat_edge import progress, readers
from qat_edge.errors import ModelError
from qat_edge.models import tasks
from qat_edge.models.config_check import CONFIG, PLAIN_OUTPUTS, ROPE_OBJECTS, SIZES, shown, written

PARTIAL = "partial_rotary_factor"
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")

EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")

# Keys of files that change nothing in a model's function, or that belong to another program.
HARMLESS = frozenset(
    {
        "_commit_hash", "_flash_attn_2_enabled", "_name_or_path", "architectures", "attention_softmax_in_fp32",
        "attn_implementation", "auto_map", "dtype", "experts_implementation", "finetuning_task",
        "gradient_checkpointing", "is_llama_config", "max_window_layers", "model_name", "model_type",
        "name_or_path", "num_labels", "onnx", "output_attentions", "output_router_logits", "pretraining_tp",
        "quantization_config", "return_dict_in_generate", "scale_attention_softmax_in_fp32",
        "scale_attn_weights", "task_specific_params", "text_pairs", "tf_legacy_loss", "tie_encoder_decoder",
        "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
        "transformers_version", "transformers_weights", "unsloth_fixed", "unsloth_version", "use_bfloat16",
        "use_cache",
        *PLAIN_OUTPUTS,
    }
)  # fmt: skip
# Parts of the names of keys that change the function of a model in the families that read them.
CHANGING = re.compile(
    r"softcap|multiplier|scal(e|ing)|window|chunk_size|rope|rotary|partial|norm|eps(ilon)?(_|$)|bias|clip|alibi|"
    r"act(ivation)?(_|$)|causal|bidirectional|layer_types|residual|sinks?(_|$)|position_|attention_type|"
    r"parallel_(attn|block)|lora|_rank$|limit|text_config|per_layer"
)
FACTORS = re.compile(r"multiplier|scal(e|ing)|factor|partial|pct")  # numbers with which 1 changes nothing
NEUTRAL_TEXT = {"absolute", "default"}  # of position_embedding_type and rope_type
# Keys of rope_parameters that each type reads, on top of those that all types have.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"short_factor", "long_factor", "factor", "attention_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "proportional": {"factor"},
}
# The length and the sections of images change nothing for text; "finetuned" is a remark.
ANY_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "original_max_position_embeddings", "mrope_section", "mrope_interleaved",
    "finetuned",
}  # fmt: skip


def check_keys(config: PretrainedConfig, document: Mapping[str, Any], source: str) -> None:
    """Refuse keys of config.json that change the function in other families and that this class does not read.

    Other keys that it does not read are named in a warning.

    Args:
        config: Configuration of the model that is loaded.
        document: The keys it was made from.
        source: Hub id or folder, for messages.

    Raises:
        ModelError: There is such a key, or a value that the class does not know.
    """
    if not is_of_transformers(config):
        return  # code of its own reads what it wants
    name, where = _class_name(config), f"{source}: {CONFIG}"
    if not tasks.is_encoder_config(config):
        _check_class(config, document, where)
    unread = {
        key: value for key, value in document.items()
        if not (reads(config, key) or _is_neutral(key, value) or _is_as_built(config, key, value))
    }  # fmt: skip
    changing = [key for key in unread if CHANGING.search(key) and not _has_other_name(config, key, document)]
    if changing:
        key = changing[0]
        raise ModelError(
            f"{where} has {written(key)} {shown(unread[key])}, and {name} does not read it: the model would be "
            "trained and exported without. Remove the key if the model was made without it; otherwise use an "
            "architecture that has it."
        )
    if unread:
        others = ", ".join(written(key) for key in unread)
        progress.warn(f"{where}: {name} does not read {readers.shorten(others, 300)}")
    check_choices(config, document, where)


def check_choices(config: PretrainedConfig, document: Mapping[str, Any], where: str) -> None:
    """Refuse names of functions that the class of a model does not know: its activation, its rotary embedding.

    Args:
        config: Configuration of the model.
        document: The keys it was made from.
        where: The file, for messages.

    Raises:
        ModelError: Names key and value.
    """
    if is_of_transformers(config):
        _check_activation(config, where)
        _check_rope(config, document, where)


def _check_class(config: PretrainedConfig, document: Mapping[str, Any], where: str) -> None:
    """Refuse a decoder that attends to later tokens, and one whose keys name two different classes."""
    if document.get("is_causal") is False:
        raise ModelError(f"{where} has is_causal false: its tokens attend to later ones, and no target computes that.")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = config.architectures
    if named and isinstance(found, type) and found.__name__ != named[0]:
        raise ModelError(
            f"{where} has the model_type {config.model_type!r}, which is loaded as {found.__name__}, and architectures "
            f"names {readers.shorten(', '.join(named))}. Restore the file."
        )


def reads(config: PretrainedConfig, key: str) -> bool:
    """Return whether the class of a model reads a key of its configuration, or the key cannot matter.

    Sizes cannot, because those that the class reads are compared with the shapes of the weights.
    """
    if not is_of_transformers(config):
        return True
    if (
        key in _attributes(_class_of(config))
        or key in HARMLESS
        or key in _generation_keys()
        or SIZES.keys.fullmatch(key)
    ):
        return True
    if key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        # transformers moves them into rope_parameters, which is checked by itself.
        return hasattr(config, "rope_parameters")
    pattern = rf"\bconfig\.{re.escape(key)}\b|[\"']{re.escape(key)}[\"']"
    return bool(re.search(pattern, _source(_class_of(config))))


def is_of_transformers(config: PretrainedConfig) -> bool:
    """Return whether a configuration is of a class of transformers, rather than of code that came with the model."""
    return type(config).__module__.startswith("transformers.")


@functools.cache
def _source(config_class: type[PretrainedConfig]) -> str:
    """Return the source of the files that define a configuration and its model."""
    classes: list[Any] = [cls for cls in config_class.__mro__ if ".models." in cls.__module__]
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        found: Any = mapping.get(config_class, ())
        classes += found if isinstance(found, tuple | list) else [found]
    files: dict[str, ModuleType] = {cls.__module__: sys.modules[cls.__module__] for cls in classes}
    return "\n".join(inspect.getsource(file) for file in files.values())


@functools.cache
def _attributes(config_class: type[PretrainedConfig]) -> frozenset[str]:
    """Return the settings that a class of configurations knows, and those that it makes of them and saves."""
    known = {*config_class.attribute_map, *(field.name for field in dataclasses.fields(config_class))}
    with contextlib.suppress(ValueError, TypeError, StrictDataclassError):  # some have no defaults
        known |= vars(config_class()).keys()
    return frozenset(known)


@functools.cache
def _generation_keys() -> frozenset[str]:
    """Return settings of text generation, which old files have in config.json."""
    return frozenset(GenerationConfig().to_dict())


def _class_of(config: PretrainedConfig) -> Any:
    """Return the class of a configuration, as mypy lets it be a key of a cache."""
    return type(config)


def _class_name(config: PretrainedConfig) -> str:
    """Return the name of the model's class, for messages."""
    return (config.architectures or [config.model_type])[0]


def _is_neutral(key: str, value: Any) -> bool:
    """Return whether a value means that a feature is absent."""
    if isinstance(value, str):
        return value in NEUTRAL_TEXT or not value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value == (1 if FACTORS.search(key) else 0)
    return not value


def _is_as_built(config: PretrainedConfig, key: str, value: Any) -> bool:
    """Return whether a key that the class does not read has the value of what the model computes anyway."""
    if key in ("norm_type", "normalization_type") and isinstance(value, str):
        return ("RMSNorm" if "rms" in value.lower() else "nn.LayerNorm") in _source(_class_of(config))
    if key == "layer_types":
        return bool(set(value) == {"full_attention"})
    if key == "sliding_window":  # a window of all positions
        return bool(value >= getattr(config, "max_position_embeddings", math.inf))
    # Files may name one thing twice, for two programs.
    names = next((names for names in (ACTIVATIONS, EPSILONS) if key in names and not config.is_heterogeneous), ())
    return any(getattr(config, other, None) == value for other in names if reads(config, other))


def _has_other_name(config: PretrainedConfig, key: str, document: Mapping[str, Any]) -> bool:
    """Return whether a file has an activation function twice, once for another program: the class reads one of them."""
    return key in ACTIVATIONS and any(reads(config, other) for other in ACTIVATIONS if document.get(other))


def _check_activation(config: PretrainedConfig, where: str) -> None:
    """Refuse an activation function that transformers does not have, where the class looks it up by name."""
    if config.is_heterogeneous:
        return  # one for each layer
    for key in ACTIVATIONS:
        value = getattr(config, key, None)
        if isinstance(value, str) and value not in ACT2FN and f"ACT2FN[config.{key}]" in _source(_class_of(config)):
            known = ", ".join(sorted(ACT2FN))
            raise ModelError(
                f"{where} has {key} {readers.show(value)}, which transformers does not know. Known: {known}."
            )


def _check_rope(config: PretrainedConfig, document: Mapping[str, Any], where: str) -> None:
    """Refuse a type of rotary embedding, or a setting of it, that the model's class would not compute."""
    name = next((key for key in ROPE_OBJECTS if document.get(key)), "rope_parameters")
    whole: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Settings for each type of layer are read if the model has such layers.
    nested = {f".{key}": whole[key] or {} for key in config.nested_rope_parameter_keys(whole)}
    for label, parameters in (nested or {"": whole}).items():
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", config.default_rope_type, *ROPE_INIT_FUNCTIONS):
            known = ", ".join(sorted({"default", config.default_rope_type, *ROPE_INIT_FUNCTIONS}))
            raise ModelError(
                f"{where}: {name}{label} has rope_type {readers.show(kind)}, which transformers does not know. Known: "
                f"{known}."
            )
        permitted = ANY_ROPE_KEYS | ROPE_KEYS.get(str(kind), set()) | set(config.ignore_keys_at_rope_validation or ())
        permitted -= {PARTIAL}  # all configurations take it, and not all models use it
        for key, value in parameters.items():
            if key not in permitted and not _is_neutral(key, value) and not reads_rope(config, key):
                raise ModelError(
                    f"{where}: {name}{label} has {written(key)} {shown(value)}, which "
                    f"{_class_name(config)} does not read for the rope_type {kind!r}. Remove the key if the model was "
                    "made without it; otherwise correct the type."
                )
        _check_rope_factors(config, parameters, f"{where}: {name}{label}")


def _check_rope_factors(config: PretrainedConfig, parameters: Mapping[str, Any], where: str) -> None:
    """Refuse factors of frequencies that transformers only warns of: in another number, or in another order."""
    for key in ("short_factor", "long_factor"):
        factors = parameters.get(key)
        if factors is None:
            continue
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        count = int(width * (parameters.get(PARTIAL) or 1.0)) // 2
        is_list = isinstance(factors, list) and all(type(f) in (int, float) and 0 < f < math.inf for f in factors)
        if not is_list or len(factors) != count:
            raise ModelError(f"{where} has {key} {shown(factors)}, expected {count} numbers above 0. Restore the file.")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        least, most = parameters.get(low), parameters.get(high)
        if least is not None and most is not None and least >= most:
            raise ModelError(f"{where} has {low} {least} and {high} {most}, expected the second to be larger.")


def reads_rope(config: PretrainedConfig, key: str) -> bool:
    """Return whether the source of a model names a setting of its rotary embedding."""
    return not is_of_transformers(config) or bool(re.search(rf"[\"']{re.escape(key)}[\"']", _source(_class_of(config))))
