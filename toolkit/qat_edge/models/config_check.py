"""Check the JSON files of a model folder before transformers reads them.

transformers reads them with `json.load`, which takes the last of two equal keys, and fails on odd values far from the
file that holds them. Here every value has a range. `config_keys` compares the keys with those that the model's class
reads.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from qat_edge import readers
from qat_edge.errors import ModelError
from qat_edge.models.tokenizer import GENERATION_CONFIG

CONFIG = "config.json"
# Read by transformers next to the weights, if they are there.
OTHER_FILES = (
    GENERATION_CONFIG, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json",
)  # fmt: skip
# What forward returns, not what it computes: whatever the file has, results have names, and no others are returned.
PLAIN_OUTPUTS = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
# Older names of the type of a rotary embedding. Sections of images ("mrope") change nothing for text.
ROPE_ALIASES = {"su": "longrope", "mrope": "default"}
OBJECTS = (
    *ROPE_OBJECTS,
    "quantization_config",
    "text_config",
    "id2label",
    "label2id",
)  # keys whose value is an object, or null
DTYPES = ("dtype", "torch_dtype")


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
            raise ModelError(f"{where}: {written(key)} is no setting of a model. Remove the key.")


def written(key: str) -> str:
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
            _check_rope_type(parameters, f"{where}: {name}{label}")
            if label in ("", ".full_attention"):
                _compare_rope(document, parameters, where, name + label)
    both = [document.get(name) for name in ROPE_OBJECTS]
    if all(both) and both[0] != both[1]:
        raise ModelError(f"{where} has rope_parameters and rope_scaling, which differ. Remove one of them.")


def _check_rope_type(parameters: Mapping[str, Any], where: str) -> None:
    """Refuse two names of the type of a rotary embedding that differ: transformers reads one of them."""
    old, new = parameters.get("type"), parameters.get("rope_type")
    if None not in (old, new) and ROPE_ALIASES.get(str(old), old) != ROPE_ALIASES.get(str(new), new):
        raise ModelError(
            f"{where} has type {readers.show(old)} and rope_type {readers.show(new)}, which contradict each other. "
            "Remove the one that the model was not made with."
        )


def _compare_rope(document: Mapping[str, Any], parameters: Mapping[str, Any], where: str, name: str) -> None:
    """Refuse numbers of the rotary embedding that differ inside and outside of its object: one would be left out."""
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        inner, outer = parameters.get(key), document.get(key)
        if None not in (inner, outer) and inner != outer:
            raise ModelError(
                f"{where} has {key} {readers.show(outer)}, and {readers.show(inner)} in {name}. Remove one."
            )


def shown(value: Any) -> str:
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
        # Only the end may be one of several tokens.
        several = key == "eos_token_id" and value != []
        ids = value if several and isinstance(value, list) else [] if value is None else [value]
        # Old files have -1 for no padding.
        least = -1 if key == "pad_token_id" else 0
        if any(type(number) is not int or number < least for number in ids):
            raise ModelError(f"{where} has {key} {shown(value)}, expected the id of a token. Correct the file.")
    rows, padding = document.get("vocab_size"), document.get("pad_token_id")
    if type(rows) is int and type(padding) is int and padding >= rows:
        raise ModelError(f"{where} has pad_token_id {padding}, but vocab_size is {rows}. Correct one of them.")


def return_plain_outputs(config: PretrainedConfig) -> None:
    """Set what the model returns and which kernels compute attention to the defaults: the function stays the same."""
    config._attn_implementation = None
    for name, value in PLAIN_OUTPUTS.items():
        setattr(config, name, value)
