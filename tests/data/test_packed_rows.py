"""Rows packed into sequences: each row once, never more than fit, and less padding."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from conftest import make_tokenizer
from qat_edge.data.packed_rows import PackedRows, choose_packs, join_rows, padding_share
from qat_edge.data.rows import Text
from qat_edge.data.token_table import IGNORED, TokenTable
from qat_edge.data.tokenization import Collator, tokenize


def test_every_row_is_in_one_sequence_that_it_fits_into() -> None:
    generator = random.Random(7)
    lengths = [generator.randint(1, 64) for _ in range(500)]
    packs = choose_packs(lengths, 64)
    assert sorted(row for pack in packs for row in pack.tolist()) == list(range(500))
    assert max(sum(lengths[row] for row in pack) for pack in packs) <= 64
    # No packing has fewer sequences than the tokens fill.
    assert len(packs) <= 1.02 * -(-sum(lengths) // 64)


def test_rows_go_where_the_least_room_is_left() -> None:
    assert [pack.tolist() for pack in choose_packs([3, 5, 6, 2], 8)] == [[2, 3], [0, 1]]
    assert [pack.tolist() for pack in choose_packs([8], 8)] == [[0]]


def test_positions_begin_anew_and_no_row_predicts_the_next() -> None:
    first, second = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [IGNORED, 9]}
    assert join_rows([first, second]) == {
        "input_ids": [5, 6, 7, 8, 9],
        "labels": [IGNORED, 6, 7, IGNORED, 9],
        "position_ids": [0, 1, 2, 0, 1],
    }


def test_padding_of_packed_sequences_is_a_row_of_its_own() -> None:
    packed = [join_rows([{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]) for lengths in ((3, 2), (4, 5))]
    batch = Collator(make_tokenizer())(packed)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, *range(11)], [0, 1, 2, 3, 0, 1, 2, 3, 4, *range(7)]]
    assert torch.all(batch["labels"][0, 5:] == IGNORED)


def test_a_sequence_is_read_from_the_rows_on_disk() -> None:
    rows = TokenTable({"input_ids": [n] * n, "labels": [n] * n} for n in (3, 5, 6, 2))
    packed = PackedRows(rows, 8)
    assert len(packed) == 2 and packed.lengths == [8, 8]
    assert packed[0]["input_ids"] == [6] * 6 + [2] * 2 and packed[:][1] == packed[1]
    assert packed.describe(4) == "4 rows packed into 2 sequences; padding is about 0% of a batch, 50% without --packing"


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_share_of_padding_is_that_of_random_batches(batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 400)
    batches = np.random.default_rng(1).choice(lengths, (20000, batch_size))
    padded = -(-batches.max(1) // 8) * 8 * batch_size
    assert padding_share(lengths.tolist(), batch_size) == pytest.approx(1 - batches.sum() / padded.sum(), abs=5e-3)


def test_texts_that_are_not_joined_begin_examples_of_their_own() -> None:
    tokenizer = make_tokenizer()
    texts = [Text("x" * 9, "row 1"), Text("y" * 4, "row 2")]
    joined = tokenize(texts, tokenizer, 8).rows
    apart = tokenize(texts, tokenizer, 8, join_texts=False).rows
    assert [tokenizer.decode(row["input_ids"]) for row in joined] == ["xxxxxxxx", "x<|im_end|>yyyy<|im_end|>"]
    assert [tokenizer.decode(row["input_ids"]) for row in apart] == ["xxxxxxxx", "x<|im_end|>", "yyyy<|im_end|>"]
