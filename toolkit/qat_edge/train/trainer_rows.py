"""Rows that a trainer of transformers or TRL has tokenized: calibration data, and a file of text for later commands.

    input_ids, labels       SFTTrainer, and most data sets of the plain Trainer
    prompt_ids, chosen_ids  DPOTrainer: a prompt with its chosen completion

Rows that were packed are separated again (`seq_lengths`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qat_edge.data.calibration import DEFAULT_CALIBRATION_TOKENS
from qat_edge.data.token_table import IGNORED, TokenRow, TokenTable
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import DataError
from qat_edge.storage import write_text


def read_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, tokens: int | None, longest: int | None, seed: int
) -> TokenizedRows:
    """Choose rows of a trainer's data set, at random where it has a length, until they have enough tokens.

    Args:
        dataset: As the trainer's batches are made of it.
        tokenizer: The model's tokenizer.
        tokens: Tokens to calibrate on; None for the default.
        longest: Tokens that the trainer cuts rows at; None where it cuts none.
        seed: Of the choice.

    Raises:
        DataError: The rows have no token ids, or no row has two tokens.
    """
    wanted, found = tokens or DEFAULT_CALIBRATION_TOKENS, 0
    rows: list[TokenRow] = []
    for example in _in_random_order(dataset, seed):
        for row in _token_rows(example):
            cut = {key: values[:longest] for key, values in row.items()}
            if len(cut["input_ids"]) > 1:
                rows.append(cut)
                found += len(cut["input_ids"])
        if found >= wanted:
            break
    if not rows:
        raise DataError("The trainer's data set has no row of two tokens or more, so there is nothing to calibrate on.")
    trained = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    return TokenizedRows(
        TokenTable(rows), 0, 0, 0, found, trained, end_of_turn=tuple(sorted({*_ends(rows, tokenizer)}))
    )


def write_rows(rows: Iterable[TokenRow], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write rows as running text, special tokens included, in the form that `data` of finetune has."""
    texts = (tokenizer.decode(row["input_ids"], skip_special_tokens=False) for row in rows)
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def _in_random_order(dataset: Any, seed: int) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a data set; one without a length is read from its beginning."""
    if not hasattr(dataset, "__len__"):
        yield from dataset
        return
    for index in random.Random(seed).sample(range(len(dataset)), len(dataset)):
        yield dataset[index]


def _token_rows(example: Mapping[str, Any]) -> Iterator[TokenRow]:
    """Yield "input_ids" and "labels" of a row, or of every row that is packed into it.

    Raises:
        DataError: It has no token ids.
    """
    if "input_ids" in example:
        ids = _numbers(example["input_ids"])
        labels = _numbers(example["labels"]) if example.get("labels") is not None else ids
    elif "prompt_ids" in example and "chosen_ids" in example:
        prompt, chosen = _numbers(example["prompt_ids"]), _numbers(example["chosen_ids"])
        ids, labels = prompt + chosen, [IGNORED] * len(prompt) + chosen
    else:
        raise DataError(
            f"The trainer's rows have the columns {', '.join(sorted(example))}, and no token ids to calibrate on. Name "
            "rows in a file: prepare(..., data=FILE)."
        )
    begin = 0
    for length in _numbers(example.get("seq_lengths") or [len(ids)]):
        yield {"input_ids": ids[begin : begin + length], "labels": labels[begin : begin + length]}
        begin += length


def _numbers(values: Any) -> list[int]:
    return [int(value) for value in torch.as_tensor(values).reshape(-1).tolist()]


def _ends(rows: Sequence[TokenRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Yield the special tokens that end an answer, as `finetune` records them; white space may follow them."""
    special = {*tokenizer.all_special_ids}
    for row in rows:
        trained = [label for label in row["labels"] if label != IGNORED]
        while trained and trained[-1] not in special and not tokenizer.decode(trained[-1:]).strip():
            trained.pop()
        if trained and trained[-1] in special:
            yield trained[-1]
