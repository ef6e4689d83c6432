"""Rows to training examples of each kind of model: next tokens, labels of texts, pairs of texts.

What a model that generates text learns is in `data`. A classifier learns the label of a text; a sentence encoder the
cosine of two texts, or, of pairs without a score, which of a batch's texts belongs to which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat_edge.data import tokenization
from qat_edge.data.formats import Pair, Row, Text
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import DataError
from qat_edge.models import tasks
from qat_edge.models.tasks import Kind, SentenceEncoder, SequenceClassifier

MULTIPLE = 8  # of tokens, which batches are padded to
Collate = Callable[[Sequence[dict[str, list[int]]]], dict[str, Tensor]]


@dataclass(frozen=True)
class EncodedRows(TokenizedRows):
    """Rows {"input_ids", "labels"}, those of pairs with "other_ids"; `trained_tokens` counts rows.

    labels: one number a row, of a label or the score of a pair. what: of the rows, for people.
    """

    what: str = ""

    def summary(self) -> str:
        cut = f"; {self.truncated} rows cut, {self.cut_tokens} tokens lost" if self.truncated else ""
        return f"{len(self.rows)} rows, {self.tokens} tokens, {self.what}{cut}"


def kind_for(config: Any, rows: Sequence[Row], source: str) -> Kind:
    """What an encoder of this configuration is trained for by these rows; source: where they are from.

    A model that has a head over labels keeps it; any other encoder gets one for the labels that are found.

    Raises:
        DataError: rows that no encoder learns from, or with one label only.
    """
    if isinstance(rows[0], Pair):
        return SentenceEncoder(scored=rows[0].score is not None)
    found = sorted({_label(row) for row in rows}, key=lambda label: (label.isdecimal() and int(label), label))
    pairs = any(isinstance(row, Text) and row.pair is not None for row in rows)
    if tasks.of_config(config) == SequenceClassifier():
        return SequenceClassifier(tuple(str(config.id2label[i]) for i in range(config.num_labels)), pairs)
    if len(found) < 2:
        raise DataError(f"{source}: every row has the label {found[0]!r}, so there is nothing to tell apart.")
    return SequenceClassifier(tuple(found), pairs)


def tokenize(kind: Kind, rows: Sequence[Row], model: Any, tokenizer: Any, max_length: int) -> TokenizedRows:
    """Rows as training examples of at most `max_length` tokens, and of no more than the model has positions for.

    Raises:
        DataError: rows that this kind of model cannot learn from, or with a label that it does not have.
    """
    if not kind.encodes:
        return tokenization.tokenize(rows, tokenizer, max_length)
    length = min(max_length, tasks.longest_text(model, tokenizer)) // MULTIPLE * MULTIPLE
    done: list[dict[str, Any]] = []
    cut: list[int] = []
    for row in rows:
        texts, label = _pair(row, kind) if isinstance(kind, SentenceEncoder) else _labelled(row, kind)
        whole = [tokenizer(*text).input_ids for text in texts]
        ids = [_cut(text, found, tokenizer, length) for text, found in zip(texts, whole, strict=True)]
        if len(texts[0]) > 1 and getattr(model.config, "type_vocab_size", 1) > 1:
            _check_types(row, tokenizer(*texts[0], truncation=True, max_length=length, return_token_type_ids=True))
        cut.append(sum(map(len, whole)) - sum(map(len, ids)))
        done.append({"input_ids": ids[0], "labels": [label], **({"other_ids": ids[1]} if len(ids) > 1 else {})})
    tokens = sum(len(row["input_ids"]) + len(row.get("other_ids", ())) for row in done)
    return EncodedRows(done, sum(map(bool, cut)), sum(cut), 0, tokens, len(done), _describe(kind, done))


def collator(kind: Kind, tokenizer: Any) -> Collate:
    """Makes a batch of rows. An encoder's has "labels" (rows,); that of pairs all first texts, then all second ones."""
    pad = tokenization.Collator(tokenizer, MULTIPLE)

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        others = [{"input_ids": row["other_ids"], "labels": row["labels"]} for row in rows if "other_ids" in row]
        return pad([*rows, *others]) | {"labels": torch.tensor([row["labels"][0] for row in rows])}

    return collate if kind.encodes else pad


def _check_types(row: Row, encoded: Any) -> None:
    """Refuse a pair whose types the model would not find as its tokenizer gives them.

    Raises:
        DataError: names the row.
    """
    ids = torch.tensor([encoded.input_ids])
    if tasks.token_types(ids, torch.ones_like(ids)).tolist() != [list(encoded.token_type_ids)]:
        raise DataError(
            f"{row.where}: the tokenizer begins the second text elsewhere than after the first separator, where the "
            "model will see it begin. Take separators such as [SEP] out of the texts, or another model."
        )


def _cut(text: tuple[str, ...], ids: list[int], tokenizer: Any, length: int) -> list[int]:
    """At most `length` tokens of a text, or of two as one, with the special ones at its end."""
    return ids if len(ids) <= length else list(tokenizer(*text, truncation=True, max_length=length).input_ids)


def _label(row: Row) -> str:
    """The label of a text.

    Raises:
        DataError: the row is no text, or has no label.
    """
    if isinstance(row, Text) and isinstance(row.label, str | int) and not isinstance(row.label, bool):
        return str(row.label)
    if isinstance(row, Text) and row.label is not None:
        raise DataError(f"{row.where}: 'label' must be a word or a whole number, found {row.label!r}.")
    raise DataError(
        f"{row.where}: an encoder learns from rows of 'text' and 'label', or from pairs of texts ('text_a', 'text_b' "
        "and 'score', or 'anchor' and 'positive'), all of one shape. Change the rows, or take a model that generates."
    )


def _labelled(row: Row, kind: Kind) -> tuple[list[tuple[str, ...]], int]:
    """The text, or both, and its label's place among those of the classifier."""
    label, text = _label(row), _text(row)
    known, pairs = (kind.labels, kind.pairs) if isinstance(kind, SequenceClassifier) else ((), False)
    if len(text) > 1 and not pairs:
        raise DataError(
            f"{row.where}: two texts, and the classifier learned single ones. Leave 'text_pair' out, or train on pairs."
        )
    if label in known:
        return [text], known.index(label)
    if label.isdecimal() and int(label) < len(known):
        return [text], int(label)
    raise DataError(
        f"{row.where}: the label {label!r} is none of the model's ({', '.join(known[:20])}). Correct the row, or "
        "take a model without a head over labels, which gets one for those in --data."
    )


def _text(row: Row) -> tuple[str, ...]:
    texts = (row.text, row.pair) if isinstance(row, Text) else ()
    return tuple(text for text in texts if text is not None)


def _pair(row: Row, kind: SentenceEncoder) -> tuple[list[tuple[str, ...]], float]:
    """Both texts and the cosine they are to have; of an anchor and what belongs to it, 1."""
    if not isinstance(row, Pair) or (row.score is not None) != kind.scored:
        shape = "'text_a', 'text_b' and 'score'" if kind.scored else "'anchor' and 'positive'"
        raise DataError(f"{row.where}: not a row of {shape}, as the first one is. Give rows of one shape.")
    return [(row.text_a,), (row.text_b,)], 1.0 if row.score is None else row.score


def _describe(kind: Kind, rows: Sequence[dict[str, Any]]) -> str:
    numbers = [row["labels"][0] for row in rows]
    if kind == SentenceEncoder(scored=False):
        return "pairs of texts that belong together"
    if isinstance(kind, SequenceClassifier):
        return ", ".join(f"{kind.labels[i]} {count}" for i, count in sorted(Counter(numbers).items()))
    return f"pairs with scores of {min(numbers):g} to {max(numbers):g}"
