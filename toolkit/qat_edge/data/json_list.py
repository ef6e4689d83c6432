"""Read the elements of a JSON list one by one, so that memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TextIO

CHUNK = 1024**2  # characters read at a time
DECODER = json.JSONDecoder()


class JsonListError(ValueError):
    """A list that ends early, or that is followed by something else."""


def list_elements(file: TextIO, longest: int) -> Iterator[str]:
    """Yield the text of each element of the list that a file holds.

    An element that is not JSON is yielded with what follows it, for the caller's parser to describe.

    Args:
        file: Opened for reading, at its beginning.
        longest: Characters of the longest element.

    Raises:
        JsonListError: The file does not hold one whole list.
    """
    reader = _Reader(file)
    if reader.next_mark() != "[":
        raise JsonListError("it does not begin with '['")
    mark = reader.next_mark(skip=1)
    # After '[' and ',' an element begins, unless the list is empty.
    while mark != "]":
        yield reader.element(longest)
        mark = reader.next_mark()
        if mark == ",":
            reader.next_mark(skip=1)
        elif mark != "]":
            raise JsonListError(f"',' or ']' expected, found {mark!r}" if mark else "the list ends early")
    if reader.next_mark(skip=1):
        raise JsonListError("more follows after the list")


class _Reader:
    """A text of which the part that is not read yet is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.position = file, "", 0

    def next_mark(self, skip: int = 0) -> str:
        """Skip characters, and white space after them; return the next character without reading it, "" at the end."""
        self.position += skip
        while True:
            rest = len(self.text)
            while self.position < rest and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < rest or not self._read_more():
                return self.text[self.position : self.position + 1]

    def element(self, longest: int) -> str:
        """Read one element, or all that is left where none ends within `longest` characters."""
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.position)
            except (ValueError, RecursionError):
                end = len(self.text)  # cut off, or no JSON
            # A number may go on after the last character that was read.
            if end < len(self.text) or len(self.text) - self.position > longest or not self._read_more():
                found = self.text[self.position : end]
                self.position = end
                return found

    def _read_more(self) -> bool:
        """Read on, and return whether there was more. As much again as there is: a long element is tried few times."""
        rest = self.text[self.position :]
        more = self.file.read(max(CHUNK, len(rest)))
        self.text, self.position = rest + more, 0
        return bool(more)
