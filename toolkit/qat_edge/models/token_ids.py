"""Generated token ids: their text as it comes, and the part that two prompts have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # at the end of a text whose last character has further bytes
# Ids that are decoded together. A longer answer keeps the last few, so that the time per token does not grow.
WINDOW, KEPT = 64, 8


class TextStream:
    """Text of token ids that come one at a time, without special tokens; each finished piece goes to `emit`.

    A tokenizer may write a token differently after other tokens, so a piece is the difference between two texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._emit = emit
        self._ids: list[int] = []
        self._shown = ""  # text of `_ids` that was passed on

    def take(self, token: int) -> None:
        """Take the next id."""
        self._ids.append(token)
        text = self._decode()
        if not text.endswith(INCOMPLETE):
            self._pass_on(text)
            if len(self._ids) >= WINDOW:
                self._ids = self._ids[-KEPT:]
                self._shown = self._decode()

    def finish(self) -> None:
        """Pass on the bytes of a character that was not finished, as the tokenizer marks them."""
        self._pass_on(self._decode())

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _pass_on(self, text: str) -> None:
        piece = text[len(self._shown) :]
        self._shown = text
        if piece:
            self._emit(piece)


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of ids with which both begin."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def reusable_length(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many ids of a KV cache a prompt can keep; its last one is processed anew, for the logits after it."""
    return min(shared_length(cached, prompt), len(prompt) - 1)
