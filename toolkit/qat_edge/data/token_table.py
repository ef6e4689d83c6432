"""Tokenized rows in an Arrow file that is memory-mapped, so that memory does not grow with the size of the data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

WRITER_ROWS = 1000  # rows in memory until they are written
PREFIX = "qat-edge-rows-"
IGNORED = -100  # label of a token without loss, the default of torch's cross_entropy

TokenRow = dict[str, Any]  # "input_ids" and "labels", lists; see `tokenization` and `training_examples`


class TokenTable(Sequence[TokenRow]):
    """Rows of lists of numbers, read from disk when they are needed.

    The file is in TMPDIR. It is removed with the table, and where the system permits it (not on Windows) as soon as it
    is mapped, so that a killed process leaves nothing behind.

    Attributes:
        sha256: Identity of all rows: the same text under another tokenizer is other data.
        lengths: Number of "input_ids" of each row.
    """

    def __init__(self, rows: Iterable[TokenRow]) -> None:
        """Write `rows`, all with the same keys and types, one after another.

        Raises:
            OSError: No space in TMPDIR.
        """
        import datasets  # takes seconds to import
        from datasets.arrow_writer import ArrowWriter

        # Hashed on the way: reading everything back would take time, and the mapped pages count as memory in use.
        digest = hashlib.sha256()
        self._hashes = array("Q")  # 8 bytes a row, for `shared_rows`
        self.lengths = array("I")
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        # In a list that is emptied first: Windows removes no file that is mapped.
        self._mapped: list[Any] = []
        self._remove = weakref.finalize(self, _remove_rows, folder, self._mapped)
        path = folder / "rows.arrow"
        count = 0
        with ArrowWriter(path=str(path), writer_batch_size=WRITER_ROWS) as writer:
            for row in rows:
                writer.write(row)
                line = json.dumps([list(values) for values in row.values()]).encode()
                digest.update(line)
                self._hashes.append(int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big"))
                self.lengths.append(len(row["input_ids"]))
                count += 1
            if count:
                writer.finalize()

        self.sha256 = digest.hexdigest()

        # An empty file has no columns, and could not be mapped.
        self._mapped.append(datasets.Dataset.from_file(str(path)) if count else [])
        if os.name == "posix":
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _rows(self) -> Any:
        return self._mapped[0]

    def shared_rows(self, other: TokenTable) -> int:
        """Return the number of rows that `other` has too."""
        return int(np.isin(np.array(self._hashes), np.array(other._hashes)).sum())

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row: TokenRow = self._rows[index]
        return row

    def __iter__(self) -> Iterator[TokenRow]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # compared by value


def _remove_rows(folder: Path, mapped: list[Any]) -> None:
    """Unmap the file of a table, then remove its folder."""
    mapped.clear()
    shutil.rmtree(folder, ignore_errors=True)
