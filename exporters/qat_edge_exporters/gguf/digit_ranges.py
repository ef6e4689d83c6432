"""Integers between two bounds as parts of a GBNF rule: digit by digit, from the first in which both differ.

3 to 15     [3-9] | "1" [0-5]
-2 to 1     "-" [1-2] | [0-1]
"""

from __future__ import annotations


def integers_between(lowest: int, highest: int) -> list[str]:
    """Return alternatives for the integers from `lowest` to `highest`, without leading zeros and "-0"."""
    parts = []
    if lowest < 0:
        parts += [f'"-" {part}' for part in _naturals(max(1, -highest), -lowest)]
    if highest >= 0:
        parts += _naturals(max(0, lowest), highest)
    return parts


def _naturals(lowest: int, highest: int) -> list[str]:
    """Return alternatives for natural numbers, those of each number of digits in turn."""
    parts = []
    for length in range(len(str(lowest)), len(str(highest)) + 1):
        least = max(lowest, 10 ** (length - 1) if length > 1 else 0)
        parts += _of_length(str(least), str(min(highest, 10**length - 1)))
    return parts


def _of_length(low: str, high: str) -> list[str]:
    """Return alternatives for the numbers between two that have the same number of digits."""
    if low == high:
        return [f'"{low}"']
    if low[0] == high[0]:
        return [f'"{low[0]}" {part}' for part in _of_length(low[1:], high[1:])]

    # The first digit differs: the lowest one with a part of the rest, those between with all of it, the highest one.
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    parts = []
    if rest and low[1:] != "0" * rest:
        parts += [f'"{first}" {part}' for part in _of_length(low[1:], "9" * rest)]
        first += 1
    above: list[str] = []
    if rest and high[1:] != "9" * rest:
        above = [f'"{last}" {part}' for part in _of_length("0" * rest, high[1:])]
        last -= 1
    if first <= last:
        digit = f"[{first}-{last}]" if first < last else f'"{first}"'
        parts.append(f"{digit} [0-9]{{{rest}}}" if rest else digit)
    return parts + above
