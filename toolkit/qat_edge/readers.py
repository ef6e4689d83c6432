"""Read JSON, YAML and TOML files that may come from anyone, with limits on size, depth and numbers.

Every file of these formats is read here, so that a hostile or damaged one ends in one paragraph: no traceback, no
endless loop, no message of gigabytes. Files are UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from qat_edge.errors import QatEdgeError

MAX_BYTES = 256 * 1024 * 1024  # of a JSON file; the largest tokenizers have 40 MB
# Their parsers are written in Python: this much YAML takes up to 4 s, and a long dotted key in TOML quadratic time.
MAX_YAML_BYTES = 256 * 1024
MAX_TOML_BYTES = 16 * 1024
MAX_DEPTH = 100  # of nested lists and objects
MAX_DIGITS = 100  # of an integer; every further step with a longer one takes quadratic time
MAX_FLOAT_CHARACTERS = 1000
SHOWN_NUMBERS = 4  # of a list in a message
FEW = 3  # names of a list in a message
SHOWN_CHARACTERS = 80  # of a value that a message quotes

BYTE_ORDER_MARK = "\ufeff"

Failure = type[QatEdgeError]


def read_text(path: Path, error: Failure, where: str | None = None, max_bytes: int = MAX_BYTES) -> str:
    """Read a UTF-8 file, without its byte-order mark.

    Args:
        path: File to read.
        error: Class of the error to raise.
        where: How a message names the file; its path by default.
        max_bytes: Size of the largest file that is read.

    Raises:
        QatEdgeError: The file is missing, too large, unreadable or not UTF-8.
    """
    where = where or str(path)
    try:
        # A pipe or a device would be read without end.
        if path.exists() and not path.is_file():
            raise error(f"{where}: cannot be read (not a file). Give the path of a file.")
        # One byte more than is permitted, because a file may grow while it is read.
        with path.open("rb") as file:
            found = file.read(max_bytes + 1)
        if len(found) > max_bytes:
            size = max(path.stat().st_size, len(found))
            raise error(f"{where}: {size} bytes; at most {max_bytes} are read. Is it the right file?")
        return found.decode("utf-8-sig")
    except FileNotFoundError as cause:
        raise error(f"{where}: no such file.") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not UTF-8 text ({cause.reason} at byte {cause.start}). Save it as UTF-8.") from cause
    except (OSError, ValueError) as cause:  # a null byte in the path is a ValueError
        raise error(f"{where}: cannot be read ({getattr(cause, 'strerror', None) or cause}).") from cause


def parse_json(text: str | bytes, where: str, error: Failure, allow_nan: bool = False) -> Any:
    """Parse one JSON document.

    Args:
        text: The document.
        where: File, or file and line, for the message.
        error: Class of the error to raise.
        allow_nan: Accept NaN and Infinity, which are not JSON, but which our own results may hold.

    Raises:
        QatEdgeError: Not JSON, nested too deep, a key twice in one object, a number that is not finite or has thousands
            of digits, or half of a surrogate pair, which no tokenizer can encode.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=None if allow_nan else refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
        _check_depth(document)
    except json.JSONDecodeError as cause:
        line = f"line {cause.lineno}, " if cause.lineno > 1 else ""
        raise error(f"{where}: not JSON ({cause.msg} at {line}column {cause.colno}).") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not UTF-8 text ({cause.reason} at byte {cause.start}).") from cause
    except RecursionError as cause:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels.") from cause
    except ValueError as cause:
        raise error(f"{where}: not usable JSON ({cause}).") from cause
    return document


def read_json(path: Path, error: Failure, where: str | None = None, allow_nan: bool = False) -> Any:
    """Read a JSON file; see `read_text` and `parse_json`."""
    return parse_json(read_text(path, error, where), where or str(path), error, allow_nan)


def read_object(path: Path, error: Failure, where: str | None = None, allow_nan: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds one object; see `read_text` and `parse_json`.

    Raises:
        QatEdgeError: See there; or the file holds something else than an object.
    """
    document = read_json(path, error, where, allow_nan)
    if not isinstance(document, dict):
        raise error(f"{where or path}: expected a JSON object, found {show(document)}.")
    return document


def read_yaml(path: Path, error: Failure, where: str | None = None) -> Any:
    """Read a YAML file of plain values, without tags and aliases; an empty file is None.

    Raises:
        QatEdgeError: See `read_text`; or no YAML, a key twice, an alias, or nested too deep.
    """
    where = where or str(path)
    text = read_text(path, error, where, MAX_YAML_BYTES)
    try:
        document = yaml.load(text, _PlainLoader)  # a SafeLoader with fewer features
        _check_depth(document)
    except RecursionError as cause:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels.") from cause
    except (yaml.YAMLError, ValueError) as cause:
        reason = shorten(" ".join(str(cause).split()), 300)
        raise error(f"{where}: cannot be read as YAML: {reason}") from cause
    return document


def read_toml(path: Path, error: Failure, where: str | None = None) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        QatEdgeError: See `read_text`; or no TOML, or nested too deep.
    """
    where = where or str(path)
    text = read_text(path, error, where, MAX_TOML_BYTES)
    try:
        document = tomllib.loads(text)
        _check_depth(document)
    except RecursionError as cause:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels.") from cause
    except ValueError as cause:  # TOMLDecodeError is one
        # Python's own text about a huge integer advises to raise its limit.
        reason = "an integer with too many digits" if "integer string conversion" in str(cause) else str(cause)
        raise error(f"{where}: cannot be read as TOML: {shorten(reason, 300)}") from cause
    return document


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a parsed document, with the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def shorten(value: Any, length: int = SHOWN_CHARACTERS) -> str:
    """Return a value as text for a message, cut to `length` characters."""
    # repr of a deep or huge value would be as deep and as huge as the value.
    if isinstance(value, dict | list | tuple | set):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else text[:length] + "..."


def first_few(names: Iterable[str], separator: str = ", ") -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = len(names) - FEW
    return separator.join(names[:FEW]) + (f"{separator}and {more} more" if more > 0 else "")


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 row", "2 rows".

    Args:
        count: The number.
        noun: What is counted; a verb may follow.
        plural: The same for other numbers than 1; the noun with an "s" by default.
    """
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def show(value: Any) -> str:
    """Return a value for a message as Python writes it: text in quotation marks, and everything cut by `shorten`.

    Short lists of numbers, such as those of end tokens, are shown whole.
    """
    if isinstance(value, list) and len(value) <= SHOWN_NUMBERS and all(type(each) in (int, float) for each in value):
        return f"[{', '.join(map(shorten, value))}]"
    return repr(shorten(value)) if isinstance(value, str) else shorten(value)


# YAML 1.1 reads 010 as 8 and 1:30 as 90.
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases, which a message or a copy would expand, and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias '*{event.anchor}' is not supported; write the value again", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        seen: set[Hashable] = set()
        for key in keys:
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{shorten(key)}' is given twice", node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"an integer of {len(node.value)} digits", node.start_mark
            )
        if not _DECIMAL.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{shorten(node.value)} is a number that YAML reads in another base; write it in decimal, "
                "or in quotes", node.start_mark,
            )  # fmt: skip
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: Any) -> float:
        if len(node.value) > MAX_FLOAT_CHARACTERS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )
        return float(super().construct_yaml_float(node))


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    if len(digits) > MAX_FLOAT_CHARACTERS:
        raise ValueError(f"a number of {len(digits)} characters")
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{shorten(digits)} is too large for a number")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON from its pairs.

    Raises:
        ValueError: A key is there twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{shorten(key)}' twice in one object")
        found[key] = value
    return found


def _check_depth(document: Any) -> None:
    """Check nesting and text without recursion.

    Raises:
        RecursionError: Deeper than MAX_DEPTH.
        ValueError: A text holds half of a surrogate pair.
    """
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following += value.keys()
                following += value.values()
            elif isinstance(value, list):
                following += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError as cause:
                    raise ValueError(
                        f"half of a surrogate pair, \\u{ord(value[cause.start]):04x}, which is no character"
                    ) from cause
        if not following:
            return
        level = following
    raise RecursionError
