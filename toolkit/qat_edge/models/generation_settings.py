"""Greedy decoding in torch, and the settings of generation_config.json that greedy decoding leaves out.

An artifact computes logits; how the next token is chosen from them is up to the loop around it. All our figures and
texts come from greedy decoding, in every runtime. transformers would fill in what a model's generation_config.json
sets (penalties, forbidden tokens, beams, forced tokens), so `greedy_decoding` replaces it for the time of a generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from qat_edge import readers
from qat_edge.errors import ModelError
from qat_edge.models.tokenizer import GENERATION_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that an ONNX folder keeps in its genai_config.json, where apps on onnxruntime-genai read them.
KEPT_BY_ONNX: dict[str, Callable[[Any], bool]] = {
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": lambda value: _is_number(value) and value > 0,
    "top_k": lambda value: type(value) is int and 0 <= value < 2**31,
    "top_p": lambda value: _is_number(value) and 0 < value <= 1,
    "repetition_penalty": lambda value: _is_number(value) and value > 0,
    "no_repeat_ngram_size": lambda value: type(value) is int and 0 <= value < 2**31,
}
# Values with which a setting changes no text. Empty lists and null change none either.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "diversity_penalty": (0.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "low_memory")
# Ids that are read elsewhere, lengths that a command or an app chooses, and keys about speed and form of the result.
UNRELATED = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens",
    "transformers_version", "_from_model_config", "_commit_hash", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type",
}  # fmt: skip


@contextmanager
def greedy_decoding(
    model: PreTrainedModel, eos_ids: Sequence[int], pad_id: int, max_new_tokens: int
) -> Iterator[PreTrainedModel]:
    """Let `model.generate` decode greedily inside the block, whatever the model's own settings are.

    transformers 5.23 fills what a given `GenerationConfig` leaves open from `model.generation_config`; so that one is
    replaced.

    Args:
        model: a model that generates text.
        eos_ids: tokens that end a generation.
        pad_id: token that pads prompts of a batch.
        max_new_tokens: longest continuation.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(eos_ids), pad_token_id=pad_id
    )
    try:
        yield model
    finally:
        model.generation_config = own


def settings_left_out(folder: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's generation_config.json that change texts and that greedy decoding ignores.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    found = {key: value for key, value in readers.read_object(path, ModelError).items() if key not in UNRELATED}
    # These act only next to the one that switches them on.
    inactive = set() if found.get("do_sample") is True else set(SAMPLING)
    if found.get("num_beams") in (None, 1):
        inactive |= set(BEAMS)
    return {
        key: value
        for key, value in sorted(found.items())
        if key not in inactive and value not in (None, [], {}) and value not in WITHOUT_EFFECT.get(key, ())
    }


def kept_by_onnx(folder: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's generation_config.json that go into genai_config.json.

    Those without effect, or with a value that onnxruntime-genai would not accept, are left out.

    Raises:
        ModelError: the file is damaged.
    """
    return {key: value for key, value in settings_left_out(folder).items() if KEPT_BY_ONNX.get(key, _never)(value)}


def describe_left_out(folder: Path, targets: Sequence[str]) -> str:
    """Describe what becomes of the settings of generation_config.json in exported artifacts; empty where it has none.

    Args:
        folder: the checkpoint.
        targets: formats that are exported, such as "executorch".
    """
    found = settings_left_out(folder)
    if not found:
        return ""
    asked = ", ".join(f"{key} {readers.show(value)}" for key, value in found.items())
    kept = ", ".join(kept_by_onnx(folder)) if "onnx" in targets else ""
    where = f" The ONNX folder keeps {kept} in genai_config.json for its app." if kept else ""
    where += f" transformers applies those in the {GENERATION_CONFIG} of the hf folder." if "hf" in targets else ""
    others = "no other artifact" if "hf" in targets else "no artifact"
    return (
        f"The model's {GENERATION_CONFIG} sets {asked}. generate and validate decode greedily without them in every "
        f"runtime, and {others} applies them by itself: an app has to.{where}"
    )


def _never(value: Any) -> bool:
    return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
