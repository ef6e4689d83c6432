"""Tokenized rows on disk: the same rows as a list, in memory that does not grow with them."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qat_edge.data import token_table
from qat_edge.data.token_table import WRITER_ROWS, TokenRow, TokenTable


def rows(count: int) -> Iterator[TokenRow]:
    for i in range(count):
        ids = [(i + k) % 997 for k in range(1 + i % 50)]
        yield {"input_ids": ids, "labels": [-100, *ids[1:]]}


def test_the_table_holds_the_same_rows_as_a_list() -> None:
    expected = list(rows(2 * WRITER_ROWS + 7))
    table = TokenTable(rows(2 * WRITER_ROWS + 7))

    assert len(table) == len(expected)
    assert list(table) == expected
    assert table[3] == expected[3] and table[-1] == expected[-1]
    assert table[5:9] == expected[5:9] and table[:0] == []
    assert table == expected and table != expected[:-1]
    with pytest.raises(IndexError):
        table[len(expected)]


def test_random_samples_are_the_same_as_of_a_list() -> None:
    expected = list(rows(100))
    table = TokenTable(rows(100))
    positions = random.Random(3).sample(range(len(table)), len(table))
    assert [table[i] for i in positions] == random.Random(3).sample(expected, len(expected))


def test_labels_may_be_fractions_and_a_table_may_be_empty() -> None:
    table = TokenTable([{"input_ids": [1, 2], "labels": [0.25], "other_ids": [3]}])
    assert table[0] == {"input_ids": [1, 2], "labels": [0.25], "other_ids": [3]}
    assert len(TokenTable([])) == 0


def test_the_identity_is_that_of_the_rows_as_they_are_read() -> None:
    table = TokenTable(rows(WRITER_ROWS + 7))
    text = "".join(json.dumps([list(values) for values in row.values()]) for row in table)
    assert table.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_rows_that_another_table_has_too_are_counted() -> None:
    trained = list(rows(20))
    table = TokenTable(trained)
    assert TokenTable(trained[15:] + trained[15:16]).shared_rows(table) == 6
    assert TokenTable({**row, "labels": row["input_ids"]} for row in trained).shared_rows(table) == 0
    assert TokenTable([]).shared_rows(table) == 0


def test_memory_does_not_grow_with_the_rows() -> None:
    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        table = TokenTable(rows(count))
        sum(len(row["input_ids"]) for row in table)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(10)  # imports
    assert peak(8 * WRITER_ROWS) < 1.5 * peak(2 * WRITER_ROWS)


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot remove a file that is mapped")
def test_nothing_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = TokenTable(rows(10))
    assert list(tmp_path.iterdir()) == []
    assert len(list(table)) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_where_a_mapped_file_cannot_be_removed_it_goes_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(token_table, "os", SimpleNamespace(name="nt"))
    removed, is_mapped = [], lambda: "rows.arrow" in Path("/proc/self/maps").read_text(encoding="utf-8")

    def remove(folder: Path, ignore_errors: bool) -> None:
        removed.append((folder.parent, is_mapped()))

    monkeypatch.setattr(shutil, "rmtree", remove)
    table = TokenTable(rows(10))
    assert len(list(table)) == 10 and is_mapped() and removed == []
    del table
    gc.collect()
    assert removed == [(tmp_path, False)]
