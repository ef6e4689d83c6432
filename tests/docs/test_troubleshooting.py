"""Troubleshooting explains every class of error, and quotes messages that the code has."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

import pytest

from qat_edge import errors
from tests.docs.doc_pages import DOCS, ROOT, anchors

PAGE = DOCS / "troubleshooting.md"
CLASSES = [
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.QatEdgeError) and value is not errors.QatEdgeError
]
# The first cell of a table's row; double backticks enclose a quotation that has code in it.
CELL = re.compile(r"^\| (`+) ?(.+?) ?\1 \| ", flags=re.MULTILINE)
QUOTED = [match[2] for match in CELL.finditer(PAGE.read_text(encoding="utf-8"))]
VALUE = "\0"  # stands for a part of a message that is filled in


def _messages() -> list[str]:
    """Return every text of the three packages, with VALUE for what is filled in."""
    files = [path for root in ("toolkit", "exporters", "devices") for path in (ROOT / root).rglob("*.py")]
    return [text for path in files for text in _texts(path)]


def _texts(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found.append(node.value)
    return found


MESSAGES = _messages()


def _fragments(quoted: str) -> list[str]:
    return [fragment for fragment in quoted.split("...") if fragment.strip()]


def _is_in(quoted: str, message: str) -> bool:
    """Return whether the fragments of a quotation are in a message, in order."""
    position = 0
    for fragment in _fragments(quoted):
        position = message.find(fragment, position)
        if position < 0:
            return False
        position += len(fragment)
    return True


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_class_has_a_section(name: str) -> None:
    assert name.lower() in anchors(PAGE)
    assert f"`{name}`" in (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")


def test_there_are_many_messages() -> None:
    assert len(QUOTED) > 70


@pytest.mark.parametrize("quoted", QUOTED)
def test_every_quoted_message_is_in_the_code(quoted: str) -> None:
    assert sum(len(fragment) for fragment in _fragments(quoted)) >= 8, "too short to tell messages apart"
    if not any(_is_in(quoted, message) for message in MESSAGES):
        shown = [message.replace(VALUE, "...") for message in MESSAGES]
        nearest = difflib.get_close_matches(quoted, [text[: len(quoted) + 20] for text in shown], n=3, cutoff=0.3)
        pytest.fail(f"no message reads so; the nearest: {nearest}")
