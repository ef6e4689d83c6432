"""Turn rows into token ids and labels for a model that generates text, and pad them into batches.

The loss covers every assistant message with its end-of-turn token, every completion with the end-of-sequence token, and
all of a running text. Prompts are tokenized exactly as in generation: the ids of a prompt are a prefix of the ids of
its training row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qat_edge.data.formats import Chat, Completion, Pair, Row, Text
from qat_edge.errors import DataError

IGNORED = -100  # label of a token without loss, the default of torch's cross_entropy


@dataclass(frozen=True)
class TokenizedRows:
    """Training rows, and what tokenizing them dropped.

    Attributes:
        rows: "input_ids" and "labels" of each row, lists of equal length.
        truncated: Number of rows cut at the maximum length.
        cut_tokens: Number of tokens removed from them.
        dropped: Number of rows removed because no token with loss was left.
        tokens: Number of tokens in `rows`.
        trained_tokens: Number of those that have a loss.
    """

    rows: list[dict[str, list[int]]]
    truncated: int
    cut_tokens: int
    dropped: int
    tokens: int
    trained_tokens: int

    def summary(self) -> str:
        """Return the counts as one line of a message."""
        line = f"{len(self.rows)} rows, {self.tokens} tokens, {self.trained_tokens} of them with loss"
        if self.truncated:
            line += f"; {self.truncated} rows truncated, {self.cut_tokens} tokens lost"
        if self.dropped:
            line += f"; {self.dropped} rows dropped: no token with loss was left"
        return line


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenizedRows:
    """Tokenize rows into training examples of at most `max_length` tokens. Consecutive texts are packed together.

    Raises:
        DataError: A chat template is missing or does not fit the messages, or no example is left.
    """
    # Truncate, and drop rows whose completion was cut off entirely.
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
            f"None of {len(rows)} rows has a token to train on within {max_length} tokens. Raise --max-length."
        )
    tokens = sum(len(row["input_ids"]) for row in done)
    trained = sum(label != IGNORED for row in done for label in row["labels"][1:])
    return TokenizedRows(done, truncated, cut, dropped, tokens, trained)


def prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], str]]:
    """Yield prompt ids and expected output of each row's last assistant message or completion; texts have none."""
    for row in rows:
        # The prompt ends with the template's generation prompt, as in `_chat_examples`.
        if isinstance(row, Chat):
            last = max(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
            prompt = _render(row, tokenizer, last, add_generation_prompt=True)
            yield _encode(prompt, tokenizer), row.messages[last]["content"]
        elif isinstance(row, Completion):
            yield leading_ids(tokenizer) + _encode(row.prompt, tokenizer), row.completion


@dataclass(frozen=True)
class ScoredIds:
    """A sequence for teacher forcing.

    Attributes:
        ids: Token ids of the sequence.
        positions: Positions whose predictions are compared; the prediction at i is for token i + 1.
    """

    ids: list[int]
    positions: list[int]

    @property
    def targets(self) -> NDArray[np.int64]:
        """Token ids that follow the compared positions, shape (positions,)."""
        return np.array(self.ids, dtype=np.int64)[np.array(self.positions) + 1]


def scored_ids(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, window: int, limit: int) -> list[ScoredIds]:
    """Tokenize rows for a comparison of models at the positions that have a loss in training.

    Args:
        rows: Evaluation rows.
        tokenizer: Of the models that are compared.
        window: Maximum number of tokens of a sequence.
        limit: Number of positions in total; further rows are not tokenized.

    Raises:
        DataError: No row has a position to compare within the window.
    """
    # Position i predicts token i + 1, so labels are shifted by one.
    found: list[ScoredIds] = []
    left = limit
    for ids, labels in _examples(rows, tokenizer, window):
        positions = [i for i, label in enumerate(labels[1:window]) if label != IGNORED][:left]
        if positions:
            # Nothing after the last target has to be computed.
            found.append(ScoredIds(ids[: positions[-1] + 2], positions))
            left -= len(positions)
        if left == 0:
            break
    if not found:
        raise DataError(f"None of {len(rows)} rows has a token to compare within {window} tokens. Raise --window.")
    return found


@dataclass(frozen=True)
class Collator:
    """Pad training rows on the right into a batch; padding has no loss.

    Attributes:
        tokenizer: Gives the padding token.
        multiple_of: Length of a batch in tokens is a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Return "input_ids", "labels" and "attention_mask", int64 (rows, length)."""
        # A multiple of 8 lets matrix products use tensor cores.
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        return {
            "input_ids": _pad([row["input_ids"] for row in rows], length, self._padding_id()),
            "labels": _pad([row["labels"] for row in rows], length, IGNORED),
            # From lengths, not from ids: many tokenizers pad with their end token.
            "attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], length, 0),
        }

    def _padding_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        return 0  # any id serves: the mask hides it


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before any text: a beginning-of-sequence token, or nothing."""
    # The tokens around an empty text; an end token alone does not count.
    first = tokenizer("").input_ids[:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _pad(lists: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([items + [fill] * (length - len(items)) for items in lists], dtype=torch.long)


# --- rows to examples --------------------------------------------------------------------------------------


class _Example(NamedTuple):
    """Token ids and their labels, of equal length."""

    ids: list[int]
    labels: list[int]


def _examples(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[_Example]:
    """Yield examples in the order of the rows, not truncated. Consecutive texts are one stream cut into windows."""
    stream: list[int] = []
    for row in rows:
        # An end token separates texts, so that the model does not predict one from the other.
        if isinstance(row, Text):
            stream += [*_encode(row.text, tokenizer), *_end_ids(tokenizer)]
            continue
        if isinstance(row, Pair):
            raise DataError(f"{row.where}: pairs of texts are for encoders; the model of --model generates text.")

        # The texts before this row end here.
        yield from _text_examples(stream, tokenizer, max_length)
        stream = []
        if isinstance(row, Chat):
            yield from _chat_examples(row, tokenizer)
        else:
            yield _completion_example(row, tokenizer)
    yield from _text_examples(stream, tokenizer, max_length)


def _text_examples(stream: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[_Example]:
    for ids in _windows(stream, tokenizer, max_length):
        if len(ids) > 1:  # one token alone has nothing to predict
            yield _Example(ids, list(ids))


def _completion_example(row: Completion, tokenizer: PreTrainedTokenizerBase) -> _Example:
    prompt = leading_ids(tokenizer) + _encode(row.prompt, tokenizer)
    ids = _extend(prompt, row.prompt, row.prompt + row.completion, tokenizer) + _end_ids(tokenizer)
    return _Example(ids, [IGNORED] * len(prompt) + ids[len(prompt) :])


def _chat_examples(row: Chat, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Example]:
    """Yield one example for a conversation, or one per assistant message if the template rewrites earlier turns.

    Templates of reasoning models do so: they drop the reasoning of past turns.
    """
    ids: list[int] = []
    labels: list[int] = []
    text = ""  # the rendered conversation that `ids` stands for
    for i, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue

        # Render the conversation up to this message and through it. Training has to continue the same prompt as
        # generation does.
        prompt = _render(row, tokenizer, i, add_generation_prompt=True)
        through = _render(row, tokenizer, i + 1, add_generation_prompt=False)
        if not through.startswith(prompt):
            raise DataError(
                f"{row.where}: the chat template does not render message {i + 1} after its own generation prompt, so "
                "training would differ from generation. Give 'prompt' and 'completion' rows instead."
            )

        # An earlier turn was rendered differently: that example ends here.
        if not prompt.startswith(text):
            yield _Example(ids, labels)
            ids, labels, text = [], [], ""

        # Append the prompt without loss, then the message with loss up to its end-of-turn token.
        ids = _extend(ids, text, prompt, tokenizer)
        labels += [IGNORED] * (len(ids) - len(labels))
        whole = _extend(ids, prompt, through, tokenizer)
        message_ids = whole[len(ids) :]
        trained = _turn_length(message_ids, tokenizer)
        labels += message_ids[:trained] + [IGNORED] * (len(message_ids) - trained)
        ids, text = whole, through
    yield _Example(ids, labels)


def _turn_length(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of an assistant message up to its end-of-turn token.

    White space that a template adds after that token has no loss.
    """
    # The last special token ends the turn, unless text follows it.
    special = set(tokenizer.all_special_ids)
    last = max((i for i, token in enumerate(ids) if token in special), default=len(ids) - 1)
    rest = tokenizer.decode(ids[last + 1 :])
    return len(ids) if rest.strip() else last + 1


def _extend(ids: list[int], text: str, longer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a longer text so that the result begins with the ids of its beginning.

    If a token would span the end of `text`, the rest is tokenized on its own, as in generation.

    Args:
        ids: Token ids of `text`.
        text: Beginning of `longer`.
        longer: The text to tokenize.
        tokenizer: The model's tokenizer.
    """
    lead = leading_ids(tokenizer)
    # A rendered chat template brings its own beginning-of-sequence token; a bare prompt got it before its text.
    start = lead if lead and ids[:1] == lead and not text.startswith(tokenizer.bos_token) else []
    whole = start + _encode(longer, tokenizer)
    if whole[: len(ids)] == ids:
        return whole
    return ids + _encode(longer.removeprefix(text), tokenizer)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _windows(ids: list[int], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Cut ids into windows of at most `length` tokens, each beginning with the leading ids of a text."""
    lead = leading_ids(tokenizer)
    step = length - len(lead)
    return (lead + ids[start : start + step] for start in range(0, len(ids), step))


def _render(row: Chat, tokenizer: PreTrainedTokenizerBase, count: int, add_generation_prompt: bool) -> str:
    """Render the first `count` messages with the chat template."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where}: the rows have 'messages', but the tokenizer of --model has no chat template. Use an "
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
