"""What ExecuTorch's LLM runner asks a .pte about itself: constant methods, by the names it looks for.

https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/runner/constants.h
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qat_edge_exporters.executorch.pte.program_info import Entry, Program

FORWARD = "forward"
REQUIRED = (
    "get_max_seq_len", "get_max_context_len", "enable_dynamic_shape", "use_kv_cache", "use_sdpa_with_kv_cache",
    "get_eos_ids", "get_vocab_size",
)  # fmt: skip
ENCODER = ("get_max_length", "get_output_width")  # of a program that keeps no cache and generates nothing
LISTS = ("get_eos_ids",)  # methods that return any number of values
OTHER_FILES = ("config.json", "generation_config.json")
# What the runner does with each, and with a program that lacks it.
# https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/runner/llm_runner_helper.cpp
USES = {
    "get_max_seq_len": "tokens in one call; longer prompts are cut into parts",
    "get_max_context_len": "prompt and answer together; as get_max_seq_len without it",
    "enable_dynamic_shape": "prompts in one call; token by token without it",
    "use_kv_cache": "one new token a call; true without it",
    "use_sdpa_with_kv_cache": "read, and not acted upon",
    "get_eos_ids": "tokens that end an answer; only the tokenizer's own without it",
    "get_vocab_size": "not read: the tokenizer's; for other readers",
    "get_bos_id": "not read: the prompt template writes it; for other readers",
}
LOGITS = ("float32", "float16", "bfloat16")
MISSING = {
    "get_max_seq_len": "missing: the runner refuses the program.",
    "enable_dynamic_shape": "missing: prompts are computed token by token, many times slower.",
    "get_eos_ids": "missing: only the tokenizer's own end token stops an answer.",
}


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


def encoder_methods(length: int, width: int) -> dict[str, Any]:
    """Constant methods of a .pte that encodes: tokens of the longest text, numbers in the answer to one."""
    return dict(zip(ENCODER, (length, width), strict=True))


def missing_methods(found: Iterable[str], required: Sequence[str] = REQUIRED) -> list[str]:
    """Methods that the runner, or who calls an encoder, needs and `found` lacks."""
    have = set(found)
    return [name for name in (FORWARD, *required) if name not in have]


def entries(program: Program) -> list[Entry]:
    """Every constant method that the runner asks for, then those that only other readers do, judged."""
    found = program.constants
    asked = [Entry(name, found.get(name), use, _problem(name, program)) for name, use in USES.items()]
    return asked + [Entry(name, found[name], "for other readers") for name in found if name not in USES]


def forward_problems(program: Program) -> list[str]:
    """What the runner could not call: it gives tokens (1, S) and the first one's position, and takes logits."""
    method = program.forward
    if method is None:
        return ["There is no method forward, the one the runner calls."]
    problems = []
    if len(method.inputs) != 2 or any(port.dtype != "int64" for port in method.inputs):
        problems.append(f"{method}: the runner gives two int64 inputs, tokens and the first one's position.")
    elif len(method.inputs[0].shape) != 2 or method.inputs[0].shape[0] != 1:
        problems.append(f"{method}: the runner gives tokens of shape [1, S].")
    if len(method.outputs) != 1 or method.outputs[0].dtype not in LOGITS:
        problems.append(f"{method}: the runner takes one output, the logits, as {', '.join(LOGITS)}.")
    return problems


def _problem(name: str, program: Program) -> str:
    """What is wrong with one constant method, empty where nothing is."""
    value = program.constants.get(name)
    if value is None:
        return MISSING.get(name, "")
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, list) != (name in LISTS) or not all(isinstance(n, int) for n in numbers):
        return f"{value} is not what the runner reads there."
    fits, reason = RULES.get(name, (_always, ""))
    return "" if fits(value, program) else f"{value} cannot be: {reason}."


def _longest(program: Program) -> float:
    """Tokens that forward takes in one call."""
    port = program.forward.inputs[0] if program.forward and program.forward.inputs else None
    return port.shape[-1] if port is not None and port.dynamic and port.shape else float("inf")


def _is_token(value: int, program: Program) -> bool:
    shape = program.forward.outputs[0].shape if program.forward and program.forward.outputs else ()
    return value >= 0 and (not shape or value < shape[-1])


def _always(value: Any, program: Program) -> bool:
    return True


# What the rest of the program says of a value, and the sentence where it says otherwise.
RULES: dict[str, tuple[Callable[[Any, Program], bool], str]] = {
    "get_max_seq_len": (lambda n, p: 0 < n <= _longest(p), "forward does not take so many tokens"),
    "get_max_context_len": (
        lambda n, p: n >= p.constants.get("get_max_seq_len", 1), "it is shorter than get_max_seq_len",
    ),
    "enable_dynamic_shape": (lambda b, p: not b or _longest(p) < float("inf"), "forward takes one length only"),
    "use_kv_cache": (lambda b, p: p.forward is None or b == (len(p.forward.inputs) > 1), "forward's inputs differ"),
    "get_eos_ids": (lambda ids, p: bool(ids) and all(_is_token(n, p) for n in ids), "no tokens of this vocabulary"),
    "get_vocab_size": (lambda n, p: n > 0 and _is_token(n - 1, p) and not _is_token(n, p), "the logits differ"),
    "get_bos_id": (_is_token, "no token of this vocabulary"),
}  # fmt: skip
