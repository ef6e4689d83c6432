"""Turn rows into token ids and labels for a model that generates text, and pad them into batches.

The loss covers every assistant message with its end-of-turn token, every completion with the end-of-sequence token, and
all of a running text. Rows whose text is empty are left out and counted. Prompts are tokenized exactly as in
generation: the ids of a prompt are a prefix of the ids of its training row. What the chat template and the tokenizer
make of a conversation is decided in `data.conversation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qat_edge import progress
from qat_edge.data.chat_template import encode
from qat_edge.data.conversation import ChatFormat, end_ids, ended_ids, extend_ids, lead_of, text_prompt
from qat_edge.data.early_ends import EarlyEnds, early_end
from qat_edge.data.packed_rows import POSITIONS
from qat_edge.data.rows import Chat, Completion, Pair, Row, Text
from qat_edge.data.token_table import IGNORED, TokenRow, TokenTable
from qat_edge.errors import DataError
from qat_edge.readers import counted, shorten

ALL_EMPTY = "The 'text' of every row is empty, so there is nothing to predict"


@dataclass(frozen=True)
class TokenizedRows:
    """Training rows, and what tokenizing them dropped.

    Attributes:
        rows: "input_ids" and "labels" of each row, lists of equal length. They are on disk.
        truncated: Number of rows cut at the maximum length.
        cut_tokens: Number of tokens removed from them.
        dropped: Number of rows removed because no token with loss was left.
        tokens: Number of tokens in `rows`.
        trained_tokens: Number of those that have a loss.
        notes: What was left out of the rows, and what else the user should know about them, one sentence each.
        end_of_turn: Ids of the tokens that end the assistant's messages; empty without conversations.
        template_arguments: Arguments of the chat template that all conversations have in common.
        early_ends: Answers with an end token inside.
    """

    rows: TokenTable
    truncated: int
    cut_tokens: int
    dropped: int
    tokens: int
    trained_tokens: int
    notes: tuple[str, ...] = ()
    end_of_turn: tuple[int, ...] = ()
    template_arguments: dict[str, Any] = field(default_factory=dict)
    early_ends: EarlyEnds = field(default_factory=EarlyEnds)

    def summary(self) -> str:
        """Return the counts as one line of a message."""
        line = f"{counted(len(self.rows), 'row')}, {self.tokens} tokens, {self.trained_tokens} of them with loss"
        if self.truncated:
            line += f"; {counted(self.truncated, 'row')} truncated, {counted(self.cut_tokens, 'token')} lost"
        if self.dropped:
            line += f"; {counted(self.dropped, 'row')} dropped: no token with loss was left"
        return line


def tokenize(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    ends: Iterable[int] = (),
    join_texts: bool = True,
    may_be_empty: bool = False,
) -> TokenizedRows:
    """Tokenize rows into training examples of at most `max_length` tokens.

    Args:
        rows: Training rows.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens of an example.
        ends: Ids of the model's end tokens, which are looked for inside of answers.
        join_texts: Consecutive texts are one stream that is cut into examples; otherwise each begins an example.
        may_be_empty: Return no example where none is left.

    Raises:
        DataError: A chat template is missing or does not fit the messages, or no example is left.
        ModelError: The chat template cannot be used at all.
    """
    # One pass: neither rows nor examples are kept in memory.
    facts, counts, chat_format = _RowFacts(tokenizer), _Counts(ends=frozenset(ends)), ChatFormat(tokenizer)
    examples = _examples(facts.watch(rows), chat_format, max_length, join_texts)
    done = TokenTable(_kept_examples(examples, counts, max_length, chat_format))
    if not done and not may_be_empty and facts.empty_texts == facts.rows:
        raise DataError(f"{ALL_EMPTY} ({counted(facts.rows, 'row')}). Fill it in.")
    if not done and not may_be_empty:
        raise DataError(
            f"None of {facts.rows} rows has a token to train on within {max_length} tokens. Raise --max-length; where "
            "the model has no more positions (max_position_embeddings), shorten the rows or use another model."
        )
    return TokenizedRows(
        done, counts.truncated, counts.cut, counts.dropped, counts.tokens, counts.trained,
        notes=(*chat_format.notes(), *facts.notes(), *counts.notes()),
        end_of_turn=tuple(chat_format.ends),
        template_arguments=facts.common_arguments,
        early_ends=counts.early_ends,
    )  # fmt: skip


class PromptedAnswer(NamedTuple):
    """A prompt of evaluation rows, and the answer that training teaches to it.

    Attributes:
        ids: Token ids of the prompt.
        expected: Text of the answer, for exact match.
        answer_ids: Token ids with a loss, the end of the answer included.
        where: File and line of the row.
        is_rewritten: The chat template changes more than white space in the text of the answer.
    """

    ids: list[int]
    expected: str
    answer_ids: list[int]
    where: str
    is_rewritten: bool = False


def prompts(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[PromptedAnswer]:
    """Yield the prompt and the answer of each row's last assistant message or completion; texts have none.

    A conversation with tool calls has a prompt for each assistant message: the call, and the answer to its result.
    """
    chat_format = ChatFormat(tokenizer)
    for row in rows:
        if isinstance(row, Chat):
            turns = chat_format.turns(row)
            calls_tools = any("tool_calls" in message for message in row.messages)
            for turn in turns if calls_tools else turns[-1:]:
                answer_ids = turn.ids[: turn.trained]
                yield PromptedAnswer(turn.prompt_ids, turn.expected, answer_ids, row.where, turn.is_rewritten)
        elif isinstance(row, Completion):
            ids, answer = _completion_ids(row, tokenizer)
            yield PromptedAnswer(ids, row.completion, answer, row.where)


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


def scored_ids(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, window: int, limit: int, flag: str = "--window"
) -> list[ScoredIds]:
    """Tokenize rows for a comparison of models at the positions that have a loss in training; report what is not used.

    Args:
        rows: Evaluation rows.
        tokenizer: Of the models that are compared.
        window: Maximum number of tokens of a sequence.
        limit: Number of positions in total; further rows are not tokenized.
        flag: That sets `window`, for messages.

    Raises:
        DataError: No row has a position to compare within the window.
    """
    # Position i predicts token i + 1, so labels are shifted by one.
    found: list[ScoredIds] = []
    left, cut, left_out = limit, 0, 0
    facts = _RowFacts(tokenizer)
    for ids, labels in _examples(facts.watch(rows), ChatFormat(tokenizer), window):
        positions = [i for i, label in enumerate(labels[1:window]) if label != IGNORED][:left]
        if len(ids) > window:
            cut, left_out = cut + bool(positions), left_out + (not positions)
        if positions:
            # Nothing after the last target has to be computed.
            found.append(ScoredIds(ids[: positions[-1] + 2], positions))
            left -= len(positions)
        if left == 0:
            break
    if not found and all(map(_is_empty_text, rows)):
        raise DataError(f"{ALL_EMPTY} ({counted(len(rows), 'row')}). Fill it in.")
    if not found:
        raise DataError(f"None of {len(rows)} rows has a token to compare within {window} tokens. Raise {flag}.")
    if cut or left_out:
        progress.warn(
            f"Rows longer than {window} tokens ({flag}): {cut} are cut there, {left_out} are left out because their "
            "answers begin after that"
        )
    for note in facts.unused():
        progress.warn(note)
    return found


@dataclass(frozen=True)
class Collator:
    """Pad training rows, or packed sequences of them, on the right into a batch; padding has no loss.

    Attributes:
        tokenizer: Gives the padding token.
        multiple_of: Length of a batch in tokens is a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    multiple_of: int = 8

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Return "input_ids", "labels" and "attention_mask", or "position_ids" if packed, int64 (rows, length)."""
        # A multiple of 8 lets matrix products use tensor cores.
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": _pad([row["input_ids"] for row in rows], length, self._padding_id()),
            "labels": _pad([row["labels"] for row in rows], length, IGNORED),
        }
        if POSITIONS in rows[0]:
            # Padding is one more row of a packed sequence.
            positions = [[*row[POSITIONS], *range(length - len(row[POSITIONS]))] for row in rows]
            return {**batch, POSITIONS: torch.tensor(positions)}
        # From lengths, not from ids: many tokenizers pad with their end token.
        return {**batch, "attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], length, 0)}

    def _padding_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        return 0  # any id serves: the mask hides it


def _pad(lists: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([items + [fill] * (length - len(items)) for items in lists], dtype=torch.long)


# --- rows to examples --------------------------------------------------------------------------------------


class _Example(NamedTuple):
    """Token ids and their labels, of equal length."""

    ids: list[int]
    labels: list[int]


@dataclass
class _Counts:
    """Numbers of `TokenizedRows`, counted while examples are written."""

    truncated: int = 0
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    trained: int = 0
    ends_alone: int = 0  # rows with no other trained token than one that ends an answer
    unknown: int = 0  # trained tokens that stand for a text that the tokenizer has no token for
    ends: frozenset[int] = frozenset()  # the model's end tokens
    early_ends: EarlyEnds = field(default_factory=EarlyEnds)

    def add_answers(self, labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """Look for end tokens inside of the answers of an example, which prompts without loss separate."""
        for is_answer, answer in groupby(labels, lambda label: label != IGNORED):
            if is_answer:
                self.early_ends.add(early_end(list(answer), self.ends, tokenizer))

    def notes(self) -> list[str]:
        """Return sentences about rows that teach no more than to end, and about text that is lost."""
        lines = []
        if self.ends_alone:
            lines.append(
                f"{counted(self.ends_alone, 'row trains', 'rows train')} an end token alone: the model learns to "
                "answer nothing there"
            )
        if self.unknown:
            lines.append(
                f"{self.unknown} trained tokens are the tokenizer's unknown token: it has no tokens for that text, and "
                "the model can neither read nor write it"
            )
        return lines


@dataclass
class _RowFacts:
    """Facts about rows, collected while they pass.

    Attributes:
        tokenizer: The model's tokenizer.
        rows: Their number.
        empty_texts: Number of texts that are empty or white space.
        unused_keys: Number of texts with a key that only encoders use, by key.
        framed: Number of texts, prompts and completions that spell the token at which they begin or end.
        first_arguments: Arguments of the chat template of the first conversation; None before it.
        differing: Names of arguments of the chat template that not all conversations share.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: int = 0
    empty_texts: int = 0
    unused_keys: Counter[str] = field(default_factory=Counter)
    framed: int = 0
    first_arguments: dict[str, Any] | None = None
    differing: set[str] = field(default_factory=set)

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass the rows on."""
        for row in rows:
            self.rows += 1
            if isinstance(row, Text):
                self.empty_texts += _is_empty_text(row)
                self.unused_keys["label"] += row.label is not None
                self.unused_keys["text_pair"] += row.pair is not None
                self.framed += self._is_framed(row.text, row.text)
            elif isinstance(row, Completion):
                self.framed += self._is_framed(row.prompt, row.completion)
            elif isinstance(row, Chat):
                self._compare_arguments(row.template_arguments)
            yield row

    def _is_framed(self, begin: str, end: str) -> bool:
        """Return whether texts spell the token that the tokenizer begins a sequence with, or the one that ends it."""
        first, last = self._frame
        return bool((first and begin.startswith(first)) or (last and end.rstrip().endswith(last)))

    @cached_property
    def _frame(self) -> tuple[str | None, str | None]:
        """Tokens that the tokenizer puts before and after a text; None for none."""
        return lead_of(self.tokenizer).text or None, self.tokenizer.eos_token

    def _compare_arguments(self, arguments: dict[str, Any]) -> None:
        first = self.first_arguments = arguments if self.first_arguments is None else self.first_arguments
        if first != arguments:
            shared = {name for name in first.keys() & arguments.keys() if first[name] == arguments[name]}
            self.differing |= (first.keys() | arguments.keys()) - shared

    @property
    def common_arguments(self) -> dict[str, Any]:
        """Arguments of the chat template that all conversations share; empty where they differ."""
        return {} if self.differing else dict(self.first_arguments or {})

    def unused(self) -> list[str]:
        """Return a sentence about empty texts, and one about labels and second texts, which only encoders use."""
        lines = [f"{counted(self.empty_texts, 'row')} with an empty 'text' left out"] if self.empty_texts else []
        found = ", ".join(f"'{key}' in {counted(count, 'row')}" for key, count in self.unused_keys.items() if count)
        return [*lines, f"Not used, because the model generates text: {found}"] if found else lines

    def notes(self) -> list[str]:
        """Return what is not used of the rows, and where they bring their own tokens and arguments, a sentence each."""
        lines = self.unused()
        if self.framed:
            lines.append(
                f"{counted(self.framed, 'row spells', 'rows spell')} the token that the tokenizer begins or ends a "
                "text with: no second one is added there"
            )
        if self.differing:
            names = ", ".join(f"'{shorten(name)}'" for name in sorted(self.differing))
            lines.append(
                f"chat_template_kwargs differ between rows ({names}): the rows are trained with their own, and "
                "`generate` gives the template none of them"
            )
        return lines


def _is_empty_text(row: Row) -> bool:
    """Return whether a row has nothing to learn from but the end of its text."""
    return isinstance(row, Text) and not row.text.strip()


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the unknown token; None where there is none, or where it has another use, too, as in GPT-2."""
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) else unknown


def _kept_examples(
    examples: Iterable[_Example], counts: _Counts, max_length: int, chat_format: ChatFormat
) -> Iterator[TokenRow]:
    """Yield truncated examples, without those whose completion was cut off entirely."""
    completion_ends = {*end_ids(chat_format.tokenizer)}
    unknown = _unknown_id(chat_format.tokenizer)
    for example in examples:
        counts.truncated += len(example.ids) > max_length
        counts.cut += max(0, len(example.ids) - max_length)
        ids, labels = example.ids[:max_length], example.labels[:max_length]

        # The first label is never predicted: a causal model shifts labels by one.
        trained = [label for label in labels[1:] if label != IGNORED]
        if not trained:
            counts.dropped += 1
            continue
        counts.tokens += len(ids)
        counts.trained += len(trained)
        counts.unknown += 0 if unknown is None else trained.count(unknown)
        # The end of a window of texts is no answer: all of it has a loss.
        if IGNORED in labels:
            counts.add_answers(labels, chat_format.tokenizer)
            counts.ends_alone += {*trained} <= completion_ends | {*chat_format.ends}
        yield {"input_ids": ids, "labels": labels}


def _examples(
    rows: Iterable[Row], chat_format: ChatFormat, max_length: int, join_texts: bool = True
) -> Iterator[_Example]:
    """Yield examples in the order of the rows, not truncated. Texts are cut into windows, joined or each by itself."""
    tokenizer = chat_format.tokenizer
    lead = lead_of(tokenizer).ids
    window = max_length - len(lead)
    stream: list[int] = []
    for row in rows:
        if _is_empty_text(row):
            continue
        # An end token separates texts, so that the model does not predict one from the other.
        if isinstance(row, Text):
            ids = ended_ids(encode(row.text, tokenizer), tokenizer)
            stream += ids[len(lead) :] if ids[: len(lead)] == lead else ids  # each window begins with `lead`
            # Whole windows leave the stream, so that it does not grow with the number of texts.
            whole = len(stream) // window * window if join_texts else len(stream)
            yield from _text_examples(stream[:whole], tokenizer, max_length)
            stream = stream[whole:]
            continue
        if isinstance(row, Pair):
            raise DataError(f"{row.where}: pairs of texts are for encoders; the model of --model generates text.")

        # The texts before this row end here.
        yield from _text_examples(stream, tokenizer, max_length)
        stream = []
        if isinstance(row, Chat):
            yield from _chat_examples(row, chat_format)
        else:
            yield _completion_example(row, tokenizer)
    yield from _text_examples(stream, tokenizer, max_length)


def _text_examples(stream: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[_Example]:
    for ids in _windows(stream, tokenizer, max_length):
        if len(ids) > 1:  # one token alone has nothing to predict
            yield _Example(ids, list(ids))


def _completion_ids(row: Completion, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt, and those of its completion."""
    prompt = text_prompt(row.prompt, tokenizer).ids
    ids = extend_ids(prompt, row.prompt, row.prompt + row.completion, tokenizer)
    return prompt, ended_ids(ids[len(prompt) :], tokenizer)


def _completion_example(row: Completion, tokenizer: PreTrainedTokenizerBase) -> _Example:
    prompt, answer = _completion_ids(row, tokenizer)
    return _Example(prompt + answer, [IGNORED] * len(prompt) + answer)


def _chat_examples(row: Chat, chat_format: ChatFormat) -> Iterator[_Example]:
    """Yield one example for a conversation, or several if a turn does not continue the one before.

    That is so for templates of reasoning models, which drop the reasoning of past turns, and for templates that end no
    turn with a token.
    """
    ids: list[int] = []
    labels: list[int] = []
    for turn in chat_format.turns(row):
        if ids and not turn.continues:
            yield _Example(ids, labels)
            labels = []

        # The prompt has no loss, and neither has white space after the end of the message.
        labels += [IGNORED] * (len(turn.prompt_ids) - len(labels))
        labels += turn.ids[: turn.trained] + [IGNORED] * (len(turn.ids) - turn.trained)
        ids = turn.prompt_ids + turn.ids
    yield _Example(ids, labels)


def _windows(ids: list[int], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Cut ids into windows of at most `length` tokens, each beginning with the leading ids of a text."""
    lead = lead_of(tokenizer).ids
    step = length - len(lead)
    return (lead + ids[start : start + step] for start in range(0, len(ids), step))
