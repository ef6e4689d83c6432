"""Check genai_config.json against an allow-list before onnxruntime-genai reads it.

The file can do more than describe a model: `custom_ops_library` loads a native library, provider options load those of
other processors, `enable_profiling` names a file to write, and a file name may lead elsewhere. So every key has to be
one of those below, with a value of its type. They are what the model builder writes for a decoder on the CPU
(onnxruntime-genai 0.18, `models/builders/base.py`), and a few options of a session that change speed alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.onnx import names

MOST_TOKENS = 2**24  # the KV cache is allocated for so many
LARGEST = 2**31 - 1
MOST_SEQUENCES = 64  # beams, and sequences returned at once
# The runtime uses a name of the cache's tensors as a format for the number of the layer.
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,100}(%d[A-Za-z0-9_.]{0,100})?")
WORD = re.compile(r"[A-Za-z0-9_.-]{1,100}")

# Greedy decoding; onnxruntime-genai would apply other values in every loop that does not set them.
NEUTRAL_SEARCH = {
    "diversity_penalty": 0.0, "do_sample": False, "length_penalty": 1.0, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip

# Names of inputs and outputs that the builder gives a decoder on the CPU.
TENSORS = {
    **{f"inputs.{name}": name for name in ("input_ids", "attention_mask", "position_ids")},
    "inputs.past_key_names": "past_key_values.%d.key",
    "inputs.past_value_names": "past_key_values.%d.value",
    "outputs.logits": "logits",
    "outputs.present_key_names": "present.%d.key",
    "outputs.present_value_names": "present.%d.value",
}

Check = Callable[[Any], bool]  # of one value


def check_config(folder: Path) -> dict[str, Any]:
    """Read genai_config.json of a folder and check every key.

    Raises:
        ArtifactError: It is missing or no JSON, or it has a key or a value that is not among the permitted ones.
    """
    path = folder / names.GENAI_CONFIG
    config = readers.read_object(path, ArtifactError)
    check_keys(config, path)
    return config


def check_keys(config: Mapping[str, Any], path: Path) -> None:
    """Check every key of a configuration.

    Raises:
        ArtifactError: it has a key or a value that is not among the permitted ones.
    """
    _check(config, PERMITTED, "", path)


def _check(found: Mapping[str, Any], permitted: Mapping[str, Any], prefix: str, path: Path) -> None:
    """Check one object. permitted: by key a `Check`, or the keys of an inner object."""
    for key, value in found.items():
        name = f"{prefix}{readers.shorten(key)}"
        rule = permitted.get(key)
        if rule is None:
            raise ArtifactError(
                f"{path}: the key '{name}' is not among those that an export has. Some keys load native libraries or "
                "other files, so no other key is passed on to onnxruntime-genai. Export again, or remove the key."
            )
        is_right = rule(value) if callable(rule) else isinstance(value, dict)
        if not is_right:
            raise ArtifactError(
                f"{path}: '{name}' has a value that is not permitted, {readers.show(value)}. Export again."
            )
        if not callable(rule):
            _check(value, rule, f"{name}.", path)


# --- kinds of values -----------------------------------------------------------------------------------------


def _integer(least: int = 0, most: int = LARGEST) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _list_of(check: Check, most: int) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _token_id(value: Any) -> bool:
    return value is None or _integer(-1)(value)


def _token_ids(value: Any) -> bool:
    return _token_id(value) or _list_of(_integer(), 1000)(value)


_tensor_name = _text(TENSOR_NAME)

# --- the keys ------------------------------------------------------------------------------------------------

INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_names", "past_value_names")
OUTPUTS = ("logits", "present_key_names", "present_value_names")
SESSION: dict[str, Any] = {
    "log_id": _text(WORD),
    "provider_options": _list_of(lambda _: False, 0),  # the CPU needs none
    "intra_op_num_threads": _integer(0, 1024),
    "inter_op_num_threads": _integer(0, 1024),
    "log_severity_level": _integer(0, 4),
    "enable_cpu_mem_arena": _flag,
    "enable_mem_pattern": _flag,
    "graph_optimization_level": _text(re.compile("ORT_(DISABLE_ALL|ENABLE_(BASIC|EXTENDED|ALL))")),
}
WINDOW: dict[str, Any] = {
    "window_size": _integer(),
    "slide_key_value_cache": _flag,
    "slide_inputs": _flag,
    "layers": _list_of(_integer(0, 10_000), 10_000),
    "cache_slack": _integer(),
}
DECODER: dict[str, Any] = {
    "session_options": SESSION,
    "filename": lambda value: value == names.MODEL_FILE,
    "head_size": _integer(1),
    "hidden_size": _integer(1),
    "inputs": dict.fromkeys(INPUTS, _tensor_name),
    "outputs": dict.fromkeys(OUTPUTS, _tensor_name),
    "num_attention_heads": _integer(1),
    "num_hidden_layers": _integer(1, 10_000),
    "num_key_value_heads": _integer(1),
    "sliding_window": WINDOW,
}
MODEL: dict[str, Any] = {
    "bos_token_id": _token_ids,
    "eos_token_id": _token_ids,
    "pad_token_id": _token_ids,
    **dict.fromkeys(("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id"), _token_id),
    "context_length": _integer(1, MOST_TOKENS),
    "decoder": DECODER,
    "type": _text(WORD),
    "vocab_size": _integer(1),
}
SEARCH: dict[str, Any] = {
    "diversity_penalty": _number,
    "do_sample": _flag,
    "early_stopping": _flag,
    "length_penalty": _number,
    "max_length": _integer(1, MOST_TOKENS),
    "min_length": _integer(0, MOST_TOKENS),
    "no_repeat_ngram_size": _integer(),
    "num_beams": _integer(1, MOST_SEQUENCES),
    "num_return_sequences": _integer(1, MOST_SEQUENCES),
    "past_present_share_buffer": _flag,
    "repetition_penalty": _number,
    "temperature": _number,
    "top_k": _integer(),
    "top_p": _number,
    "chunk_size": _integer(1, MOST_TOKENS),
}
PERMITTED: dict[str, Any] = {"model": MODEL, "search": SEARCH}
