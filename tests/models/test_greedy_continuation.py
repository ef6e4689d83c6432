"""Greedy continuation in transformers with the KV cache of the prompt before, and the text of ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from conftest import make_tokenizer
from qat_edge.models.greedy_continuation import GreedyContinuation
from qat_edge.models.token_ids import WINDOW, TextStream, reusable_length, shared_length

SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
END = 2
PROMPT = list(range(10, 40))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()


def gemma() -> Any:
    """A model whose first layer sees 8 tokens, so that its cache cannot be cut."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=layers, head_dim=16)).eval()


def run(continuation: GreedyContinuation, ids: list[int], most: int = 8) -> list[int]:
    found: list[int] = []
    continuation.run(ids, [END], most, lambda token: found.append(token) is None)
    return found


@pytest.mark.parametrize(("make", "is_reused"), [(llama, True), (gemma, False)])
def test_a_cache_changes_no_continuation(make: Any, is_reused: bool) -> None:
    model = make()
    kept, lengths = GreedyContinuation(model), list[int]()
    model.register_forward_hook(
        lambda _, args, given, out: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    first = run(kept, PROMPT)
    # Prompts with the number of their ids that are new: the next turn, another one in its place, the same, and another.
    # The last id of an answer was not processed yet.
    other = [*PROMPT[:20], 60, 61]
    for ids, new in (([*PROMPT, *first, 50, 51], 3), (other, 2), (other, 1), ([7, 8, 9], 3)):
        lengths.clear()
        found, processed = run(kept, ids), lengths[0]
        assert found == run(GreedyContinuation(model), ids)
        assert processed == (new if is_reused else len(ids))


def test_no_token_comes_after_an_unwanted_one_or_an_end() -> None:
    model = llama()
    expected = run(GreedyContinuation(model), PROMPT)
    found: list[int] = []
    continuation = GreedyContinuation(model)
    continuation.run(PROMPT, [END], 8, lambda token: found.append(token) is None and len(found) < 3)
    assert found == expected[:3]
    assert run(continuation, [*PROMPT, *found, 9]) == run(GreedyContinuation(model), [*PROMPT, *found, 9])

    ended: list[int] = []
    continuation.run(PROMPT, [END, expected[2]], 8, lambda token: ended.append(token) is None)
    assert ended == expected[: expected.index(expected[2])]


def test_what_an_error_left_in_the_cache_is_not_used() -> None:
    model = llama()
    continuation = GreedyContinuation(model)

    def fail(token: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continuation.run(PROMPT, [END], 8, fail)
    assert run(continuation, PROMPT) == run(GreedyContinuation(model), PROMPT)


def test_the_last_id_of_a_prompt_is_always_processed() -> None:
    assert [shared_length([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [], [5])] == [2, 2, 0, 0]
    assert [reusable_length([1, 2, 3], prompt) for prompt in ([1, 2, 3], [1, 2, 3, 4], [1, 9, 3])] == [2, 3, 1]


@pytest.mark.parametrize("text", ["naïve café 日本語 😀 " * 20, "a", ""])
def test_pieces_of_text_add_up(text: str) -> None:
    tokenizer, pieces = make_tokenizer(), list[str]()
    stream = TextStream(tokenizer, pieces.append)
    ids = [*tokenizer.encode(text, add_special_tokens=False), 2]
    for token in ids:
        stream.take(token)
    stream.finish()
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece and piece for piece in pieces)
    assert len(ids) < 3 or len(ids) > 2 * WINDOW


def test_half_a_character_at_the_end_is_marked() -> None:
    tokenizer, pieces = make_tokenizer(), list[str]()
    stream = TextStream(tokenizer, pieces.append)
    for token in tokenizer.encode("a😀", add_special_tokens=False)[:-1]:
        stream.take(token)
    assert pieces == ["a"]
    stream.finish()
    assert "".join(pieces) == "a\ufffd"
