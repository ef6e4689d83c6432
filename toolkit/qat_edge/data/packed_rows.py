"""Several training rows in one sequence, so that a batch has less padding. No token attends to another row.

The positions of each row begin at 0, which is where transformers finds the borders: it gives attention a mask by rows
if a batch has such positions and no mask of padding. The first token of a row has no loss, as it has none in a
sequence of its own: nothing before it predicts it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import overload

import numpy as np
from numpy.typing import NDArray

from qat_edge.data.token_table import IGNORED, TokenRow, TokenTable

POSITIONS = "position_ids"  # key of a packed sequence, next to "input_ids" and "labels"


class PackedRows(Sequence[TokenRow]):
    """The sequences that rows are packed into.

    Attributes:
        rows: The rows, as they are without packing.
        packs: Indices of the rows of each sequence.
        lengths: Tokens of each sequence.
    """

    def __init__(self, rows: TokenTable, capacity: int) -> None:
        """Choose the rows of each sequence. capacity: tokens of a sequence; no row has more."""
        self.rows = rows
        self.packs = choose_packs(rows.lengths, capacity)
        sizes = np.asarray(rows.lengths)
        self.lengths = [int(sizes[pack].sum()) for pack in self.packs]

    def __len__(self) -> int:
        return len(self.packs)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return join_rows(self.rows[int(row)] for row in self.packs[index])

    def describe(self, batch_size: int) -> str:
        """Return a sentence without a stop about the sequences, and the padding that they save."""
        before, after = (padding_share(lengths, batch_size) for lengths in (self.rows.lengths, self.lengths))
        return (
            f"{len(self.rows)} rows packed into {len(self)} sequences; padding is about {after:.0%} of a batch, "
            f"{before:.0%} without --packing"
        )


def join_rows(rows: Iterable[TokenRow]) -> TokenRow:
    """Return one sequence of several rows, with positions that begin anew in each of them."""
    rows = list(rows)
    return {
        "input_ids": list(chain.from_iterable(row["input_ids"] for row in rows)),
        "labels": list(chain.from_iterable([IGNORED, *row["labels"][1:]] for row in rows)),
        POSITIONS: list(chain.from_iterable(range(len(row["input_ids"])) for row in rows)),
    }


def choose_packs(lengths: Sequence[int], capacity: int) -> list[NDArray[np.intp]]:
    """Return the indices of the rows of each sequence, chosen by best-fit decreasing.

    The rows are taken from the longest to the shortest. Each one goes where the least room is left after it; none of
    the sequences that are begun may have room for it, and then it begins another.

    Args:
        lengths: Tokens of each row, at most `capacity`.
        capacity: Tokens of a sequence.
    """
    sizes = np.asarray(lengths)
    pack_of_row = np.empty(len(sizes), np.int64)
    packs_by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of `packs_by_room` that have packs, in order
    count = 0
    for row in np.argsort(-sizes, kind="stable"):
        size = int(sizes[row])
        best = bisect_left(rooms, size)
        if best == len(rooms):
            pack, room, count = count, capacity, count + 1
        else:
            room = rooms[best]
            pack = packs_by_room[room].pop()
            if not packs_by_room[room]:
                del rooms[best]

        pack_of_row[row] = pack
        left = room - size
        if not packs_by_room[left]:
            insort(rooms, left)
        packs_by_room[left].append(pack)

    # In arrays, not in lists: there may be millions of rows.
    order = np.argsort(pack_of_row, kind="stable")
    return np.split(order, np.cumsum(np.bincount(pack_of_row))[:-1])


def padding_share(lengths: Sequence[int], batch_size: int, multiple_of: int = 8) -> float:
    """Return the expected share of padding in batches of sequences drawn at random, each as long as its longest.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Sequences of a batch.
        multiple_of: The length of a batch is a multiple of this.
    """
    # The longest of n draws is at most the i-th of N lengths with a probability of (i / N)^n.
    padded = -(-np.sort(np.asarray(lengths)) // multiple_of) * multiple_of
    at_most = (np.arange(len(padded) + 1) / len(padded)) ** batch_size
    return float(1 - np.mean(lengths) / (padded * np.diff(at_most)).sum())
