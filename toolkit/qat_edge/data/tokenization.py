"""Rows to token ids: where the loss lies, what was cut, what a model is compared on.

The loss lies on every assistant message with its end-of-turn token, on the completion with the end-of-sequence
token, on all of a text. A prompt is always tokenized as generation will see it: its ids are a prefix of the row's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat_edge.data.formats import Chat, Completion, Pair, Row, Text
from qat_edge.errors import DataError

IGNORED = -100  # label of a token without loss, torch's cross_entropy default


@dataclass(frozen=True)
class TokenizedRows:
    """Training rows {"input_ids", "labels"} and what tokenizing did to them.

    truncated: rows cut at max_length. cut_tokens: tokens lost that way. dropped: rows left out, because nothing
    to learn remained. tokens: in `rows`, of which `trained_tokens` carry loss.
    """

    rows: list[dict[str, list[int]]]
    truncated: int
    cut_tokens: int
    dropped: int
    tokens: int
    trained_tokens: int

    def summary(self) -> str:
        """One line for people."""
        line = f"{len(self.rows)} rows, {self.tokens} tokens, {self.trained_tokens} of them with loss"
        if self.truncated:
            line += f"; {self.truncated} rows cut, {self.cut_tokens} tokens lost"
        if self.dropped:
            line += f"; {self.dropped} rows dropped: nothing to learn was left of them"
        return line


def tokenize(rows: Sequence[Row], tokenizer: Any, max_length: int) -> TokenizedRows:
    """Rows as training examples of at most `max_length` tokens. Neighbouring texts are packed together.

    Raises:
        DataError: a chat template is missing or does not fit the messages; nothing to learn remains at all.
    """
    done: list[dict[str, list[int]]] = []
    truncated = cut = dropped = 0
    for ids, labels in _examples(rows, tokenizer, max_length):
        truncated += len(ids) > max_length
        cut += max(0, len(ids) - max_length)
        ids, labels = ids[:max_length], labels[:max_length]
        # The first label is never predicted: a causal model shifts labels by one.
        if all(label == IGNORED for label in labels[1:]):
            dropped += 1
            continue
        done.append({"input_ids": ids, "labels": labels})
    if not done:
        raise DataError(
            f"None of {len(rows)} rows has anything to learn within {max_length} tokens. Raise --max-length."
        )
    tokens = sum(len(row["input_ids"]) for row in done)
    trained = sum(label != IGNORED for row in done for label in row["labels"][1:])
    return TokenizedRows(done, truncated, cut, dropped, tokens, trained)


def prompts(rows: Sequence[Row], tokenizer: Any) -> Iterator[tuple[list[int], str]]:
    """Prompt ids and expected answer of each row's last assistant message or completion; texts have none."""
    for row in rows:
        if isinstance(row, Chat):
            last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
            prompt = _render(row, tokenizer, last, add_generation_prompt=True)
            yield _encode(prompt, tokenizer), row.messages[last]["content"]
        elif isinstance(row, Completion):
            yield leading_ids(tokenizer) + _encode(row.prompt, tokenizer), row.completion


@dataclass(frozen=True)
class ScoredIds:
    """A sequence to be teacher-forced. The model is compared at `positions`, whose next tokens are `targets`."""

    ids: list[int]
    positions: list[int]

    @property
    def targets(self) -> NDArray[np.int64]:
        """(positions,) ids that come next."""
        return np.array(self.ids, dtype=np.int64)[np.array(self.positions) + 1]


def scored_ids(rows: Sequence[Row], tokenizer: Any, window: int, limit: int) -> list[ScoredIds]:
    """Sequences of at most `window` tokens, compared where training puts loss, `limit` positions in all.

    Raises:
        DataError: no row has anything to compare within the window.
    """
    found: list[ScoredIds] = []
    left = limit
    for ids, labels in _examples(rows, tokenizer, window):
        positions = [i for i, label in enumerate(labels[1:window]) if label != IGNORED][:left]
        if positions:
            found.append(ScoredIds(ids[: positions[-1] + 2], positions))
            left -= len(positions)
        if left == 0:
            break
    if not found:
        raise DataError(f"None of {len(rows)} rows has anything to compare within {window} tokens. Raise --window.")
    return found


@dataclass(frozen=True)
class Collator:
    """Pads training rows on the right to the longest, rounded up to `multiple_of`; padding carries no loss."""

    tokenizer: Any
    multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """int64 tensors (rows, length): input_ids, labels, attention_mask."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], length, 0 if pad is None else pad),
            "labels": _padded([row["labels"] for row in rows], length, IGNORED),
            # From lengths, not from ids: many tokenizers pad with their end token.
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], length, 0),
        }


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text: the beginning-of-sequence id for some, nothing for others."""
    first = tokenizer("").input_ids[:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _padded(lists: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([items + [fill] * (length - len(items)) for items in lists], dtype=torch.long)


Example = tuple[list[int], list[int]]  # ids and labels of equal length


def _examples(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Iterator[Example]:
    """Untruncated examples in the order of the rows; a run of texts is one stream cut into windows."""
    stream: list[int] = []
    for row in rows:
        if isinstance(row, Text):
            stream += [*_encode(row.text, tokenizer), *_end_ids(tokenizer)]
            continue
        if isinstance(row, Pair):
            raise DataError(f"{row.where}: pairs of texts are for encoders; the model of --model generates text.")
        yield from _text_examples(stream, tokenizer, max_length)
        stream = []
        yield from _row_examples(row, tokenizer)
    yield from _text_examples(stream, tokenizer, max_length)


def _text_examples(stream: list[int], tokenizer: Any, max_length: int) -> Iterator[Example]:
    for ids in _chunks(stream, tokenizer, max_length):
        if len(ids) > 1:
            yield ids, list(ids)


def _row_examples(row: Chat | Completion, tokenizer: Any) -> Iterator[Example]:
    if isinstance(row, Chat):
        yield from _chat_examples(row, tokenizer)
        return
    prompt = leading_ids(tokenizer) + _encode(row.prompt, tokenizer)
    ids = _extend(prompt, row.prompt, row.prompt + row.completion, tokenizer) + _end_ids(tokenizer)
    yield ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def _chat_examples(row: Chat, tokenizer: Any) -> Iterator[Example]:
    """One example for the conversation, or one an answer where the template rewrites earlier turns.

    Templates of reasoning models drop the thoughts of past turns, for one.
    """
    ids: list[int] = []
    labels: list[int] = []
    text = ""
    for i, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(row, tokenizer, i, add_generation_prompt=True)
        through = _render(row, tokenizer, i + 1, add_generation_prompt=False)
        if not through.startswith(prompt):
            raise DataError(
                f"{row.where}: the chat template does not render message {i + 1} after its own generation prompt, so "
                "what is learned would not be what is generated. Give 'prompt' and 'completion' rows instead."
            )
        if not prompt.startswith(text):
            yield ids, labels
            ids, labels, text = [], [], ""
        ids = _extend(ids, text, prompt, tokenizer)
        labels += [IGNORED] * (len(ids) - len(labels))
        whole = _extend(ids, prompt, through, tokenizer)
        turn = _turn_length(whole[len(ids) :], tokenizer)
        labels += whole[len(ids) : len(ids) + turn] + [IGNORED] * (len(whole) - len(ids) - turn)
        ids, text = whole, through
    yield ids, labels


def _turn_length(ids: list[int], tokenizer: Any) -> int:
    """Tokens of an answer up to its end-of-turn token: white space that a template adds after it is not learned."""
    special = set(tokenizer.all_special_ids)
    last = max((i for i, token in enumerate(ids) if token in special), default=len(ids) - 1)
    return len(ids) if tokenizer.decode(ids[last + 1 :]).strip() else last + 1


def _extend(ids: list[int], text: str, longer: str, tokenizer: Any) -> list[int]:
    """Ids of `longer`, which starts with `text`, beginning with exactly `ids`.

    Where a token would straddle the border, the rest is tokenized on its own, as in generation.
    """
    lead = leading_ids(tokenizer)
    # A rendered chat template brings its own beginning-of-sequence token; a bare prompt got it before its text.
    start = lead if lead and ids[:1] == lead and not text.startswith(tokenizer.bos_token) else []
    whole = start + _encode(longer, tokenizer)
    if whole[: len(ids)] == ids:
        return whole
    return ids + _encode(longer.removeprefix(text), tokenizer)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _end_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _chunks(ids: list[int], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Consecutive pieces of at most `length` tokens, each led by what the tokenizer puts before a text."""
    lead = leading_ids(tokenizer)
    step = length - len(lead)
    return (lead + ids[start : start + step] for start in range(0, len(ids), step))


def _render(row: Chat, tokenizer: Any, count: int, add_generation_prompt: bool) -> str:
    """The first `count` messages as the chat template writes them."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where}: the rows hold 'messages', but the tokenizer of --model has no chat template. Take an "
            "instruction-tuned model, or give --data rows of 'prompt' and 'completion'."
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                row.messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(m["role"] for m in row.messages)
        raise DataError(f"{row.where}: the chat template refuses the roles {roles}: {error}") from error
