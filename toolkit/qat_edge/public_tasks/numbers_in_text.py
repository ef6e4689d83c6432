"""The number that an answer ends with."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MARK = "####"  # before the answer, in the solutions of GSM8K
MAX_DIGITS = 100  # longer runs of digits are no answer to these problems


def answer_number(text: str) -> Decimal | None:
    """Return the first number after "####", or the last one of a text without it; None where there is none."""
    before, mark, after = text.partition(MARK)
    found = NUMBER.findall(after)[:1] if mark else NUMBER.findall(before)[-1:]
    return _as_decimal(found[0]) if found else None


def equals_number(answer: str, expected: str) -> bool:
    """Return whether an answer's number is the expected one."""
    return answer_number(answer) == _as_decimal(expected)


def _as_decimal(digits: str) -> Decimal | None:
    return Decimal(digits.replace(",", "")) if len(digits) <= MAX_DIGITS else None
