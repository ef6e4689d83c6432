"""Mutations of valid inputs, and the property that every reader has: a correct value or one of our errors, soon."""

from __future__ import annotations

import copy
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from qat_edge.errors import QatEdgeError

LIMIT_S = 10  # of one call
MOST_BYTES = 1_500_000_000  # by which one test may raise the memory of the process
MESSAGE_CHARACTERS = 3000

# Numbers at which fields of sizes and counts overflow, as little-endian bytes.
EDGES = [
    number.to_bytes(width, "little")
    for width in (1, 2, 4, 8)
    for number in (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
]


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes, first: int | None = None) -> bytes:
    """Bytes that differ from `data` in one to four places. first: mutate among so many bytes, such as a header's."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(changed), first or len(changed)) - 1)))
        kind = draw(st.sampled_from(("flip", "edge", "cut", "delete", "insert", "repeat")))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "edge":
            edge = draw(st.sampled_from(EDGES))
            changed[at : at + len(edge)] = edge
        elif kind == "cut":
            del changed[at:]
        elif kind == "delete":
            del changed[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=64))
        else:
            changed[at:at] = changed[at : at + draw(st.integers(1, 64))]
    return bytes(changed)


def deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


# Values that no field expects.
STRANGE = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from((2**31, 2**63, 2**70, -(2**70), 10**90, 10**400)),
    st.sampled_from((0.0, -1.5, 1e308, float("nan"), float("inf"))), st.text(max_size=20),
    st.sampled_from(("\ud800", "a\0b", "../../x", "/etc/passwd", "x" * 5000, "-1", "1e999")),
    st.just([]), st.just({}), st.just([1, "a", None]), st.just({"a": {"b": [1]}}), st.just(deep(150)),
)  # fmt: skip


def strange(draw: st.DrawFn) -> Any:
    """One of them, as a copy: a later mutation may change it."""
    return copy.deepcopy(draw(STRANGE))


def places(document: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a document."""
    pairs = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in pairs:
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


@st.composite
def mutated_document(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three values replaced, removed, or added."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(changed))
        if not found:
            return strange(draw)
        *parents, key = draw(st.sampled_from(found))
        owner = changed
        for parent in parents:
            owner = owner[parent]
        kind = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if kind == "replace":
            owner[key] = strange(draw)
        elif kind == "remove":
            del owner[key]
        elif isinstance(owner, dict):
            owner[draw(st.text(max_size=10))] = strange(draw)
        else:
            owner.append(strange(draw))
    return changed


def as_json(document: Any) -> bytes:
    """JSON of a document, strange values included."""
    limit = sys.getrecursionlimit()
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(10_000)
    try:
        return json.dumps(document).encode()
    finally:
        sys.setrecursionlimit(limit)
        sys.set_int_max_str_digits(4300)


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the block takes longer than LIMIT_S or more memory than MOST_BYTES."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"no answer within {LIMIT_S} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_BYTES, f"{grown} bytes more memory"


def require_value_or_error(call: Callable[[], Any]) -> None:
    """The property: the call returns, or raises one of our errors with a message of one paragraph."""
    with bounded():
        try:
            call()
        except QatEdgeError as error:
            assert 0 < len(str(error)) < MESSAGE_CHARACTERS, len(str(error))
