"""Keys of a GGUF file outside of its architecture, each of one kind.

    used          read by transformers or in this package
    descriptive   origin, license and file format: no effect on the function
    unused        an effect in llama.cpp that training and export do not have; named in one warning
    refused       the file is no text model alone, or its texts would get other tokens

Keys of the architecture, such as `llama.rope.freq_base`, are those of `gguf_model`. A key of the tokenizer that is not
known is refused, and any other one is named as unused.

Reference: the constants of the `gguf` package, and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.models.gguf_metadata import USE_FOLDER, GgufMetadata, brief
from qat_edge.readers import shorten

USED, DESCRIPTIVE, UNUSED, REFUSED = "used", "descriptive", "unused", "refused"
END_LISTS = ("tokenizer.ggml.eog_token_ids", "tokenizer.ggml.eos_token_ids")  # of all tokens that end an answer

# The first pattern that fits a whole key decides.
KINDS: tuple[tuple[str, str], ...] = (
    (r"general\.(architecture|type|alignment)|split\.(no|count|tensors\.count)", USED),
    (r"general\.sampling\..*", UNUSED),
    (
        r"general\.(quantization_version|file_type|name|author|version|organization|finetune|basename|description|"
        r"quantized_by|size_label|license(\.(name|link))?|url|doi|uuid|repo_url|source\..*|base_model\..*|dataset\..*|"
        r"datasets|tags|languages)",
        DESCRIPTIVE,
    ),
    (r"(imatrix|quantize)\..*", DESCRIPTIVE),
    (r"tokenizer\.ggml\.(model|pre|tokens|token_type|scores|merges|add_(bos|eos)_token|add_space_prefix)", USED),
    (r"tokenizer\.ggml\.(bos|eos|eot|eom|unknown|padding)_token_id|tokenizer\.chat_template(s|\..*)?", USED),
    ("|".join(map(re.escape, END_LISTS)), USED),
    # Names of tokens that no text of training or inference gets by itself, and a number of encoders.
    (r"tokenizer\.ggml\.(fim_\w+|prefix|suffix|middle|sepp?[ea]rator|cls|mask)_token_id", DESCRIPTIVE),
    (r"tokenizer\.ggml\.token_type_count", DESCRIPTIVE),
    (r"tokenizer\.(ggml\.suppress_tokens|huggingface\.json|rwkv\.world)", UNUSED),
    # Normalization of texts, in tokenizers that llama.cpp calls UGM and WPM.
    (r"tokenizer\.ggml\.(add_sep_token|remove_extra_whitespaces|precompiled_charsmap)|tokenizer\..*", REFUSED),
    # An adapter, an encoder of images or sound, a diffusion model, an activation with weights of its own.
    (r"(adapter|clip|diffusion|xielu)\..*", REFUSED),
)


def kind_of(key: str) -> str:
    """Return the kind of a key that does not belong to the architecture."""
    return next((kind for pattern, kind in KINDS if re.fullmatch(pattern, key)), UNUSED)


def check_other_keys(metadata: GgufMetadata, path: Path) -> None:
    """Refuse the keys outside of the architecture that would be left out and matter, and name the unused ones.

    Raises:
        ModelError: Names the key.
    """
    others = {k: v for k, v in metadata.values.items() if not k.startswith(f"{metadata.architecture}.")}
    for key, value in others.items():
        # Switches that are off, and empty lists, change nothing.
        if kind_of(key) == REFUSED and value:
            raise ModelError(
                f"{path}: the metadata {shorten(key)} = {brief(value)} is not used by transformers: the file is no "
                f"text model alone, or its texts would get other tokens. {USE_FOLDER}"
            )
    unused = sorted(key for key, value in others.items() if kind_of(key) == UNUSED and value not in ("", []))
    if unused:
        progress.warn(f"{path}: not used: {shorten(', '.join(unused), 300)}")


def end_tokens(metadata: GgufMetadata, path: Path) -> list[int]:
    """Return the ids of the tokens that llama.cpp stops at: the end of a text first, then of a turn and a message.

    Raises:
        ModelError: A list of such ids holds something else.
    """
    singles: list[Any] = [metadata.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found = [number for number in singles if number is not None]
    for key in END_LISTS:
        ids = metadata.values.get(key, [])
        # A list of texts is given as its length.
        if not isinstance(ids, list) or any(type(number) is not int or number < 0 for number in ids):
            raise ModelError(f"{path}: the metadata {key} is {brief(ids)}, expected ids of tokens. {USE_FOLDER}")
        found += ids
    return list(dict.fromkeys(found))
