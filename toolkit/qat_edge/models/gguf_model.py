"""Load a model from a GGUF file, with every setting in its metadata used or refused by name.

transformers builds the configuration from a list of keys and leaves the others out, and tensors that its architecture
has no name for as well. Here each key of the architecture is one of

    compared    with the loaded configuration, and set there where it differs and can be set
    applied     to the rotary embedding (`gguf_rotary`)
    neutral     it has no influence on the function, or its value has none (a factor of 1, a soft cap of 0)

and any other one is refused: it may change the function. `gguf_keys` has the keys outside of the architecture. The
rotary frequencies of the loaded model are compared with those that the file describes at the end.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's reader of the same keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.models import gguf_keys, text_model
from qat_edge.models.config_check import range_of
from qat_edge.models.gguf_metadata import USE_FOLDER, GgufMetadata, brief, refuse
from qat_edge.models.gguf_rotary import (
    LONG_FACTORS,
    ROTARY_FACTORS,
    ROTARY_KEYS,
    SHORT_FACTORS,
    apply_rotary,
    check_rotary,
    head_width,
)
from qat_edge.models.weights_check import LoadReport

TOLERANCE = 1e-5  # relative, of metadata stored as float32
# Keys after "ARCHITECTURE." that do not change the function.
NEUTRAL_KEYS = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "embedding_length_out"})
# Values with which a key changes nothing; llama.cpp reads 0 as "off".
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "swin_norm": (False,),
}
# Shapes: transformers reads them, and weights of other shapes do not load. Key -> names in configurations.
SHAPES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_dim", "feed_forward_length"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "shortconv.l_cache": ("conv_L_cache",),
}
# Settings that change the function of the same weights: key -> names in configurations.
SETTINGS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.sliding_window": ("sliding_window",),
    "use_parallel_residual": ("use_parallel_residual",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "attention.scale": ("attention_multiplier",),
}
# llama.cpp loads no file without them (of the last two, one), and transformers takes a value of the class instead.
REQUIRED = (
    ("context_length",),
    ("attention.head_count",),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
# Keys whose numbers have the range of a key of config.json.
RANGES_OF = {
    **{key: names[0] for key, names in (SHAPES | SETTINGS).items()},
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_theta",
}


@contextmanager
def parsed_once() -> Iterator[None]:
    """Have transformers parse the file once, and make the table of tensor names once.

    It parses the file for configuration, weights and tokenizer, and makes the table anew for every module of the model:
    for a model of 30 layers that took two thirds of the time of loading it.
    """
    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def load(path: Path, metadata: GgufMetadata, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadReport]:
    """Load the model of a GGUF file, dequantized, and report which tensors did not match.

    Raises:
        ModelError: A key of the metadata changes the function and cannot be applied.
    """
    config = read_config(path, metadata)

    # Quantized tensors are dequantized while reading, so the model is a float one.
    model, info = AutoModelForCausalLM.from_pretrained(
        **_where(path), trust_remote_code=False, config=config, dtype=dtype,
        quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    report = LoadReport.from_transformers(info)
    check_rotary(model, metadata, path)
    add_end_tokens(model, metadata, path)
    return model, LoadReport(report.missing, [*report.unexpected, *_dropped(model, metadata)], report.mismatched)


def read_config(path: Path, metadata: GgufMetadata) -> PretrainedConfig:
    """Return the configuration of the model of a GGUF file, with every setting of the metadata applied.

    Raises:
        ModelError: A key of the metadata changes the function and cannot be applied.
    """
    check_ranges(metadata, path)
    gguf_keys.check_other_keys(metadata, path)
    config = AutoConfig.from_pretrained(**_where(path), trust_remote_code=False)
    stated = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.values.items()}
    text_model.remove_unstated_ids(config, stated)
    _apply_settings(config, metadata, path)
    apply_rotary(config, metadata, path)
    return config


def _where(path: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}


# --- settings of the function -------------------------------------------------------------------------------


def check_ranges(metadata: GgufMetadata, path: Path) -> None:
    """Refuse numbers that no model can have."""
    for key in metadata.keys:
        value = metadata.get(key)
        if isinstance(value, bool | list | str) or _is_neutral(key, value):
            continue
        permitted = range_of(RANGES_OF.get(key, key))
        expected = "a finite number" if permitted is None else permitted.expected
        if not math.isfinite(value) or (permitted is not None and not permitted.permits(value)):
            raise ModelError(
                f"{path}: the metadata {metadata.architecture}.{key} is {brief(value)}, expected {expected}. Download "
                "the file again, or use the model's safetensors folder."
            )


def _apply_settings(config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Compare every key of the architecture with the configuration, and set what differs and can be set."""
    _check_required(config, metadata, path)
    for key in metadata.keys:
        value = metadata.get(key)
        if key in NEUTRAL_KEYS or key in ROTARY_KEYS or _is_neutral(key, value):
            continue
        if key in SHAPES:
            _check_shape(config, key, value, path)
        elif key == "attention.sliding_window_pattern":
            _check_pattern(config, value, path)
        elif key == "attention.scale" and getattr(config, "query_pre_attn_scalar", None):
            config.query_pre_attn_scalar = value**-2
        elif key in SETTINGS:
            _apply_setting(config, key, value, path)
        else:
            refuse(path, metadata, key, value)


def _check_required(config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Refuse a file without a number that the model needs."""
    names = SHAPES | SETTINGS
    for keys in REQUIRED:
        is_used = any(hasattr(config, name) for key in keys for name in names[key])
        if is_used and not set(keys).intersection(metadata.keys):
            wanted = " or ".join(f"{metadata.architecture}.{key}" for key in keys)
            raise ModelError(
                f"{path}: the metadata has no {wanted}, and transformers would take another model's number. Download "
                "the file again, or use the model's safetensors folder."
            )


def _is_neutral(key: str, value: Any) -> bool:
    return any(value == neutral for neutral in NEUTRAL_VALUES.get(key, ()))


def _check_shape(config: PretrainedConfig, key: str, value: Any, path: Path) -> None:
    """Refuse a shape that differs from the configuration's. A list has one value for each layer."""
    name = next((name for name in SHAPES[key] if getattr(config, name, None) is not None), None)
    found = getattr(config, name) if name else None
    if name == "head_dim" or (key.endswith("_length") and name is None):
        found = head_width(config)
    # Layers of convolutions have no heads.
    values = {v for v in value if v} if isinstance(value, list) else {value}
    if found is None or values != {found}:
        raise ModelError(
            f"{path}: {key} is {brief(value)}, but transformers loads the model with {found}. Use the model's "
            "safetensors folder."
        )


def _apply_setting(config: PretrainedConfig, key: str, value: Any, path: Path) -> None:
    """Set a setting in the configuration if it differs there."""
    name = next((name for name in SETTINGS[key] if hasattr(config, name)), None)
    if name is None:
        raise ModelError(
            f"{path}: {key} is {brief(value)}, and {type(config).__name__} has no such setting, so the model would be "
            "another function. Use the model's safetensors folder."
        )
    found = getattr(config, name)
    if not _agree(found, value):
        # Windows of Qwen2 and others are switched on by a second setting, which GGUF does not have.
        if key == "attention.sliding_window" and getattr(config, "use_sliding_window", None) is False:
            raise ModelError(f"{path}: {key} is {value}, but does not say which layers have it. {USE_FOLDER}")
        setattr(config, name, value)
        progress.info(f"{path.name}: {key} = {brief(value)} is applied; transformers would have used {found}")


def _check_pattern(config: PretrainedConfig, value: Any, path: Path) -> None:
    """Compare the layers that have a window with the configuration's."""
    types = getattr(config, "layer_types", None) or []
    windows = [layer_type == "sliding_attention" for layer_type in types]
    # A number n says that each n-th layer sees everything.
    wanted = value if isinstance(value, list) else [(i + 1) % value != 0 for i in range(config.num_hidden_layers)]
    if [bool(v) for v in wanted] != windows:
        raise ModelError(
            f"{path}: attention.sliding_window_pattern is {brief(value)}, but transformers loads the model with "
            f"{types or 'no windows'}. {USE_FOLDER}"
        )


def add_end_tokens(model: PreTrainedModel, metadata: GgufMetadata, path: Path) -> None:
    """Add the tokens that end a turn or a message, which llama.cpp stops at, to the model's end tokens."""
    ends = gguf_keys.end_tokens(metadata, path)
    rows = model.get_input_embeddings().weight.shape[0]
    if ends and max(ends) >= rows:
        raise ModelError(f"{path}: the end token {max(ends)} is none of the model's {rows} tokens. {USE_FOLDER}")
    if ends and ends != [metadata.values.get("tokenizer.ggml.eos_token_id")] and model.generation_config is not None:
        model.generation_config.eos_token_id = ends


def _dropped(model: PreTrainedModel, metadata: GgufMetadata) -> list[str]:
    """Return the tensors of the file that transformers has no name for, and leaves out."""
    if is_gguf_arch_supported(metadata.architecture):
        return []  # these architectures report such names themselves
    processor = TENSOR_PROCESSORS.get(metadata.architecture, TensorProcessor)(config={})
    known = get_gguf_hf_weights_map(model, processor)
    applied = {ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS}
    return sorted(metadata.tensors - known.keys() - applied)


def _agree(found: Any, value: Any) -> bool:
    """Return whether two settings are the same number to the precision of float32."""
    if found is None or isinstance(found, bool) or isinstance(value, bool):
        return bool(found == value)
    if isinstance(value, Sequence):
        return bool(found == value)
    return math.isclose(float(found), float(value), rel_tol=TOLERANCE)
