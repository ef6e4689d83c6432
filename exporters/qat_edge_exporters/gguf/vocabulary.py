"""Tokenizer of a checkpoint as metadata of a GGUF file: tokens, merges or scores, special tokens, chat template.

Two kinds can be written: byte-level BPE ("gpt2"), by the name of the rule that splits texts, and BPE made from a
SentencePiece vocabulary ("llama"). The second has scores instead of merges: llama.cpp joins the pair whose token has
the highest score, so a token's score is minus the rank of the first merge that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat_edge import readers
from qat_edge.errors import ExportError
from qat_edge.models import tokenizer as tokenizer_files
from qat_edge.models.gguf_tokenizer import ADD_BOS, PRE_TOKENIZER, SPACE, splitting_rule

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
TEMPLATE = "tokenizer.chat_template"
ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LOWEST_SCORE = -1e9  # of a token that no merge makes
ELSEWHERE = "Export to another --target."
NFC = "NFC"  # normalization that llama.cpp leaves out: only texts with decomposed characters differ
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")  # settings of BPE
# Steps of tokenizers made from SentencePiece that llama.cpp's model "llama" does as well.
SENTENCEPIECE_STEPS = {"Prepend", "Replace", "Sequence"}


def tokenizer_metadata(folder: Path, rows: int) -> dict[str, Any]:
    """Return the metadata of a checkpoint's tokenizer.

    Args:
        folder: of the checkpoint.
        rows: of the embedding.

    Raises:
        ExportError: llama.cpp has no tokenizer that does the same.
    """
    tokenizer = tokenizer_files.load_tokenizer(folder)
    ends = tokenizer_files.end_tokens(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"gguf: {type(tokenizer).__name__} has no tokenizer.json that could be stored. {ELSEWHERE}")
    document = readers.parse_json(backend.to_str(), f"{folder}: tokenizer.json", ExportError)
    tokens = _tokens(tokenizer, rows)
    types = _types(tokenizer, tokens)
    if document["model"]["type"] == "BPE" and document["model"].get("byte_fallback"):
        model = _sentencepiece(document, tokenizer, tokens, types)
    else:
        model = _byte_level(document, tokens, types)
    return {**model, **_special_tokens(tokenizer, ends), **_templates(tokenizer)}


def tokenizer_faults(folder: Path) -> list[str]:
    """Return what apps on llama.cpp read otherwise than training did, a sentence each."""
    backend = tokenizer_files.load_tokenizer(folder).backend_tokenizer
    document = readers.parse_json(backend.to_str(), f"{folder}: tokenizer.json", ExportError)
    if (document["normalizer"] or {}).get("type") != NFC:
        return []
    return [
        "llama.cpp does not normalize texts to NFC, as training did: texts with decomposed characters get other tokens"
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """Return the text of every row of the embedding; rows without a token get a text that no tokenizer has."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(names) >= rows:
        raise ExportError(f"gguf: the tokenizer has token {max(names)}, and the embedding {rows} rows. {ELSEWHERE}")
    return [names.get(index, f"[PAD{index}]") for index in range(rows)]


def _types(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Return the type of each token."""
    known, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    types = []
    for index, token in enumerate(tokens):
        if token not in known:
            types.append(UNUSED)
        elif index in special or (index in added and added[index].special):
            types.append(CONTROL)
        else:
            types.append(USER_DEFINED if index in added else NORMAL)
    return types


def _byte_level(document: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Return the metadata of byte-level BPE."""
    model = document["model"]
    rule = splitting_rule(document) if model["type"] == "BPE" else ""
    if (document["normalizer"] or {}).get("type", NFC) != NFC or any(model.get(key) for key in AFFIXES):
        raise ExportError(
            "gguf: this tokenizer changes texts before it splits them, or marks parts of words, and llama.cpp's does "
            f"not: an app would give the model other tokens than training did. {ELSEWHERE}"
        )
    if not rule:
        raise ExportError(
            f"gguf: llama.cpp's rule by which this tokenizer ({model['type']}) splits texts is not known: an app would "
            f"give the model other tokens than training did. {ELSEWHERE}"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        PRE_TOKENIZER: rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def _sentencepiece(
    document: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Return the metadata of BPE made from a SentencePiece vocabulary."""
    _require_sentencepiece_steps(document)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(document["model"])):
        ranks.setdefault("".join(pair), rank)
    unknown = document["model"].get("unk_token")
    for index, token in enumerate(tokens):
        if ONE_BYTE.fullmatch(token):
            types[index] = BYTE
        elif token == unknown:
            types[index] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        PRE_TOKENIZER: "default",
        # A token that the user defined is looked for in the text itself, where a space is a space.
        "tokenizer.ggml.tokens": [
            token.replace(SPACE, " ") if kind == USER_DEFINED else token
            for token, kind in zip(tokens, types, strict=True)
        ],
        "tokenizer.ggml.scores": [float(-ranks[token]) if token in ranks else LOWEST_SCORE for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": "".join(tokenizer.tokenize("a")).startswith(SPACE),
    }


def _require_sentencepiece_steps(document: Mapping[str, Any]) -> None:
    """Require a tokenizer that changes and splits texts at spaces only."""
    normalizer, split = document["normalizer"] or {}, document["pre_tokenizer"] or {}
    steps = [normalizer, *normalizer.get("normalizers", [])] if normalizer else []
    unknown = [step["type"] for step in steps if step["type"] not in SENTENCEPIECE_STEPS]
    unknown += [step["type"] for step in steps if step["type"] == "Replace" and step["pattern"] != {"String": " "}]
    # Gemma splits at spaces after it has replaced them all: nothing is left to split.
    if split and split["type"] not in ("Metaspace", "Split"):
        unknown.append(split["type"])
    if unknown:
        raise ExportError(
            f"gguf: this tokenizer has a step that llama.cpp's does not have ({', '.join(unknown)}): an app would give "
            f"the model other tokens than training did. {ELSEWHERE}"
        )


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    """Return the pairs that are joined, in their order; tokenizer.json has them as lists or as texts."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _special_tokens(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> dict[str, Any]:
    """Return the ids of special tokens, all end tokens included, and what a text begins and ends with."""
    if len(ends) > len(END_KEYS):
        raise ExportError(
            f"gguf: the model has {len(ends)} end tokens ({', '.join(map(str, ends))}), and a GGUF file names "
            f"{len(END_KEYS)}: a generation would not end at the others. Take some out of generation_config.json, or "
            f"{ELSEWHERE[0].lower()}{ELSEWHERE[1:]}"
        )
    ids, plain = tokenizer("a").input_ids, tokenizer.encode("a", add_special_tokens=False)
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id
    finishes = bool(ids) and ids[-1] == tokenizer.eos_token_id
    if ids[begins : len(ids) - finishes] != plain:
        raise ExportError(
            f"gguf: this tokenizer puts other tokens around a text than its begin and end token, and llama.cpp's does "
            f"not. {ELSEWHERE}"
        )
    found: dict[str, Any] = dict(zip(END_KEYS, ends, strict=False))
    named = {"bos": tokenizer.bos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    found |= {f"tokenizer.ggml.{name}_token_id": index for name, index in named.items() if index is not None}
    found[ADD_BOS], found["tokenizer.ggml.add_eos_token"] = begins, finishes
    return found


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the chat templates; of several, the default one has no name."""
    templates: Any = tokenizer.chat_template
    if not templates:
        return {}
    if isinstance(templates, str):
        return {TEMPLATE: templates}
    named = {name: template for name, template in templates.items() if name != "default"}
    found: dict[str, Any] = {"tokenizer.chat_templates": sorted(named)} if named else {}
    found |= {TEMPLATE: templates["default"]} if "default" in templates else {}
    return {**found, **{f"{TEMPLATE}.{name}": template for name, template in named.items()}}
