"""Codes that a weight can have: whole numbers with one distance between neighbors, times a scale.

    8, 4 bits       every signed integer of that width
    2 bits, integer -2 -1 0 1
    2 bits, seq     -3 -1 1 3 under half the step: -1.5 -0.5 0.5 1.5 times the step, which ParetoQ [1] calls SEQ

Levels of SEQ are stored as odd codes, so that `codes * scales` gives the weight in every case and in every reader.

[1] https://arxiv.org/abs/2502.02631
"""

from __future__ import annotations

from dataclasses import dataclass

SEQ, INTEGER = "seq", "integer"
LEVELS = (SEQ, INTEGER)  # of 2-bit weights; other widths are always integer
PER_CHANNEL = 8  # bits of weights that have one scale a row; fewer bits have groups
FEWEST = 2  # bits that have a choice of levels
SEQ_TYPE_BITS = 3  # of torchao's type for 2-bit weights with levels "seq"; nothing else has that type


@dataclass(frozen=True)
class Codebook:
    """The codes of one width.

    Attributes:
        bits: Of a stored code.
        low: Least code.
        high: Greatest code.
        step: Distance between neighboring codes.
    """

    bits: int
    low: int
    high: int
    step: int = 1

    @property
    def searches_scales(self) -> bool:
        """True if scales of least error are much better than those of the largest weights."""
        return self.bits == FEWEST


def codebook_of(bits: int, levels: str = INTEGER) -> Codebook:
    """Return the codes of a width; `levels` is one of LEVELS and matters at 2 bits alone."""
    if bits == FEWEST and levels == SEQ:
        return Codebook(bits, -3, 3, 2)
    return Codebook(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
