"""Load a model from a GGUF file, with every setting in its metadata used or refused by name.

transformers builds the configuration from a list of keys and leaves the others out, and tensors that its architecture
has no name for as well. Here each key of the architecture is one of

    compared    with the loaded configuration, and set there where it differs and can be set
    applied     scalings of the rotary embedding, which transformers reads for one architecture alone
    neutral     it has no influence on the function, or its value has none (a factor of 1, a soft cap of 0)

and any other one is refused: it may change the function. The rotary frequencies of the loaded model are compared with
those that the file describes at the end.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's reader of the same keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf import GgufHeader, is_gguf_arch_supported, load_gguf_state_dict, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.models.config_check import range_of
from qat_edge.models.weights_check import LoadReport
from qat_edge.readers import shorten

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
# Keys that `_apply_rotary` and `_check_rotary` use, all of them after "rope.".
ROTARY_KEYS = frozenset(
    f"rope.{name}"
    for name in (
        "dimension_count", "freq_base", "freq_base_swa", "scale_linear", "scaling.type", "scaling.factor",
        "scaling.original_context_length", "scaling.attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
        "scaling.yarn_ext_factor", "scaling.yarn_attn_factor",
    )
)  # fmt: skip
# Keys whose numbers have the range of a key of config.json.
RANGES_OF = {
    **{key: names[0] for key, names in (SHAPES | SETTINGS).items()},
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_theta",
}
ROTARY_FACTORS = "rope_freqs.weight"  # each frequency is divided by its factor
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# Llama 3's scaling: llama.cpp stores the factors that follow from four parameters, of which three have one value in all
# released models.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)


# Values of tokenizer.ggml.pre, the rule by which byte-level BPE splits a text first. transformers splits as GPT-2 does
# where it does not know the value. llama.cpp does so too for the first ones, and for the second ones makes each digit a
# part of its own before.
PRE_TOKENIZER = "tokenizer.ggml.pre"
SPLIT_LIKE_GPT2 = frozenset(
    {
        "default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe",
        "gigachat", "a.x-4.0", "mellum", "modern-bert",
    }
)  # fmt: skip
SPLIT_AT_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


@dataclass(frozen=True)
class GgufMetadata:
    """Metadata of a GGUF file.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        values: By key. Lists of strings are given as their length.
        tensors: Names of the tensors.
    """

    architecture: str
    values: dict[str, Any]
    tensors: frozenset[str]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture, such as "rope.freq_base"."""
        return self.values.get(f"{self.architecture}.{key}", default)

    @property
    def keys(self) -> list[str]:
        """Keys of the architecture, without its name."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.values if key.startswith(prefix)]


def read_metadata(path: Path) -> GgufMetadata:
    """Read the metadata of a GGUF file.

    Raises:
        ModelError: The file is a part of a model, or no model.
    """
    values, tensors = read_gguf_metadata(str(path))
    if values.get("split.count", 1) > 1:
        raise ModelError(
            f"{path}: part {values.get('split.no', 0) + 1} of {values['split.count']} of a model. Join the parts with "
            "`llama-gguf-split --merge`, or use the model's safetensors folder."
        )
    kind = values.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path}: general.type is {kind!r}, not 'model'. Give the file of the model itself.")
    return GgufMetadata(str(values["general.architecture"]), values, frozenset(tensors))


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
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    check_ranges(metadata, path)
    config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    _apply_settings(config, metadata, path)
    _apply_rotary(config, metadata, path)

    # Quantized tensors are dequantized while reading, so the model is a float one.
    model, info = AutoModelForCausalLM.from_pretrained(
        **where, trust_remote_code=False, config=config, dtype=dtype,
        quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    report = LoadReport.from_transformers(info)
    _check_rotary(model, metadata, path)
    _add_end_tokens(model, metadata)
    return model, LoadReport(report.missing, [*report.unexpected, *_dropped(model, metadata)], report.mismatched)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: GgufMetadata, path: Path) -> None:
    """Refuse a tokenizer that does not do what the metadata of its file says; correct how it splits digits.

    Raises:
        ModelError: A special token, the begin or end token of a text, the chat template, or the rule by which texts are
            split differs.
    """
    _check_split(tokenizer, metadata, path)
    values = metadata.values
    wanted = {
        f"tokenizer.ggml.{key}_token_id": getattr(tokenizer, f"{name}_token_id")
        for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"))
    }
    # What the tokenizer puts around a text is seen from one.
    ids = tokenizer("a").input_ids
    wanted |= {
        "tokenizer.ggml.add_bos_token": bool(ids) and ids[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    for key, found in wanted.items():
        if key in values and values[key] != found:
            shown = "another template" if key.endswith("template") else repr(found)
            raise ModelError(
                f"{path}: {key} is {str(values[key])[:60]!r}, but the tokenizer made from the file has {shown}. "
                f"{_FOLDER}"
            )
    named = sorted(key for key in values if key.startswith("tokenizer.chat_template."))
    if named:
        progress.warn(f"{path}: not used, because only the default chat template is: {', '.join(named)}")


def _check_split(tokenizer: PreTrainedTokenizerBase, metadata: GgufMetadata, path: Path) -> None:
    """Compare the rule by which texts are split into parts with the file's, and apply the rule for single digits.

    Raises:
        ModelError: transformers splits as GPT-2 does, and the file names a rule that is not known to be that one.
    """
    split = tokenizer.backend_tokenizer.pre_tokenizer
    if metadata.values.get("tokenizer.ggml.model") != "gpt2" or not isinstance(split, pre_tokenizers.ByteLevel):
        return  # transformers knows the rule
    rule = metadata.values.get(PRE_TOKENIZER, "default")
    if rule in SPLIT_LIKE_GPT2:
        return
    if rule not in SPLIT_AT_DIGITS:
        raise ModelError(
            f"{path}: {PRE_TOKENIZER} is {shorten(str(rule))!r}, which transformers does not know: it would split "
            f"texts as GPT-2 does, and give the model other tokens than it was trained with. {_FOLDER}"
        )
    # Without a longer token that has a digit, digits stay single anyway.
    added = tokenizer.get_added_vocab()
    vocabulary = tokenizer.get_vocab()
    if any(len(token) > 1 and token not in added and any(map(str.isdecimal, token)) for token in vocabulary):
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
        progress.info(f"{path.name}: {PRE_TOKENIZER} = {rule} is applied; transformers would have joined digits")


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
                f"{path}: the metadata {metadata.architecture}.{key} is {_short(value)}, expected {expected}. Download "
                "the file again, or use the model's safetensors folder."
            )


def _apply_settings(config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Compare every key of the architecture with the configuration, and set what differs and can be set."""
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
            _refuse(path, metadata, key, value)


def _is_neutral(key: str, value: Any) -> bool:
    return any(value == neutral for neutral in NEUTRAL_VALUES.get(key, ()))


def _check_shape(config: PretrainedConfig, key: str, value: Any, path: Path) -> None:
    """Refuse a shape that differs from the configuration's. A list has one value for each layer."""
    name = next((name for name in SHAPES[key] if getattr(config, name, None) is not None), None)
    found = getattr(config, name) if name else None
    if name == "head_dim" or (key.endswith("_length") and name is None):
        found = _head_width(config)
    # Layers of convolutions have no heads.
    values = {v for v in value if v} if isinstance(value, list) else {value}
    if found is None or values != {found}:
        raise ModelError(
            f"{path}: {key} is {_short(value)}, but transformers loads the model with {found}. Use the model's "
            "safetensors folder."
        )


def _apply_setting(config: PretrainedConfig, key: str, value: Any, path: Path) -> None:
    """Set a setting in the configuration if it differs there."""
    name = next((name for name in SETTINGS[key] if hasattr(config, name)), None)
    if name is None:
        raise ModelError(
            f"{path}: {key} is {_short(value)}, and {type(config).__name__} has no such setting, so the model would be "
            "another function. Use the model's safetensors folder."
        )
    found = getattr(config, name)
    if not _agree(found, value):
        # Windows of Qwen2 and others are switched on by a second setting, which GGUF does not have.
        if key == "attention.sliding_window" and getattr(config, "use_sliding_window", None) is False:
            raise ModelError(f"{path}: {key} is {value}, but does not say which layers have it. {_FOLDER}")
        setattr(config, name, value)
        progress.info(f"{path.name}: {key} = {_short(value)} is applied; transformers would have used {found}")


_FOLDER = "Use the model's safetensors folder."


def _check_pattern(config: PretrainedConfig, value: Any, path: Path) -> None:
    """Compare the layers that have a window with the configuration's."""
    types = getattr(config, "layer_types", None) or []
    windows = [layer_type == "sliding_attention" for layer_type in types]
    # A number n says that each n-th layer sees everything.
    wanted = value if isinstance(value, list) else [(i + 1) % value != 0 for i in range(config.num_hidden_layers)]
    if [bool(v) for v in wanted] != windows:
        raise ModelError(
            f"{path}: attention.sliding_window_pattern is {_short(value)}, but transformers loads the model with "
            f"{types or 'no windows'}. {_FOLDER}"
        )


def _refuse(path: Path, metadata: GgufMetadata, key: str, value: Any) -> None:
    raise ModelError(
        f"{path}: the metadata {metadata.architecture}.{key} = {_short(value)} is not known to be used by "
        f"transformers, and may change what the model computes. {_FOLDER}"
    )


def _add_end_tokens(model: PreTrainedModel, metadata: GgufMetadata) -> None:
    """Add the tokens that end a turn or a message, which llama.cpp stops at, to the model's end tokens."""
    names = ("eos", "eot", "eom")
    ids = [metadata.values.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    ends = list(dict.fromkeys(i for i in ids if i is not None))
    if len(ends) > 1 and model.generation_config is not None:
        model.generation_config.eos_token_id = ends


def _dropped(model: PreTrainedModel, metadata: GgufMetadata) -> list[str]:
    """Return the tensors of the file that transformers has no name for, and leaves out."""
    if is_gguf_arch_supported(metadata.architecture):
        return []  # these architectures report such names themselves
    processor = TENSOR_PROCESSORS.get(metadata.architecture, TensorProcessor)(config={})
    known = get_gguf_hf_weights_map(model, processor)
    applied = {ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS}
    return sorted(metadata.tensors - known.keys() - applied)


# --- rotary embedding ---------------------------------------------------------------------------------------


def _apply_rotary(config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Set base frequency, rotated width and scaling of the rotary embedding as the metadata has them."""
    parameters: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    given = sorted(ROTARY_KEYS.intersection(metadata.keys))
    if parameters is None:
        scaled = metadata.tensors & {ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS}
        if scaled or any(key != "rope.dimension_count" for key in given):
            raise ModelError(f"{path}: has {_short(given or sorted(scaled))}, but the model has no rotary embedding.")
        return

    # Gemma 3 has parameters for each type of layer. Scaling is that of the layers that see everything.
    full = parameters.get("full_attention", parameters)
    base = metadata.get("rope.freq_base")
    if base is not None:
        full["rope_theta"] = base
    local = metadata.get("rope.freq_base_swa")
    if local is not None:
        if "sliding_attention" not in parameters:
            _refuse(path, metadata, "rope.freq_base_swa", local)
        parameters["sliding_attention"]["rope_theta"] = local
    _apply_scaling(full, config, metadata, path)

    width, count = _head_width(config), metadata.get("rope.dimension_count")
    if count is not None and count != int(width * full.get("partial_rotary_factor", 1.0)):
        full["partial_rotary_factor"] = count / width  # `_check_rotary` finds out whether the class uses it


def _apply_scaling(full: dict[str, Any], config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Translate the scaling of rotary frequencies into parameters of transformers, in place."""
    kind = metadata.get("rope.scaling.type")
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0)) or 1.0)
    original = metadata.get("rope.scaling.original_context_length")
    if metadata.tensors & {LONG_FACTORS, SHORT_FACTORS}:
        _apply_long_factors(full, config, metadata, path)
        return
    if ROTARY_FACTORS in metadata.tensors:
        _apply_factors(full, config, metadata, path)
        return

    # Without a type, llama.cpp takes a factor as linear.
    if kind in (None, "linear", "none"):
        if kind != "none" and factor != 1.0:
            full |= {"rope_type": "linear", "factor": factor}
        return
    if kind != "yarn":
        _refuse(path, metadata, "rope.scaling.type", kind)
    for key, neutral in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0)):
        if metadata.get(f"rope.scaling.{key}", neutral) not in (neutral, -1.0):
            _refuse(path, metadata, f"rope.scaling.{key}", metadata.get(f"rope.scaling.{key}"))
    full |= {"rope_type": "yarn", "factor": factor}
    full["original_max_position_embeddings"] = original or round(config.max_position_embeddings / factor)
    for key in ("beta_fast", "beta_slow"):
        value = metadata.get(f"rope.scaling.yarn_{key}")
        if value is not None:
            full[key] = value


def _apply_factors(full: dict[str, Any], config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Find the parameters of Llama 3's scaling that give the factors of the file."""
    factors = _read_tensor(path, ROTARY_FACTORS)
    if bool((factors == 1).all()):
        return
    frequencies = _frequencies(full["rope_theta"], 2 * len(factors))
    factor = float(factors.max())
    for original in (metadata.get("rope.scaling.original_context_length"), *LLAMA3_CONTEXTS):
        if original and torch.allclose(llama3_factors(frequencies, factor, original), factors, rtol=1e-3):
            full |= {"rope_type": "llama3", "factor": round(factor, 4), **LLAMA3}
            full["original_max_position_embeddings"] = int(original)
            progress.info(f"{path.name}: {ROTARY_FACTORS} is Llama 3's scaling by {factor:g} beyond {original} tokens")
            return
    raise ModelError(
        f"{path}: {ROTARY_FACTORS} scales the rotary frequencies by {float(factors.min()):g} to {factor:g} in a way "
        f"that transformers has no parameters for. {_FOLDER}"
    )


def llama3_factors(frequencies: Tensor, factor: float, original: int) -> Tensor:
    """Return the divisors of rotary frequencies (width / 2) in Llama 3's scaling.

    https://arxiv.org/abs/2407.21783: wavelengths of more than original / low are divided by the factor, those of less
    than original / high stay, and between them the inverse is interpolated.
    """
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = original * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _apply_long_factors(full: dict[str, Any], config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Set the factors for short and for long texts (Phi 3), by which each frequency is divided."""
    original = metadata.get("rope.scaling.original_context_length")
    if not original or not {LONG_FACTORS, SHORT_FACTORS} <= metadata.tensors:
        raise ModelError(f"{path}: needs {LONG_FACTORS}, {SHORT_FACTORS} and rope.scaling.original_context_length.")
    full |= {
        "rope_type": "longrope",
        "short_factor": _read_tensor(path, SHORT_FACTORS).tolist(),
        "long_factor": _read_tensor(path, LONG_FACTORS).tolist(),
        "original_max_position_embeddings": original,
    }
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    if metadata.get("rope.scaling.attn_factor") is not None:
        full["attention_factor"] = metadata.get("rope.scaling.attn_factor")


def _check_rotary(model: PreTrainedModel, metadata: GgufMetadata, path: Path) -> None:
    """Compare the rotary frequencies of the loaded model with those that the file describes."""
    count, base = metadata.get("rope.dimension_count"), metadata.get("rope.freq_base", 10000.0)
    parameters: dict[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    full = parameters.get("full_attention", parameters)
    buffers = {name.rpartition(".")[2]: buffer for name, buffer in model.named_buffers()}
    found = next((buffers[name] for name in ("full_attention_inv_freq", "inv_freq") if name in buffers), None)
    if found is None or not full:
        return

    width = 2 * len(found)
    if count is not None and count != width:
        raise ModelError(
            f"{path}: rope.dimension_count is {count}, but transformers rotates {width} channels. {_FOLDER}"
        )
    expected = _frequencies(base, width)
    scalings: dict[str, Callable[[], Tensor | float]] = {
        "linear": lambda: full["factor"],
        "llama3": lambda: _read_tensor(path, ROTARY_FACTORS),
        "longrope": lambda: _read_tensor(path, SHORT_FACTORS),
    }
    kind = full.get("rope_type", "default")
    if kind == "yarn":
        return  # a mixture by position in the head, computed by transformers alone
    if kind in scalings:
        expected = expected / scalings[kind]()
    if not torch.allclose(found.float().cpu(), expected, rtol=1e-3):
        raise ModelError(f"{path}: transformers' rotary frequencies are not those of the file. {_FOLDER}")


def _frequencies(base: float, width: int) -> Tensor:
    """Return rotary frequencies in radians per token, float32 (width / 2)."""
    return float(base) ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


def _read_tensor(path: Path, name: str) -> Tensor:
    """Read one float tensor of the file as float32."""
    tensor: Any = load_gguf_state_dict(GgufHeader.from_file(str(path)))[name]
    values: Tensor = tensor[...]
    return values.float()


def _head_width(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _agree(found: Any, value: Any) -> bool:
    """Return whether two settings are the same number to the precision of float32."""
    if found is None or isinstance(found, bool) or isinstance(value, bool):
        return bool(found == value)
    if isinstance(value, Sequence):
        return bool(found == value)
    return math.isclose(float(found), float(value), rel_tol=TOLERANCE)


def _short(value: Any) -> str:
    return shorten(str(value), 60)
