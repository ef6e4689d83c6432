r"""Regular expressions of a JSON schema as llguidance reads them.

JSON schema takes those of JavaScript, and llguidance those of Rust, without references and look-around, which it
refuses. Three differences would go unnoticed, found in onnxruntime-genai 0.18.0:

    classes     "[", "&&", "~~" and "--" inside a class are operators in Rust; here they become characters
    [^"] [^\\]  the quotation mark and the backslash are permitted in classes of all other characters. They are not if
                the vertical tab is excluded as well
    \\[a-z]     outside of classes, both characters are compared with the JSON instead of the text that it stands for
"""

from __future__ import annotations

from collections.abc import Iterator

VERTICAL_TAB = r"\x0b"
OPERATORS = "[&~"  # of classes in Rust
ESCAPED_IN_JSON = frozenset((r"\\", '"', r"\""))


def for_guidance(pattern: str) -> str:
    """Return a regular expression of a JSON schema in Rust's form."""
    return "".join(_in_rust(token, is_inside) for token, is_inside in _tokens(pattern))


def has_escaped_character(pattern: str) -> bool:
    """Return whether a regular expression has a quotation mark or a backslash of the text outside of classes."""
    return any(token in ESCAPED_IN_JSON for token, is_inside in _tokens(pattern) if not is_inside)


def _tokens(pattern: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a regular expression, and whether each is inside a class; the begin of one is not."""
    position, is_inside = 0, False
    while position < len(pattern):
        token = _token(pattern[position : position + 3], is_inside)
        yield token, is_inside
        position += len(token)
        is_inside = token != "]" if is_inside else token.startswith("[")


def _token(text: str, is_inside: bool) -> str:
    """Return the characters at the begin of a text that belong together. A "]" that comes first in a class is one."""
    starts = ("--",) if is_inside else ("[^]", "[^", "[]")
    length = 2 if text.startswith("\\") else 1
    return next((start for start in starts if text.startswith(start)), text[:length])


def _in_rust(token: str, is_inside: bool) -> str:
    if is_inside:
        # The hyphens are a range that ends with one.
        return r"-\-" if token == "--" else f"\\{token}" if token in OPERATORS else token
    if token.startswith("["):
        return token.replace("]", r"\]") + (VERTICAL_TAB if token.startswith("[^") else "")
    return token
