"""Rotary embedding of a model from a GGUF file: base frequency, rotated width and scaling, as the metadata has them.

transformers reads them for one architecture alone. The frequencies of the loaded model are compared with those that the
file describes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.models.gguf_metadata import USE_FOLDER, GgufMetadata, brief, refuse

# Keys that are used here, all of them after "rope.".
ROTARY_KEYS = frozenset(
    f"rope.{name}"
    for name in (
        "dimension_count", "freq_base", "freq_base_swa", "scale_linear", "scaling.type", "scaling.factor",
        "scaling.original_context_length", "scaling.attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
        "scaling.yarn_ext_factor", "scaling.yarn_attn_factor",
    )
)  # fmt: skip
ROTARY_FACTORS = "rope_freqs.weight"  # each frequency is divided by its factor
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# Llama 3's scaling: llama.cpp stores the factors that follow from four parameters, of which three have one value in all
# released models.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # with llama.cpp's defaults
LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)


def apply_rotary(config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Set base frequency, rotated width and scaling of the rotary embedding as the metadata has them."""
    parameters: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    given = sorted(ROTARY_KEYS.intersection(metadata.keys))
    if parameters is None:
        scaled = metadata.tensors & {ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS}
        if scaled or any(key != "rope.dimension_count" for key in given):
            raise ModelError(f"{path}: has {brief(given or sorted(scaled))}, but the model has no rotary embedding.")
        return

    # Gemma 3 has parameters for each type of layer. Scaling is that of the layers that see everything.
    full = parameters.get("full_attention", parameters)
    base = metadata.get("rope.freq_base")
    if base is not None:
        full["rope_theta"] = base
    local = metadata.get("rope.freq_base_swa")
    if local is not None:
        if "sliding_attention" not in parameters:
            refuse(path, metadata, "rope.freq_base_swa", local)
        parameters["sliding_attention"]["rope_theta"] = local
    _apply_scaling(full, config, metadata, path)

    width, count = head_width(config), metadata.get("rope.dimension_count")
    if count is not None and count != int(width * full.get("partial_rotary_factor", 1.0)):
        full["partial_rotary_factor"] = count / width  # `check_rotary` finds out whether the class uses it


def _apply_scaling(full: dict[str, Any], config: PretrainedConfig, metadata: GgufMetadata, path: Path) -> None:
    """Translate the scaling of rotary frequencies into parameters of transformers, in place."""
    _check_scaling(metadata, path)
    factor = _scale(metadata)
    if metadata.tensors & {LONG_FACTORS, SHORT_FACTORS}:
        _apply_long_factors(full, config, metadata, path)
    elif ROTARY_FACTORS in metadata.tensors:
        _apply_factors(full, config, metadata, path)
    elif metadata.get("rope.scaling.type") == "yarn":
        original = metadata.get("rope.scaling.original_context_length")
        full |= {"rope_type": "yarn", "factor": factor}
        full["original_max_position_embeddings"] = original or round(config.max_position_embeddings / factor)
        for key in YARN_BETAS:
            value = metadata.get(f"rope.scaling.yarn_{key}")
            if value is not None:
                full[key] = value
    elif factor != 1.0:
        full |= {"rope_type": "linear", "factor": factor}


def _scale(metadata: GgufMetadata) -> float:
    """Return the factor that all frequencies are divided by. Without a type, llama.cpp takes it as linear."""
    if metadata.get("rope.scaling.type") == "none":
        return 1.0
    return float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0)) or 1.0)


def _check_scaling(metadata: GgufMetadata, path: Path) -> None:
    """Refuse a combination of scalings, and keys of a scaling that the file does not have.

    llama.cpp multiplies scalings, and applies attn_factor and ext_factor to every one of them.

    Raises:
        ModelError: Names the key.
    """
    kind = metadata.get("rope.scaling.type")
    tensors = metadata.tensors & {ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS}
    is_long = bool(tensors - {ROTARY_FACTORS})
    if kind not in (None, "none", "linear", "yarn") and not (kind == "longrope" and is_long):
        refuse(path, metadata, "rope.scaling.type", kind)
    others = [f"rope.scaling.type = {kind}"] if kind == "yarn" else []
    if _scale(metadata) != 1.0:
        others.append(f"a factor of {_scale(metadata):g} (rope.scaling.factor)")
    if is_long and ROTARY_FACTORS in tensors:
        others.append(ROTARY_FACTORS)
    if tensors and others:
        raise ModelError(
            f"{path}: has {', '.join(sorted(tensors - set(others)))} and {', '.join(others)}, and transformers cannot "
            f"scale rotary frequencies by both. {USE_FOLDER}"
        )

    neutral: dict[str, tuple[float, ...]] = {"yarn_attn_factor": (1.0, -1.0), "yarn_ext_factor": (1.0, -1.0)}
    if not is_long:
        neutral["attn_factor"] = (1.0,)
    if kind != "yarn":
        neutral |= {"yarn_ext_factor": (0.0, -1.0), **{f"yarn_{key}": (value,) for key, value in YARN_BETAS.items()}}
    for name, values in neutral.items():
        found = metadata.get(f"rope.scaling.{name}", values[0])
        if found not in values:
            refuse(path, metadata, f"rope.scaling.{name}", found)


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
        f"that transformers has no parameters for. {USE_FOLDER}"
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
    # transformers would compute one from the lengths, where llama.cpp takes 1.
    full["attention_factor"] = metadata.get("rope.scaling.attn_factor", 1.0)


def check_rotary(model: PreTrainedModel, metadata: GgufMetadata, path: Path) -> None:
    """Compare the rotary frequencies of the loaded model, and their attention factor, with what the file describes."""
    count = metadata.get("rope.dimension_count", head_width(model.config))  # llama.cpp's default
    buffers = {name.rpartition(".")[2]: (name, buffer) for name, buffer in model.named_buffers()}
    owner, found = next((buffers[n] for n in ("full_attention_inv_freq", "inv_freq") if n in buffers), ("", None))
    if found is None:
        return

    width = 2 * len(found)
    if count != width:
        raise ModelError(
            f"{path}: rope.dimension_count is {count}, but transformers rotates {width} channels. {USE_FOLDER}"
        )
    expected, attention = _described(metadata, width, model.config, path)
    module, _, name = owner.rpartition(".")
    given = getattr(model.get_submodule(module), name.replace("inv_freq", "attention_scaling"), 1.0)
    is_same = torch.allclose(found.float().cpu(), expected, rtol=1e-3)
    if not is_same or not math.isclose(given, attention, rel_tol=1e-3):
        raise ModelError(f"{path}: transformers' rotary frequencies are not those of the file. {USE_FOLDER}")


def _described(metadata: GgufMetadata, width: int, config: PretrainedConfig, path: Path) -> tuple[Tensor, float]:
    """Return what llama.cpp computes from the file: frequencies (width / 2), and the factor of cosines and sines."""
    base, factor = metadata.get("rope.freq_base", 10000.0), _scale(metadata)
    frequencies, attention = _frequencies(base, width), metadata.get("rope.scaling.attn_factor", 1.0)
    for name in (ROTARY_FACTORS, SHORT_FACTORS):
        if name in metadata.tensors:
            frequencies = frequencies / _read_tensor(path, name)
    if metadata.get("rope.scaling.type") != "yarn":
        return frequencies / factor, attention

    # https://arxiv.org/abs/2309.00071: channels of many turns keep their frequency, those of few are interpolated.
    original = metadata.get("rope.scaling.original_context_length") or round(config.max_position_embeddings / factor)
    fast, slow = (metadata.get(f"rope.scaling.yarn_{key}", value) for key, value in YARN_BETAS.items())
    ends = [width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow)]
    low, high = max(0, math.floor(ends[0])), min(width - 1, math.ceil(ends[1]))
    kept = 1 - ((torch.arange(width // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    return frequencies * kept + frequencies / factor * (1 - kept), attention * (1 + 0.1 * math.log(factor))


def _frequencies(base: float, width: int) -> Tensor:
    """Return rotary frequencies in radians per token, float32 (width / 2)."""
    return float(base) ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


def _read_tensor(path: Path, name: str) -> Tensor:
    """Read one float tensor of the file as float32."""
    tensor: Any = load_gguf_state_dict(GgufHeader.from_file(str(path)))[name]
    values: Tensor = tensor[...]
    return values.float()


def head_width(config: PretrainedConfig) -> int:
    """Return the channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
