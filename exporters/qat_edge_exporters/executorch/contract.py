"""What ExecuTorch's LLM runner asks a .pte about itself: constant methods, by the names it looks for.

https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/runner/constants.h
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FORWARD = "forward"
REQUIRED = (
    "get_max_seq_len", "get_max_context_len", "enable_dynamic_shape", "use_kv_cache", "use_sdpa_with_kv_cache",
    "get_eos_ids", "get_vocab_size",
)  # fmt: skip
LISTS = ("get_eos_ids",)  # methods that return any number of values
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


def missing_methods(found: Iterable[str]) -> list[str]:
    """Methods that the runner needs and `found` lacks."""
    have = set(found)
    return [name for name in (FORWARD, *REQUIRED) if name not in have]
