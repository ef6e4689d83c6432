"""The text model inside a multimodal one: Gemma 3, Mistral 3 and others keep it next to their image and sound models.

A model that is used for text alone needs its text model alone. transformers has a class for it where the text part has
a configuration of its own that is known as a causal language model; its tensors are then read under their short names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Names of the text model's tensors in a multimodal checkpoint -> their names in the text model alone. transformers 5
# writes the first form, version 4 the second.
KEY_MAPPING = {
    r"^model\.(language_model|text_model)\.": "model.",
    r"^(language_model|text_model)\.model\.": "model.",
    r"^(language_model|text_model)\.lm_head\.": "lm_head.",
}
_TEXT_NAME = re.compile(r"(^|\.)(language_model|text_model)\.|^lm_head\.")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def remove_unstated_ids(config: PretrainedConfig, stated: Mapping[str, Any]) -> None:
    """Remove the ids of begin and end tokens that no file states, in place: defaults of the class are another model's.

    The padding token stays: some families, such as RoBERTa, compute positions with its id.

    Args:
        config: As transformers loaded it.
        stated: Keys of its file.
    """
    for name in ("bos_token_id", "eos_token_id"):
        if name not in stated:
            setattr(config, name, None)
    if is_multimodal(config):
        remove_unstated_ids(config.text_config, stated.get("text_config") or {})


def is_multimodal(config: PretrainedConfig) -> bool:
    """Return whether a configuration holds that of a text model."""
    return isinstance(getattr(config, "text_config", None), PretrainedConfig)


def text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """Return the configuration of the text model alone; None where transformers cannot load it alone."""
    if not is_multimodal(config) or config.text_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    text = cast("PretrainedConfig", copy.deepcopy(config.text_config))
    # A class that also is the multimodal one, such as llama4's, would not be the text model alone.
    text_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    if text_class.__name__ in (config.architectures or []):
        return None

    # The outer configuration speaks for the whole model.
    text.architectures = [text_class.__name__]
    for name in TOKEN_IDS:
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    if "tie_word_embeddings" in config.to_diff_dict():
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


def left_out(unexpected: Iterable[str], model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Split the names that the text model has no place for into those of other models, and its own.

    Args:
        unexpected: Names as in the files, or as `KEY_MAPPING` makes them.
        model: The text model.
    """
    names = sorted(unexpected)
    parts = {child for child, _ in model.base_model.named_children()}
    own = [n for n in names if _TEXT_NAME.search(n) or n.removeprefix("model.").partition(".")[0] in parts]
    return [name for name in names if name not in own], own
