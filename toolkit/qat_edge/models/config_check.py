"""Check the JSON files of a model folder before transformers reads them.

transformers reads them with `json.load`, which takes the last of two equal keys, keeps keys that no class reads as
attributes, and fails on odd values far from the file that holds them. Here every value has a range, and a key that
changes the function of a model has to be one that the model's class reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qat_edge import progress, readers
from qat_edge.errors import ModelError
from qat_edge.models import tasks
from qat_edge.models.tokenizer import GENERATION_CONFIG

CONFIG = "config.json"
# Read by transformers next to the weights, if they are there.
OTHER_FILES = (
    GENERATION_CONFIG, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json",
)  # fmt: skip
# What forward returns, not what it computes: whatever the file has, results have names, and no others are returned.
PLAIN_OUTPUTS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
OBJECTS = (
    *ROPE_OBJECTS,
    "quantization_config",
    "text_config",
    "id2label",
    "label2id",
)  # keys whose value is an object, or null
DTYPES = ("dtype", "torch_dtype")
PARTIAL = "partial_rotary_factor"
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")

EPSILONS = ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")


@dataclasses.dataclass(frozen=True)
class Range:
    """Values that a key may have.

    Attributes:
        keys: Pattern of the names of keys.
        permits: Whether a number is in the range.
        expected: The range, for messages.
        whole: Whether only integers are in it.
    """

    keys: re.Pattern[str]
    permits: Callable[[float], bool]
    expected: str
    whole: bool = False


# Sizes of matrices, which have to be those of the weights, and the number of positions.
SIZES = Range(
    re.compile(
        r"hidden_size|num_hidden_layers|num_attention_heads|num_key_value_heads|vocab_size|head_dim|intermediate_size|"
        r"max_position_embeddings|original_max_position_embeddings|num_labels|n_(embd|layer|head|positions)"
    ),
    lambda value: value >= 1, "a whole number of 1 or more", whole=True,
)  # fmt: skip
MOST_LABELS = 100_000  # transformers makes a name for each one
RANGES = (
    Range(
        re.compile(r"num_labels"),
        lambda value: 1 <= value <= MOST_LABELS, f"a whole number from 1 to {MOST_LABELS}", whole=True,
    ),
    SIZES,
    Range(
        re.compile(r"(layer_|rms_)?norm_eps(ilon)?|layer_norm_epsilon"),
        lambda value: value >= 0, "a number of 0 or more",
    ),
    Range(
        re.compile(r"(\w+_)?(dropout|pdrop)(_prob|_rate|_p)?"),
        lambda value: 0 <= value < 1, "a number from 0 to below 1",
    ),
    Range(re.compile(r"initializer_(range|factor)|init_std"), lambda value: value >= 0, "a number of 0 or more"),
    Range(
        re.compile(r"rope_theta|rope_local_base_freq|rotary_emb_base|(attn|final)_logit_softcapping|clip_qkv|query_pre_attn_scalar"),
        lambda value: value > 0, "a number above 0",
    ),
    Range(re.compile(r"sliding_window"), lambda value: value >= 0, "a whole number of 0 or more", whole=True),
    Range(
        re.compile(r"partial_rotary_factor|rotary_pct"), lambda value: 0 < value <= 1, "a number above 0, and 1 at most"
    ),
    Range(
        re.compile(r"(embedding|attention|residual|lm_head)_multiplier|logits_scaling|logit_scale"),
        lambda value: value != 0, "a number other than 0",
    ),
    Range(re.compile(r"factor|attention_factor|low_freq_factor|high_freq_factor|beta_(fast|slow)"),
          lambda value: value > 0, "a number above 0"),
)  # fmt: skip

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


# --- files --------------------------------------------------------------------------------------------------


def read_config(folder: Path, source: str) -> dict[str, Any]:
    """Read config.json, and check the other JSON files of a model folder and the values in all of them.

    Args:
        folder: Folder with the files.
        source: Hub id or folder, for messages.

    Raises:
        ModelError: A file is no JSON object, has a key twice, or a value that no model can have; names file and key.
    """
    document = _read(folder / CONFIG, source)
    for name in OTHER_FILES:
        # A link to nowhere is a file as well, and not a missing one.
        if (folder / name).is_symlink() or (folder / name).exists():
            other = _read(folder / name, source)
            if name == GENERATION_CONFIG:
                _check_names(other, GenerationConfig, f"{source}: {name}")
                _check_ids(other, f"{source}: {name}")

    where = f"{source}: {CONFIG}"
    _check_values(document, where)
    if isinstance(document.get("text_config"), dict):
        _check_values(document["text_config"], f"{where}: text_config")
    return document


def _read(path: Path, source: str) -> dict[str, Any]:
    """Read one file. Infinity is permitted, because transformers writes it for some state space models."""
    where = f"{source}: {path.name}"
    text = readers.read_text(path, ModelError, where)
    with path.open("rb") as file:
        if file.read(3) == b"\xef\xbb\xbf":
            raise ModelError(
                f"{where}: begins with a byte-order mark, which transformers does not read. Save it as UTF-8 without."
            )
    document = readers.parse_json(text, where, ModelError, allow_nan=True)
    if not isinstance(document, dict):
        raise ModelError(f"{where}: expected a JSON object, found {readers.show(document)}.")
    return document


def _check_values(document: Mapping[str, Any], where: str) -> None:
    """Refuse values of config.json that no model can have.

    Raises:
        ModelError: Names the key, its value and the values it may have.
    """
    _check_names(document, PretrainedConfig, where)
    if not isinstance(document.get("model_type", ""), str):
        raise ModelError(f"{where} has model_type {readers.show(document['model_type'])}, expected a name.")
    for key, value in document.items():
        if key in OBJECTS and value is not None and not isinstance(value, dict):
            raise ModelError(f"{where} has {key} {readers.show(value)}, expected an object. Restore the file.")
        _check_range(key, value, where)

    for key in DTYPES:
        value = document.get(key)
        kind = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else torch.float32
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 2:
            raise ModelError(
                f"{where} has {key} {readers.show(value)}, expected float32, float16 or bfloat16. Restore the file."
            )
    _check_rope_values(document, where)
    _check_ids(document, where)


def _check_names(document: Mapping[str, Any], owner: type, where: str) -> None:
    """Refuse keys that would replace a method or a constant of the class that takes them as attributes."""
    fields = {field.name for field in dataclasses.fields(PretrainedConfig)}
    absent = object()
    for key in document:
        attribute = inspect.getattr_static(owner, key, absent)
        is_setting = key in fields or key == "model_type" or (isinstance(attribute, property) and attribute.fset)
        if attribute is not absent and not is_setting:
            raise ModelError(f"{where}: {_written(key)} is no setting of a model. Remove the key.")


def _written(key: str) -> str:
    """Return a key as a message shows it: on one line, and cut."""
    return readers.shorten(key if key.isprintable() else ascii(key))


def range_of(key: str) -> Range | None:
    """Return the values that a key of config.json may have; None if any number is permitted."""
    return next((r for r in RANGES if r.keys.fullmatch(key)), None)


def _check_range(key: str, value: Any, where: str) -> None:
    """Refuse a number outside of the range of its key. null stands for the default of the class."""
    found = range_of(key)
    if isinstance(value, float) and not math.isfinite(value):
        raise ModelError(f"{where} has {key} {value}, expected a finite number. Restore the file.")
    # Some families have a list with a value for each layer.
    if found is None or value is None or isinstance(value, list | dict):
        return
    if isinstance(value, bool) and not found.whole:
        return  # a switch of that name, such as token_dropout
    is_number = type(value) is int or (type(value) is float and not found.whole)
    if not is_number or not found.permits(value):
        raise ModelError(f"{where} has {key} {readers.show(value)}, expected {found.expected}. Restore the file.")


def _check_rope_values(document: Mapping[str, Any], where: str) -> None:
    """Refuse settings of the rotary embedding that are out of range or contradict each other."""
    for name in ROPE_OBJECTS:
        for label, parameters in _rope_parts(document.get(name)):
            for key, value in parameters.items():
                _check_range(key, value, f"{where}: {name}{label}")
    both = [document.get(name) for name in ROPE_OBJECTS]
    if all(both) and both[0] != both[1]:
        raise ModelError(f"{where} has rope_parameters and rope_scaling, which differ. Remove one of them.")
    for key in ("rope_theta", "partial_rotary_factor"):
        inner = (document.get("rope_parameters") or {}).get(key)
        outer = document.get(key)
        if None not in (inner, outer) and inner != outer:
            raise ModelError(
                f"{where} has {key} {readers.show(outer)}, and {readers.show(inner)} in rope_parameters. Remove one."
            )


def _shown(value: Any) -> str:
    """Return a value for a message, a short list in full."""
    is_short = isinstance(value, list) and len(value) < 5 and not any(isinstance(item, list | dict) for item in value)
    return f"[{', '.join(readers.show(item) for item in value)}]" if is_short else readers.show(value)


def _rope_parts(parameters: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings of a rotary embedding with their name in messages: one, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if nested:
        yield from ((f".{key}", value) for key, value in nested.items())
    else:
        yield "", parameters


def _check_ids(document: Mapping[str, Any], where: str) -> None:
    """Refuse ids of special tokens that are no ids, and a padding token that the embedding could not be made with."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = document.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        # Old files have -1 for no padding.
        least = -1 if key == "pad_token_id" else 0
        if any(type(number) is not int or number < least for number in ids):
            raise ModelError(f"{where} has {key} {_shown(value)}, expected the id of a token. Correct the file.")
    rows, padding = document.get("vocab_size"), document.get("pad_token_id")
    if type(rows) is int and type(padding) is int and padding >= rows:
        raise ModelError(f"{where} has pad_token_id {padding}, but vocab_size is {rows}. Correct one of them.")


# --- keys that the class of the model reads -----------------------------------------------------------------


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
            f"{where} has {_written(key)} {_shown(unread[key])}, and {name} does not read it: the model would be "
            "trained and exported without. Remove the key if the model was made without it; otherwise use an "
            "architecture that has it."
        )
    if unread:
        shown = ", ".join(_written(key) for key in unread)
        progress.warn(f"{where}: {name} does not read {readers.shorten(shown, 300)}")
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
                    f"{where}: {name}{label} has {_written(key)} {_shown(value)}, which "
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
            raise ModelError(
                f"{where} has {key} {_shown(factors)}, expected {count} numbers above 0. Restore the file."
            )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        least, most = parameters.get(low), parameters.get(high)
        if least is not None and most is not None and least >= most:
            raise ModelError(f"{where} has {low} {least} and {high} {most}, expected the second to be larger.")


def reads_rope(config: PretrainedConfig, key: str) -> bool:
    """Return whether the source of a model names a setting of its rotary embedding."""
    return not is_of_transformers(config) or bool(re.search(rf"[\"']{re.escape(key)}[\"']", _source(_class_of(config))))


def return_plain_outputs(config: PretrainedConfig) -> None:
    """Set what the model returns and which kernels compute attention to the defaults: the function stays the same."""
    config._attn_implementation = None
    for name, value in PLAIN_OUTPUTS.items():
        setattr(config, name, value)
