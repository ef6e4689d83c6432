"""Turn rows into training examples for every task: next tokens, labels of texts, pairs of texts.

For a model that generates text, `tokenization` does the work. A classifier is trained on the label of a text; a
sentence encoder on the cosine of two texts or, for pairs without a score, on which texts of a batch belong together.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qat_edge import progress
from qat_edge.data import tokenization
from qat_edge.data.class_labels import listed
from qat_edge.data.rows import NamedLabel, Pair, Row, Text
from qat_edge.data.token_table import TokenRow, TokenTable
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import DataError, ModelError
from qat_edge.models.tasks import (
    ModelTask,
    SentenceEncoder,
    SequenceClassifier,
    max_text_tokens,
    task_of_config,
    token_types,
)
from qat_edge.models.tokenizer import end_token_origins
from qat_edge.models.tokenizer_check import encoding_errors
from qat_edge.readers import counted

MULTIPLE = 8  # of tokens, to which batches are padded
Collate = Callable[[Sequence[dict[str, list[int]]]], dict[str, Tensor]]


@dataclass(frozen=True)
class EncoderRows(TokenizedRows):
    """Training rows of an encoder: "input_ids", "labels" with one number, and "other_ids" for the second of a pair.

    `trained_tokens` counts rows: each has one label or score.

    Attributes:
        description: Labels or scores of the rows, for messages.
    """

    description: str = ""

    def summary(self) -> str:
        """Return the counts as one line of a message."""
        cut = (
            f"; {counted(self.truncated, 'row')} truncated, {counted(self.cut_tokens, 'token')} lost"
            if self.truncated
            else ""
        )
        return f"{counted(len(self.rows), 'row')}, {self.tokens} tokens, {self.description}{cut}"


@dataclass
class _EncoderCounts:
    """Numbers of `EncoderRows`, counted while examples are written.

    Attributes:
        truncated: Number of rows that were cut.
        cut: Number of tokens removed from them.
        tokens: Number of tokens left.
        labels: Number of rows by label index, or by score rounded to two places.
        empty: Number of rows with an empty text.
        numbered: Number of rows whose label was taken as the index of one of the model's.
        lowest: Least score.
        highest: Greatest score.
    """

    truncated: int = 0
    cut: int = 0
    tokens: int = 0
    labels: Counter[float] = field(default_factory=Counter)
    empty: int = 0
    numbered: int = 0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, before: int, after: int, label: float) -> None:
        """Count a row. before, after: its tokens before and after truncation."""
        self.truncated += after < before
        self.cut += before - after
        self.tokens += after
        self.labels[round(label, 2)] += 1
        self.lowest, self.highest = min(self.lowest, label), max(self.highest, label)

    def notes(self, task: ModelTask) -> tuple[str, ...]:
        """Return sentences about choices that were made for rows."""
        notes = []
        # An encoder may be given an empty text, so they are trained on.
        if self.empty:
            notes.append(f"{counted(self.empty, 'row')} with an empty text, trained on like any other")
        if self.numbered and isinstance(task, SequenceClassifier):
            order = listed([f"{i} {name}" for i, name in enumerate(task.labels)])
            notes.append(
                f"{counted(self.numbered, 'label is a number', 'labels are numbers')}, taken in the order of the "
                f"model's labels: {order}"
            )
        if isinstance(task, SequenceClassifier):
            notes += [
                f"the labels {listed(list(map(repr, names)))} differ in capitals or spaces alone"
                for names in _alike(task.labels)
            ]
        return tuple(notes)

    def describe(self, task: ModelTask) -> str:
        """Summarize labels or scores for a message."""
        if task == SentenceEncoder(scored=False):
            return "pairs of texts that belong together"
        if isinstance(task, SequenceClassifier):
            return ", ".join(f"{task.labels[int(i)]} {count}" for i, count in sorted(self.labels.items()))
        return f"pairs with scores of {self.lowest:g} to {self.highest:g}"


class _EncoderInput(NamedTuple):
    """The texts of a row as separate inputs, each of one text or two, and the label index or score.

    numbered: The label was a number in the row, not a name.
    """

    inputs: list[tuple[str, ...]]
    label: float
    numbered: bool = False


def task_for_rows(config: PretrainedConfig, rows: Iterable[Row], source: str) -> ModelTask:
    """Find the task that an encoder is trained for by these rows.

    A model that has a classification head keeps its labels; any other encoder gets a head for the labels in the rows.
    If a data set names its labels, they keep its order; a head whose labels have no names gets these names.

    Args:
        config: The encoder's configuration.
        rows: Training rows.
        source: Where the rows come from, for messages.

    Raises:
        DataError: An encoder cannot be trained on such rows, or they all have the same label.
        ModelError: The model's labels are not numbered from 0 on.
    """
    # Pairs: the first row decides, and `tokenize_for_task` refuses rows of another shape.
    first = next(iter(rows))
    if isinstance(first, Pair):
        return SentenceEncoder(scored=first.score is not None)

    # Words in alphabetic order, whole numbers in numeric order: the position decides the index of each label.
    found: set[str] = set()
    named: set[tuple[str, ...]] = set()
    pairs = False
    for row in rows:
        found.add(_label(row))
        named.add(_data_set_names(row))
        pairs = pairs or (isinstance(row, Text) and row.pair is not None)
    labels = sorted(found, key=lambda label: (label.isdecimal() and int(label), label))
    # Labels that the data set names keep its order, so that its numbers are the model's too.
    names = next(iter(named)) if len(named) == 1 else ()
    if task_of_config(config) == SequenceClassifier():
        missing = [i for i in range(config.num_labels) if i not in config.id2label]
        if missing:
            raise ModelError(
                f"config.json of the model: 'id2label' has {config.num_labels} labels and none with the number "
                f"{missing[0]}. Number them from 0 on without gaps."
            )
        own = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        if names and names != own and _are_unnamed(own) and len(names) == len(own):
            numbered = listed([f"{i} {name}" for i, name in enumerate(names)])
            progress.info(f"{source}: the model's labels have no names, and get those of the data set: {numbered}")
            own = names
        return SequenceClassifier(own, pairs)
    if len(labels) < 2:
        raise DataError(f"{source}: every row has the label {labels[0]!r}, so there is nothing to classify.")
    return SequenceClassifier(names or tuple(labels), pairs)


def tokenize_for_task(
    task: ModelTask,
    rows: Iterable[Row],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    join_texts: bool = True,
    may_be_empty: bool = False,
) -> TokenizedRows:
    """Tokenize rows into training examples of at most `max_length` tokens and at most the model's positions.

    join_texts, may_be_empty: See `tokenization.tokenize`.

    Raises:
        DataError: The task cannot be trained on such rows, or the model does not have a row's label.
    """
    # Text generation has windows and loss masks of its own.
    if not task.is_encoder:
        ends = end_token_origins(model, tokenizer)
        return tokenization.tokenize(rows, tokenizer, max_length, ends, join_texts, may_be_empty)

    length = min(max_length, max_text_tokens(model, tokenizer)) // MULTIPLE * MULTIPLE
    has_token_types = getattr(model.config, "type_vocab_size", 1) > 1
    counts = _EncoderCounts()

    def examples() -> Iterator[TokenRow]:
        for row in rows:
            yield _encoder_example(row, task, tokenizer, length, has_token_types, counts)

    # One pass: neither rows nor examples are kept in memory.
    done = TokenTable(examples())
    return EncoderRows(
        done, counts.truncated, counts.cut, 0, counts.tokens, len(done), counts.notes(task),
        description=counts.describe(task),
    )  # fmt: skip


def _encoder_example(
    row: Row,
    task: ModelTask,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    has_token_types: bool,
    counts: _EncoderCounts,
) -> TokenRow:
    """Tokenize one row to at most `length` tokens for each input, and count it."""
    found = _pair_input(row, task) if isinstance(task, SentenceEncoder) else _labelled_input(row, task)
    inputs, label = found.inputs, found.label
    # Both lengths are needed: truncated rows are counted and reported.
    whole = [_encode(texts, tokenizer) for texts in inputs]
    ids = [_truncate(texts, one, tokenizer, length) for texts, one in zip(inputs, whole, strict=True)]
    if not all(ids):
        raise DataError(
            f"{row.where}: a text is empty, and the tokenizer has no token for it, so the encoder would have no input. "
            "Fill it in, or remove the row."
        )

    # The model computes token types itself, so they have to agree with the tokenizer's.
    if len(inputs[0]) > 1 and has_token_types:
        encoded = tokenizer(*inputs[0], truncation=True, max_length=length, return_token_type_ids=True)
        _check_token_types(row, encoded)

    counts.add(sum(map(len, whole)), sum(map(len, ids)), label)
    counts.numbered += found.numbered
    counts.empty += any(not text.strip() for texts in inputs for text in texts)
    example: TokenRow = {"input_ids": ids[0], "labels": [label]}
    if len(ids) > 1:
        example["other_ids"] = ids[1]
    return example


def _encode(texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    with encoding_errors(" ".join(texts)):
        return list(tokenizer(*texts).input_ids)


def make_collator(task: ModelTask, tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Return the function that makes a batch of rows.

    The batch of an encoder has "labels" of shape (rows,). A batch of pairs has all first texts, then all second texts.
    """
    pad = tokenization.Collator(tokenizer, MULTIPLE)
    if not task.is_encoder:
        return pad

    # Second texts follow the first ones in the same batch, so that one forward pass embeds both.
    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        others = [{"input_ids": row["other_ids"], "labels": row["labels"]} for row in rows if "other_ids" in row]
        return pad([*rows, *others]) | {"labels": torch.tensor([row["labels"][0] for row in rows])}

    return collate


def _check_token_types(row: Row, encoded: BatchEncoding) -> None:
    """Refuse a pair for which the model would compute other token types than its tokenizer.

    Raises:
        DataError: Names the row.
    """
    ids = torch.tensor([encoded.input_ids])
    if token_types(ids, torch.ones_like(ids)).tolist() != [list(encoded.token_type_ids)]:
        raise DataError(
            f"{row.where}: the tokenizer begins the second text elsewhere than after the first separator, where the "
            "model expects it. Remove separators such as [SEP] from the texts, or use another model."
        )


def _truncate(texts: tuple[str, ...], ids: list[int], tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Shorten an input of one text or two to `length` tokens, special tokens at the end included."""
    # The tokenizer truncates, not a slice: it keeps the special tokens, and shortens the longer of two texts.
    if len(ids) <= length:
        return ids
    return list(tokenizer(*texts, truncation=True, max_length=length).input_ids)


def _label(row: Row) -> str:
    """Return the label of a labelled text.

    Raises:
        DataError: The row is no text, or has no label.
    """
    label = row.label if isinstance(row, Text) else None
    if isinstance(label, NamedLabel):
        label = label.name
    if isinstance(label, str) and not label.strip():
        raise DataError(f"{row.where}: 'label' is empty. Fill it in, or remove the row.")
    # bool is a subclass of int, but true and false are no labels.
    if isinstance(label, str | int) and not isinstance(label, bool):
        return str(label)
    if label is not None:
        raise DataError(f"{row.where}: 'label' must be a word or a whole number, found {label!r}.")
    raise DataError(
        f"{row.where}: an encoder is trained on rows of 'text' and 'label', or on pairs of texts ('text_a', 'text_b' "
        "and 'score', or 'anchor' and 'positive'), all of one shape. A label of null, or of -1 in a data set that "
        "names its labels, is missing. Change the rows, or use a model that generates text."
    )


def _labelled_input(row: Row, task: ModelTask) -> _EncoderInput:
    """Return the text, or both texts, as one input, and the index of the label among the classifier's labels."""
    label = _label(row)
    texts = tuple(text for text in (row.text, row.pair) if text is not None) if isinstance(row, Text) else ()
    known, pairs = (task.labels, task.pairs) if isinstance(task, SequenceClassifier) else ((), False)
    if len(texts) > 1 and not pairs:
        raise DataError(
            f"{row.where}: two texts, but the classifier is trained on single texts. Leave 'text_pair' out, or train "
            "on pairs."
        )

    # The name, in other capitals if that is clear.
    alike = [name for name in known if name.casefold() == label.casefold()]
    if label in known or len(alike) == 1:
        return _EncoderInput([texts], known.index(label if label in known else alike[0]))
    return _EncoderInput([texts], _label_number(row, label, known), numbered=True)


def _label_number(row: Row, label: str, known: Sequence[str]) -> int:
    """Return the index of a label that is none of the model's names.

    Raises:
        DataError: It is no number that means one of the model's labels.
    """
    names = _data_set_names(row)
    # Names of a data set have numbers too; they mean the model's labels only if those have no names at all.
    if names and _are_unnamed(known) and len(names) == len(known):
        return names.index(label)
    if names:
        raise DataError(
            f"{row.where}: the label {label!r} of the data set is none of the model's ({listed(known)}); the data set "
            f"has {listed(names)}. Rename the labels of the data set, or use a model without a classification head, "
            "which gets one for the labels in --data."
        )

    if label.isdecimal() and int(label) < len(known):
        if any(name.isdecimal() for name in known):
            raise DataError(
                f"{row.where}: the label {label} is none of the model's, which are numbers themselves "
                f"({', '.join(known[:20])}), so it is not known which one is meant. Give the labels by those names."
            )
        return int(label)
    raise DataError(
        f"{row.where}: the label {label!r} is none of the model's ({', '.join(known[:20])}). Correct the row, or "
        "use a model without a classification head, which gets one for the labels in --data."
    )


def _data_set_names(row: Row) -> tuple[str, ...]:
    """Return all labels of the data set that a row is from; none where it does not name them."""
    return row.label.names if isinstance(row, Text) and isinstance(row.label, NamedLabel) else ()


def _are_unnamed(labels: Sequence[str]) -> bool:
    """Return whether labels are those that transformers gives to a model without names."""
    return list(labels) == [f"LABEL_{i}" for i in range(len(labels))]


def _alike(labels: Sequence[str]) -> list[list[str]]:
    """Return groups of labels that differ only in capitals, or in spaces around them."""
    groups = defaultdict(list)
    for label in labels:
        groups[label.strip().casefold()].append(label)
    return [names for names in groups.values() if len(names) > 1]


def _pair_input(row: Row, task: SentenceEncoder) -> _EncoderInput:
    """Return both texts as two inputs, and the cosine to train for; it is 1 for a pair that belongs together."""
    if not isinstance(row, Pair) or (row.score is not None) != task.scored:
        shape = "'text_a', 'text_b' and 'score'" if task.scored else "'anchor' and 'positive'"
        raise DataError(f"{row.where}: not a row of {shape}, as the first one is. Give rows of one shape.")
    return _EncoderInput([(row.text_a,), (row.text_b,)], 1.0 if row.score is None else row.score)
