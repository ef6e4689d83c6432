"""What ExecuTorch's LLM runner asks a .pte about itself: constant methods, by the names it looks for.

https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/runner/constants.h
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qat_edge.errors import ExportError

FORWARD = "forward"
REQUIRED = (
    "get_max_seq_len", "get_max_context_len", "enable_dynamic_shape", "use_kv_cache", "use_sdpa_with_kv_cache",
    "get_eos_ids", "get_vocab_size",
)  # fmt: skip
LISTS = ("get_eos_ids",)  # methods that return any number of values
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
OTHER_FILES = ("config.json", "generation_config.json")


def constant_methods(config: Any, context_length: int, end_tokens: list[int], bos: int | None) -> dict[str, Any]:
    """Every constant method of the .pte. `get_eos_ids` returns all end tokens; the others are for older readers."""
    methods: dict[str, Any] = {
        "get_max_seq_len": context_length,
        "get_max_context_len": context_length,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "get_eos_ids": end_tokens,
        "get_eos_id": end_tokens[0],
        "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_hidden_layers,
    }
    if bos is not None:
        methods["get_bos_id"] = bos
    return methods


def end_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: of generation_config.json, of config.json, of the tokenizer, in this order.

    Raises:
        ExportError: none of them names one.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found += _as_list(json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id"))
    found += _as_list(tokenizer.eos_token_id)
    if not found:
        raise ExportError(
            f"{folder}: neither generation_config.json, config.json nor the tokenizer names an end token, so a "
            "runner would never stop. Set eos_token_id in the model's generation_config.json."
        )
    return list(dict.fromkeys(found))


def missing_methods(found: Iterable[str]) -> list[str]:
    """Methods that the runner needs and `found` lacks."""
    have = set(found)
    return [name for name in (FORWARD, *REQUIRED) if name not in have]


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
