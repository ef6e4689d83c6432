"""Shared by all runtimes of the agent: the error for an impossible request, and the chunks of a sequence."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_TOKENS = 256  # tokens whose logits are in memory at once


class RequestRejected(Exception):
    """The artifact cannot do what the request asks for; the message has the reason."""


def token_chunks(ids: list[int], decode_from: int | None) -> Iterator[list[int]]:
    """Yield the ids of a sequence as a model processes them: many at once, from `decode_from` on one at a time."""
    end = len(ids) if decode_from is None else decode_from
    for begin in range(0, len(ids[:end]), CHUNK_TOKENS):
        yield ids[begin : min(begin + CHUNK_TOKENS, end)]
    for token in ids[end:]:
        yield [token]
