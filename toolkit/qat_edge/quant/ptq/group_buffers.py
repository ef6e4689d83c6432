"""Memory of one group of columns, for loops that change columns one after another.

A step of such a loop is a handful of calls on `out` numbers each, which take about as long as making the views that
they work on. So the views are made once a matrix, and each group is copied into them. No step reads a number back or
branches on one: on a GPU, the host never waits.

A code times its bfloat16 scale is exact in float32, so that `addcmul` of the two rounds once, fused or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class GroupColumn(NamedTuple):
    """Views of one column of the group in `GroupBuffers`.

    Attributes:
        values: Shape (out,).
        changes: Shape (out,).
        codes: Shape (out,).
        diagonal: Its element of the diagonal of `matrix`, shape ().
        change_row: `changes` as a matrix, (1, out).
        couplings: What is below the diagonal in its column of `matrix`, (later columns, 1).
        later: Values of the later columns, (later columns, out).
    """

    values: Tensor
    changes: Tensor
    codes: Tensor
    diagonal: Tensor
    change_row: Tensor
    couplings: Tensor
    later: Tensor

    def spread(self, sign: int) -> None:
        """Add the change times `sign` to the values of all later columns, each by its coupling."""
        # As a product of matrices, it has no temporary, and rounds as an outer product that is added does.
        self.later.addmm_(self.couplings, self.change_row, alpha=sign)


class GroupBuffers:
    """Buffers of one group, transposed so that the weights of a column are contiguous.

    Attributes:
        matrix: The group's part of a matrix over columns, (group, group); below the diagonal, column j has what a
            change of column j does to the later ones.
        values: Kept up to date from column to column, (group, out).
        changes: Of each column, (group, out).
        codes: Of each column, (group, out).
    """

    def __init__(self, transposed: Tensor, group_size: int) -> None:
        """Allocate buffers for the groups of a matrix of shape (in, out)."""
        out = transposed.shape[1]
        self.matrix = transposed.new_empty(group_size, group_size)
        self.values, self.changes, self.codes = (transposed.new_empty(group_size, out) for _ in range(3))
        self._columns = [self._column(j) for j in range(group_size)]

    def _column(self, j: int) -> GroupColumn:
        row = self.changes[j : j + 1]
        below = self.matrix[j + 1 :, j : j + 1]
        return GroupColumn(self.values[j], row[0], self.codes[j], self.matrix[j, j], row, below, self.values[j + 1 :])

    def __iter__(self) -> Iterator[GroupColumn]:
        return iter(self._columns)
