"""Read rows from files, folders and Hub data sets.

A row has one of six shapes. The first three are for models that generate text:

    chat           {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    completion     {"prompt": "2 + 2 =", "completion": " 4"}
    running text   {"text": "Call me Ishmael. Some years ago ..."}

and three are for encoders:

    labelled text  {"text": "turn it off", "label": "light"}, the label a word or a whole number; with
                   "text_pair": "..." where the classifier reads two texts
    scored pair    {"text_a": "a red car", "text_b": "a crimson car", "score": 0.9}, the score a cosine, -1 to 1
    matching pair  {"anchor": "capital of France", "positive": "Paris"}, the positive the right one among a batch's

They are read into `Chat`, `Completion`, `Text` (running and labelled) and `Pair` (scored and matching). A .csv or
.parquet file has the keys as columns; a .txt file is one running text. Further keys are ignored, and null is absent.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import DataError
from qat_edge.models import hub

EXPECTED = (
    "'messages' (a list of {role, content}), 'prompt' and 'completion', or 'text'; for an encoder 'text' and 'label', "
    "'text_a', 'text_b' and 'score', or 'anchor' and 'positive'"
)


@dataclass(frozen=True)
class Chat:
    """A conversation. Every assistant message is trained on.

    Attributes:
        messages: Messages with "role" and "content".
        where: File and line, for error messages.
    """

    messages: list[dict[str, str]]
    where: str


@dataclass(frozen=True)
class Completion:
    """A prompt without a chat template, and the text that follows it.

    Attributes:
        prompt: Passed to the model as it is.
        completion: The part that is trained on.
        where: File and line, for error messages.
    """

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Text:
    """Running text, trained on in windows; or the labelled text of a classifier.

    Attributes:
        text: The text, or the first of two.
        where: File and line, for error messages.
        label: The label as it is in the row; checked where a classifier is trained.
        pair: The second text, for a classifier of pairs.
    """

    text: str
    where: str
    label: Any = None
    pair: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two texts for a sentence encoder.

    Attributes:
        text_a: First text, or the anchor.
        text_b: Second text, or the positive.
        score: The cosine to train for, -1 to 1; None for a pair that belongs together.
        where: File and line, for error messages.
    """

    text_a: str
    text_b: str
    score: float | None
    where: str


Row = Chat | Completion | Text | Pair
Records = Iterator[tuple[Any, str]]  # a row as parsed, and its file and line


def load_rows(source: str, split: str = "train") -> list[Row]:
    """Read the rows of a .jsonl, .json, .csv, .parquet or .txt file, a data set folder or a Hub data set.

    Args:
        source: Path or Hub id; `NAME:PART` names another part of a folder or Hub data set than `split`.
        split: Part of a folder or Hub data set.

    Raises:
        DataError: The source does not exist or is empty, or a row has none of the six shapes. The message names the
            file and the line.
    """
    path = Path(source).expanduser()
    if path.is_file():
        records = _file_records(path)
    else:
        # NAME:PART, unless the whole is the name of a folder.
        name, colon, part = source.rpartition(":")
        if not colon or path.is_dir():
            name, part = source, split

        # A path that does not exist is an error. It is never looked up on the Hub, whose message would mislead.
        folder = Path(name).expanduser()
        is_path = name.startswith((".", "/", "~")) and not folder.is_dir()
        if is_path or folder.suffix.lower() in READERS:
            raise DataError(f"{source}: no such file or folder. Give an existing one or a Hub data set id.")
        records = _dataset_records(str(folder), part)

    rows = [_parse_row(record, where) for record, where in records]
    if not rows:
        raise DataError(f"{source}: contains no rows. Expected rows with {EXPECTED}.")
    return rows


# --- files to records --------------------------------------------------------------------------------------


def _file_records(path: Path) -> Records:
    # Errors of reading are translated here, once for all formats.
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(READERS)}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _jsonl_records(path: Path) -> Records:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield _parse_json(line, where), where


def _json_records(path: Path) -> Records:
    document = _parse_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(document, list):
        raise DataError(f"{path}: expected a JSON list of rows, found {_type(document)}.")
    for number, record in enumerate(document, start=1):
        yield record, f"{path}: row {number}"


def _csv_records(path: Path) -> Records:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                # `line_num` is the line on which a row ends. Short rows have values None, long rows a key None.
                yield {k: v for k, v in record.items() if k is not None}, f"{path}:{reader.line_num}"
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: cannot be read as CSV ({error}).") from error


def _parquet_records(path: Path) -> Records:
    import datasets  # takes seconds to import, and text files do not need it

    try:
        records = datasets.Dataset.from_parquet(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error.__cause__ or error}).") from error
    for number, record in enumerate(records, start=1):
        yield record, f"{path}: row {number}"


def _txt_records(path: Path) -> Records:
    text = path.read_text(encoding="utf-8")
    if text.strip():
        yield {"text": text}, str(path)


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
    ".txt": _txt_records,
}


def _dataset_records(name: str, split: str) -> Records:
    """Yield the records of a folder, as `datasets` saved it or of data files, or of a Hub data set."""
    import datasets  # takes seconds to import, and text files do not need it

    # Only a name that is no folder needs the Hub; the reason is for the message, a cached copy may still load.
    offline = "" if Path(name).is_dir() else hub.unreachable_reason()
    try:
        # `save_to_disk` writes state.json, or dataset_dict.json for several parts.
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: no such file or folder, and no data set with a part '{split}' was found there or on the "
            f"Hub ({offline or ' '.join(str(error).split())[:300]}). Check the name; '{name}:PART' names another part."
        ) from error
    for number, record in enumerate(data, start=1):
        yield record, f"{name}:{split}, row {number}"


def _parse_json(text: str, where: str) -> Any:
    return readers.parse_json(text, where, DataError)


# --- records to rows ---------------------------------------------------------------------------------------


def _parse_row(record: Any, where: str) -> Row:
    """Check a record and return the row of its shape; absent and null are the same."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {EXPECTED}, found {_type(record)}.")
    # Columns of a table exist in every row, so null has to count as absent.
    given = {key: value for key, value in record.items() if value is not None}

    # For text generation.
    if "messages" in given:
        return Chat(_messages(given["messages"], where), where)
    if "prompt" in given and "completion" in given:
        completion = _string(given, "completion", where)
        if not completion:
            raise DataError(f"{where}: 'completion' is empty, so there is nothing to train on. Remove the row.")
        return Completion(_string(given, "prompt", where), completion, where)
    # For both: a label makes the text a classifier's.
    if "text" in given:
        pair = _string(given, "text_pair", where) if "text_pair" in given else None
        return Text(_string(given, "text", where), where, given.get("label"), pair)
    # For sentence encoders.
    if "text_a" in given and "text_b" in given:
        return Pair(_string(given, "text_a", where), _string(given, "text_b", where), _score(given, where), where)
    if "anchor" in given and "positive" in given:
        return Pair(_string(given, "anchor", where), _string(given, "positive", where), None, where)

    found = ", ".join(f"'{key}'" for key in given) or "none"
    raise DataError(f"{where}: keys found: {found}; expected {EXPECTED}. Rename the keys of the rows.")


def _score(record: dict[str, Any], where: str) -> float:
    """Return the score of a pair as a number, and check its range."""
    # A missing score is None, which is no number either.
    value = record.get("score")
    try:
        score = float(str(value))  # the values of a .csv are strings
    except ValueError as error:
        raise DataError(f"{where}: 'score' must be a number, found {_type(value)}.") from error
    if isinstance(value, bool) or not -1 <= score <= 1:
        raise DataError(f"{where}: 'score' is {value}; a cosine is between -1 and 1. Divide scores of 0 to 5 by 5.")
    return score


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    """Check the messages of a chat, and that an assistant message has content."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list of {{role, content}}, found {_type(value)}.")

    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} must be {{role, content}}, found {_type(message)}.")
        position = f"{where}: message {number}"
        messages.append({key: _string(message, key, position) for key in ("role", "content")})

    # Two mistakes that need different corrections: no assistant at all, or one that says nothing.
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"{where}: no message of role 'assistant', so there is nothing to train on; roles: {roles}.")
    if not any(answers):
        raise DataError(f"{where}: the assistant's message is empty, so there is nothing to train on.")
    return messages


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' must be a string, found {_type(value)}.")
    return value


def _type(value: Any) -> str:
    """Name the JSON type of a value, for messages."""
    if value is None:
        return "nothing"
    # Before numbers: bool is a subclass of int.
    if isinstance(value, bool):
        return "true or false"
    if value in ([], {}):
        return f"an empty {'list' if value == [] else 'object'}"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]
