"""Constant methods that ExecuTorch's LLM runner looks for in a .pte, by name.

https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/runner/constants.h
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qat_edge_exporters.executorch.pte.program_info import ContractEntry, ProgramInfo

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FORWARD = "forward"
REQUIRED = (
    "get_max_seq_len", "get_max_context_len", "enable_dynamic_shape", "use_kv_cache", "use_sdpa_with_kv_cache",
    "get_eos_ids", "get_vocab_size",
)  # fmt: skip
OTHER = ("get_eos_id", "get_n_layers", "get_bos_id")  # for older readers; the last one only where a model has it
ENCODER = ("get_max_length", "get_output_width")  # of a program that keeps no cache and generates nothing
LISTS = ("get_eos_ids",)  # methods that return any number of values
# The runner's use of each value, and its behaviour without it.
# https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/runner/llm_runner_helper.cpp
USES = {
    "get_max_seq_len": "tokens in one call; longer prompts are split",
    "get_max_context_len": "prompt and generated text together; get_max_seq_len without it",
    "enable_dynamic_shape": "prompts in one call; token by token without it",
    "use_kv_cache": "one new token a call; true without it",
    "use_sdpa_with_kv_cache": "read, but not used",
    "get_eos_ids": "tokens that end the generated text; only the tokenizer's own without it",
    "get_vocab_size": "not read: the tokenizer's is used; for other readers",
    "get_bos_id": "not read: the prompt template writes it; for other readers",
}
LOGITS = ("float32", "float16", "bfloat16")
MISSING = {
    "get_max_seq_len": "missing: the runner refuses the program.",
    "enable_dynamic_shape": "missing: prompts are computed token by token, many times slower.",
    "get_eos_ids": "missing: only the tokenizer's own end token stops generation.",
}


def constant_methods(
    config: PretrainedConfig, context_length: int, end_tokens: list[int], bos: int | None
) -> dict[str, Any]:
    """Return all constant methods of a decoder's .pte.

    `get_eos_ids` returns all end tokens; `get_eos_id` and the last ones are for older readers.
    """
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
    """Return all constant methods of an encoder's .pte.

    Args:
        length: tokens of the longest text.
        width: numbers in the output for one text.
    """
    return dict(zip(ENCODER, (length, width), strict=True))


def missing_methods(found: Iterable[str], required: Sequence[str] = REQUIRED) -> list[str]:
    """Return the methods that the runner, or an encoder's caller, needs and `found` lacks."""
    have = set(found)
    return [name for name in (FORWARD, *required) if name not in have]


def entries(program: ProgramInfo) -> list[ContractEntry]:
    """Check every constant method that the runner looks for, and list the others behind them."""
    found = program.constants
    # Missing ones as well, with None for a value.
    known = [ContractEntry(name, found.get(name), use, _problem(name, program)) for name, use in USES.items()]
    return known + [ContractEntry(name, found[name], "for other readers") for name in found if name not in USES]


def forward_problems(program: ProgramInfo) -> list[str]:
    """Return why the runner could not call the program, one sentence each.

    It passes tokens (1, S) and the position of the first one, and takes logits.
    """
    method = program.forward
    if method is None:
        return ["There is no method forward, the one the runner calls."]

    # Inputs and outputs are independent problems.
    problems = []
    if len(method.inputs) != 2 or any(tensor.dtype != "int64" for tensor in method.inputs):
        problems.append(f"{method}: the runner passes two int64 inputs, tokens and the position of the first one.")
    elif len(method.inputs[0].shape) != 2 or method.inputs[0].shape[0] != 1:
        problems.append(f"{method}: the runner passes tokens of shape [1, S].")
    if len(method.outputs) != 1 or method.outputs[0].dtype not in LOGITS:
        problems.append(f"{method}: the runner takes one output, the logits, as {', '.join(LOGITS)}.")
    return problems


def _problem(name: str, program: ProgramInfo) -> str:
    """Return the problem of one constant method; empty if there is none."""
    value = program.constants.get(name)
    if value is None:
        return MISSING.get(name, "")

    # All values are integers, or booleans, which Python counts as integers.
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, list) != (name in LISTS) or not all(isinstance(n, int) for n in numbers):
        return f"{value} is not of the type that the runner reads."

    rule = RULES.get(name)
    return "" if rule is None or rule.fits(value, program) else f"{value} is wrong: {rule.reason}."


def _longest_call(program: ProgramInfo) -> float:
    """Return the most tokens that forward takes in one call; infinite if it takes one length only."""
    tokens = program.forward.inputs[0] if program.forward and program.forward.inputs else None
    return tokens.shape[-1] if tokens is not None and tokens.dynamic and tokens.shape else float("inf")


def _is_token(value: int, program: ProgramInfo) -> bool:
    """Return whether the logits have an entry for `value`."""
    shape = program.forward.outputs[0].shape if program.forward and program.forward.outputs else ()
    return value >= 0 and (not shape or value < shape[-1])


class _Rule(NamedTuple):
    """Condition on a constant method's value, and the reason given where it is not met."""

    fits: Callable[[Any, ProgramInfo], bool]
    reason: str


# Conditions that the rest of the program puts on a value.
RULES = {
    "get_max_seq_len": _Rule(lambda n, p: 0 < n <= _longest_call(p), "forward does not take that many tokens"),
    "get_max_context_len": _Rule(
        lambda n, p: n >= p.constants.get("get_max_seq_len", 1), "it is less than get_max_seq_len"
    ),
    "enable_dynamic_shape": _Rule(
        lambda b, p: not b or _longest_call(p) < float("inf"), "forward takes one length only"
    ),
    "use_kv_cache": _Rule(
        lambda b, p: p.forward is None or b == (len(p.forward.inputs) > 1), "forward has other inputs"
    ),
    "get_eos_ids": _Rule(
        lambda ids, p: bool(ids) and all(_is_token(n, p) for n in ids), "there is no such token in the vocabulary"
    ),
    "get_vocab_size": _Rule(
        lambda n, p: n > 0 and _is_token(n - 1, p) and not _is_token(n, p), "the logits have another size"
    ),
    "get_bos_id": _Rule(_is_token, "there is no such token in the vocabulary"),
}
