"""Tokenizer of a GGUF file, with every setting in its metadata used or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.models.gguf_metadata import USE_FOLDER, GgufMetadata
from qat_edge.readers import shorten

PRE_TOKENIZER = "tokenizer.ggml.pre"  # the rule by which byte-level BPE splits a text first, and what else goes with it
ADD_BOS = "tokenizer.ggml.add_bos_token"
SPACE = "\u2581"  # a space, as SentencePiece writes it

# Values of the key by what llama.cpp does with them, from src/llama-vocab.cpp at commit 00ad355e:
# https://github.com/ggml-org/llama.cpp/blob/00ad355e009e83abf98f96a6ded7193b95763681/src/llama-vocab.cpp
# transformers knows other rules, and splits as GPT-2 does where it does not know the value. "default" is a rule of
# llama.cpp that no model was trained with. Its settings for decoding, such as clean_spaces, are not used here.
SPLIT_LIKE_GPT2 = frozenset(
    {
        "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0",
        "mellum", "modern-bert", "roberta-bpe", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de",
        "jina-v2-code",
    }
)  # fmt: skip
# The same, after a split that makes each digit a part of its own.
SPLIT_AT_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
)
# A part of a text that is a token becomes it, whatever the merges give. Of the rules that transformers knows.
IGNORE_MERGES = frozenset(
    {
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
        "tekken",
    }
)  # fmt: skip
BEGIN_BY_DEFAULT = IGNORE_MERGES  # a text begins with the begin token, unless ADD_BOS says otherwise
# Rules to write, the usual name of each: whatever else has the same split is read only.
WRITTEN_RULES = ("llama-bpe", "smaug-bpe", "tekken", "qwen2", "qwen35", "gpt-4o")


def splitting_rule(backend: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which a byte-level BPE tokenizer splits texts; empty where it has none.

    Args:
        backend: The tokenizer as tokenizer.json has it.
    """
    split = backend["pre_tokenizer"] or {}
    steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    *others, bytes_step = steps
    if bytes_step.get("type") != "ByteLevel" or bytes_step.get("add_prefix_space"):
        return ""
    ignores_merges = bool(backend["model"].get("ignore_merges"))
    if bytes_step.get("use_regex", True):
        # GPT-2's split, which is a part of this step, alone or after a split at digits.
        at_digits = [step.get("type") == "Digits" and bool(step.get("individual_digits")) for step in others]
        name = {(): "gpt-2", (True,): "smollm"}.get(tuple(at_digits), "")
        return "" if ignores_merges else name
    if len(others) != 1 or others[0].get("type") != "Split":
        return ""
    if others[0].get("behavior") != "Isolated" or others[0].get("invert"):
        return ""
    pattern = others[0]["pattern"].get("Regex")
    names = [name for name in WRITTEN_RULES if GGUF_PRE_TOKENIZER_SPLITS[name] == pattern]
    return next((name for name in names if (name in IGNORE_MERGES) == ignores_merges), "")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: GgufMetadata, path: Path) -> None:
    """Apply what the rule of splitting means, and refuse a tokenizer that does not do what its file says.

    Raises:
        ModelError: A special token, the begin or end token of a text, the chat template, or the rule by which texts are
            split differs.
    """
    values = metadata.values
    if values.get("tokenizer.ggml.model") == "gpt2":
        rule = str(values.get(PRE_TOKENIZER, ""))
        _check_split(tokenizer, rule, path)
        _apply_flags(tokenizer, rule, path, begins=ADD_BOS not in values)
    wanted = {
        f"tokenizer.ggml.{key}_token_id": getattr(tokenizer, f"{name}_token_id")
        for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"))
    }
    # What the tokenizer puts around a text is seen from one.
    ids = tokenizer("a").input_ids
    wanted |= {
        ADD_BOS: bool(ids) and ids[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": bool(ids) and ids[-1] == tokenizer.eos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    # llama.cpp puts a space before a text for this model of tokenizers alone.
    if values.get("tokenizer.ggml.model") == "llama":
        wanted["tokenizer.ggml.add_space_prefix"] = "".join(tokenizer.tokenize("a")).startswith(SPACE)
    for key, found in wanted.items():
        if key in values and values[key] != found:
            shown = "another template" if key.endswith("template") else repr(found)
            raise ModelError(
                f"{path}: {key} is {str(values[key])[:60]!r}, but the tokenizer made from the file has {shown}. "
                f"{USE_FOLDER}"
            )
    named = sorted(key for key in values if key.startswith("tokenizer.chat_template."))
    if named:
        progress.warn(f"{path}: not used, because only the default chat template is: {', '.join(named)}")


def _check_split(tokenizer: PreTrainedTokenizerBase, rule: str, path: Path) -> None:
    """Compare the rule by which texts are split into parts with the file's, and apply the rule for single digits.

    Raises:
        ModelError: transformers splits as GPT-2 does, and the file names a rule that is not known to be that one.
    """
    split = tokenizer.backend_tokenizer.pre_tokenizer
    # transformers knows the rule, or it is this one.
    if not isinstance(split, pre_tokenizers.ByteLevel) or rule in SPLIT_LIKE_GPT2:
        return
    if rule not in SPLIT_AT_DIGITS:
        found = f"is {shorten(rule)!r}, which names no known rule" if rule else "is missing"
        raise ModelError(
            f"{path}: {PRE_TOKENIZER} {found}: transformers would split texts as GPT-2 does, and could give the model "
            f"other tokens than it was trained with. {USE_FOLDER}"
        )
    # Without a longer token that has a digit, digits stay single anyway.
    added = tokenizer.get_added_vocab()
    vocabulary = tokenizer.get_vocab()
    if any(len(token) > 1 and token not in added and any(map(str.isdecimal, token)) for token in vocabulary):
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
        progress.info(f"{path.name}: {PRE_TOKENIZER} = {rule} is applied; transformers would have joined digits")


def _apply_flags(tokenizer: PreTrainedTokenizerBase, rule: str, path: Path, begins: bool) -> None:
    """Apply what llama.cpp does for a rule besides splitting. begins: the file leaves the begin token to the rule."""
    model = tokenizer.backend_tokenizer.model
    if rule in IGNORE_MERGES and not model.ignore_merges:
        model.ignore_merges = True
    if begins and rule in BEGIN_BY_DEFAULT and tokenizer.bos_token_id is not None and not tokenizer.add_bos_token:
        tokenizer.add_bos_token = True
        progress.info(f"{path.name}: texts begin with {tokenizer.bos_token}, as {PRE_TOKENIZER} = {rule} implies")
