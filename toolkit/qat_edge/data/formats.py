"""Rows from files, folders and Hub data sets, in one of these shapes; the last three are for encoders.

{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
{"prompt": ..., "completion": ...}
{"text": ...}
{"text": ..., "label": a word or a whole number}, with "text_pair": a second text or without
{"text_a": ..., "text_b": ..., "score": the cosine they are to have}
{"anchor": ..., "positive": what belongs to it}
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.errors import DataError
from qat_edge.models import hub

EXPECTED = "'messages' (a list of {role, content}), 'prompt' and 'completion', or 'text'"


@dataclass(frozen=True)
class Chat:
    """A conversation; every assistant message is learned. where: file and line, for messages."""

    messages: list[dict[str, str]]
    where: str


@dataclass(frozen=True)
class Completion:
    """A prompt as it stands, without a chat template, and what follows it."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Text:
    """Running text, learned in windows. label: what an encoder is to give it, or it and `pair`, as the row has it."""

    text: str
    where: str
    label: Any = None
    pair: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two texts for an encoder. score: the cosine they are to have, -1 to 1; None where they belong together."""

    text_a: str
    text_b: str
    score: float | None
    where: str


Row = Chat | Completion | Text | Pair


def load_rows(source: str, split: str = "train") -> list[Row]:
    """Rows of a .jsonl, .json, .csv, .parquet or .txt file, a data set folder or a Hub data set.

    `split` names the part of a folder or Hub data set; `NAME:PART` in `source` names another.

    Raises:
        DataError: nothing there, nothing in it, or a row of no known shape (file and line are named).
    """
    path = Path(source).expanduser()
    if path.is_file():
        records = _file_records(path)
    else:
        name, colon, part = source.rpartition(":")
        name, part = (name, part) if colon and not path.is_dir() else (source, split)
        folder = Path(name).expanduser()
        if folder.suffix.lower() in READERS or (name.startswith((".", "/", "~")) and not folder.is_dir()):
            raise DataError(f"{source}: no such file or folder. Give an existing one or a Hub data set id.")
        records = _dataset_records(str(folder), part)
    rows = [_row(record, where) for record, where in records]
    if not rows:
        raise DataError(f"{source}: holds no rows. Expected rows with {EXPECTED}.")
    return rows


def _file_records(path: Path) -> Iterator[tuple[Any, str]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(READERS)}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _jsonl_records(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield _parsed(line, where), where


def _json_records(path: Path) -> Iterator[tuple[Any, str]]:
    document = _parsed(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(document, list):
        raise DataError(f"{path}: expected a JSON list of rows, found {_type(document)}.")
    for number, record in enumerate(document, start=1):
        yield record, f"{path}: row {number}"


def _csv_records(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                # A row ends on line_num; short rows have None, long rows a key None.
                yield {k: v for k, v in record.items() if k is not None}, f"{path}:{reader.line_num}"
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: cannot be read as CSV ({error}).") from error


def _parquet_records(path: Path) -> Iterator[tuple[Any, str]]:
    import datasets  # takes seconds to import, and text files do without

    try:
        records = datasets.Dataset.from_parquet(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error.__cause__ or error}).") from error
    for number, record in enumerate(records, start=1):
        yield record, f"{path}: row {number}"


def _txt_records(path: Path) -> Iterator[tuple[Any, str]]:
    text = path.read_text(encoding="utf-8")
    if text.strip():
        yield {"text": text}, str(path)


READERS: dict[str, Callable[[Path], Iterator[tuple[Any, str]]]] = {
    ".jsonl": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
    ".txt": _txt_records,
}


def _dataset_records(name: str, split: str) -> Iterator[tuple[Any, str]]:
    import datasets  # takes seconds to import, and text files do without

    reason = "" if Path(name).is_dir() else hub.unreachable()
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: no such file or folder, and no data set with a part '{split}' was found there or on the "
            f"Hub ({reason or ' '.join(str(error).split())[:300]}). Check the name; '{name}:PART' names another part."
        ) from error
    for number, record in enumerate(data, start=1):
        yield record, f"{name}:{split}, row {number}"


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is no JSON ({error.msg} at column {error.colno}).") from error


def _row(record: Any, where: str) -> Row:
    """`record` as one of the three shapes; absent and null are the same."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {EXPECTED}, found {_type(record)}.")
    given = {key: value for key, value in record.items() if value is not None}
    if "messages" in given:
        return Chat(_messages(given["messages"], where), where)
    if "prompt" in given and "completion" in given:
        completion = _string(given, "completion", where)
        if not completion:
            raise DataError(f"{where}: 'completion' is empty, so there is nothing to learn. Remove the row.")
        return Completion(_string(given, "prompt", where), completion, where)
    if "text" in given:
        pair = _string(given, "text_pair", where) if "text_pair" in given else None
        return Text(_string(given, "text", where), where, given.get("label"), pair)
    if "text_a" in given and "text_b" in given:
        return Pair(_string(given, "text_a", where), _string(given, "text_b", where), _score(given, where), where)
    if "anchor" in given and "positive" in given:
        return Pair(_string(given, "anchor", where), _string(given, "positive", where), None, where)
    found = ", ".join(f"'{key}'" for key in given) or "none"
    raise DataError(f"{where}: keys found: {found}; expected {EXPECTED}. Rename the keys of the rows.")


def _score(record: dict[str, Any], where: str) -> float:
    value = record.get("score")
    try:
        score = float(str(value))  # a .csv has text
    except ValueError as error:
        raise DataError(f"{where}: 'score' must be a number, found {_type(value)}.") from error
    if isinstance(value, bool) or not -1 <= score <= 1:
        raise DataError(f"{where}: 'score' is {value}; a cosine lies between -1 and 1. Divide scores of 0 to 5 by 5.")
    return score


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list of {{role, content}}, found {_type(value)}.")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} must be {{role, content}}, found {_type(message)}.")
        place = f"{where}: message {number}"
        messages.append({key: _string(message, key, place) for key in ("role", "content")})
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"{where}: no message of role 'assistant' to learn from; roles found: {roles}.")
    return messages


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string, found {_type(value)}.")
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    return f"an empty {'list' if value == [] else 'object'}" if value in ([], {}) else names[type(value)]
