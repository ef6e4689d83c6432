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

They are read into `Chat`, `Completion`, `Text` (running and labelled) and `Pair` (scored and matching), which
`data.row_parsing` checks. A .csv, .tsv or .parquet file has the keys as columns; a .txt file is one running text. Text
files are UTF-8, with or without a byte-order mark. Keys that are not used are reported with their counts; null is
absent. A .json file holds a list of rows, or a row in each line like a .jsonl file.

Rows are read one by one, apart from a .txt file, which is read whole. Parquet files and Hub data sets are converted on
disk first, unless they are streamed; streaming also reads a .txt file in pieces.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qat_edge import progress
from qat_edge.data import class_labels, data_folders
from qat_edge.data.json_list import JsonListError, list_elements
from qat_edge.data.row_parsing import parse_row, type_name, unused_keys, without_nulls
from qat_edge.data.rows import EXPECTED, Chat, Completion, Pair, Row, Text
from qat_edge.errors import DataError
from qat_edge.manifest import sha256
from qat_edge.models import hub
from qat_edge.path_names import is_path
from qat_edge.readers import BYTE_ORDER_MARK, counted, parse_json, read_text, shorten

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["Chat", "Completion", "Pair", "Row", "RowStream", "Text", "load_rows"]

MAX_FILE_BYTES = 16 * 1024**3  # of a .txt file, which is read whole
MAX_LINE_CHARACTERS = 256 * 1024**2  # of a .jsonl file, which is read line by line; of a value in a .csv file
TEXT_PIECE = 1024**2  # characters of a .txt file that is streamed, to the end of the line
PARQUET_BATCH = 1000  # rows of a Parquet file in memory, where it is streamed
# Raised by `datasets` for damaged files, depending on where; RuntimeError for a script, which it does not run any more.
WRONG_DATA = (
    ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError,
    # Damaged archives and compressed files.
    zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError,
)  # fmt: skip
SHOWN_KEYS = 10  # unused keys that a message names

Records = Iterator[tuple[Any, str]]  # a row as parsed, and its file and line


def load_rows(source: str, split: str = "train", report: bool = True) -> list[Row]:
    """Read the rows of a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a data set folder or a Hub data set.

    Args:
        source: Path or Hub id; `NAME:PART` names another part of a folder or Hub data set than `split`.
        split: Part of a folder or Hub data set.
        report: Report keys that are not used, with their counts.

    Raises:
        DataError: The source does not exist or is empty, or a row has none of the six shapes. The message names the
            file and the line.
    """
    return list(RowStream(source, split, report))


class RowStream:
    """The rows of a source, read again from the beginning in every loop: memory does not grow with the source.

    Attributes:
        source: Path or Hub id.
        split: Part of a folder or Hub data set.
        report: Report keys that are not used.
        streamed: Nothing is converted or downloaded before the first row, and a .txt file is several texts.
        sha256: Identity of the rows, wherever they are; empty until a loop has read all of them.
    """

    def __init__(self, source: str, split: str = "train", report: bool = True, streamed: bool = False) -> None:
        """Remember the source; see `load_rows` for the arguments. The first loop that ends reports unused keys.

        Of a stream, that may be a loop that is left early.
        """
        self.source, self.split, self.report, self.streamed = source, split, report, streamed
        self.sha256 = ""

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            DataError: See `load_rows`.
        """
        found = False
        unused: Counter[str] = Counter()
        digest = hashlib.sha256()
        try:
            for record, where in _records(self.source, self.split, self.streamed):
                row = parse_row(record, where)
                unused.update(unused_keys(record, row))
                found = True
                digest.update(identity(row))
                yield row
        finally:
            # A stream may never be read to its end.
            if self.streamed:
                self._report_unused(unused)
        if not found:
            raise DataError(f"{self.source}: contains no rows. Expected rows with {EXPECTED}.")
        self._report_unused(unused)
        self.sha256 = digest.hexdigest()

    def _report_unused(self, unused: Counter[str]) -> None:
        """Report keys that are not used, with their counts, the first time."""
        if self.report and unused:
            progress.info(f"{self.source}: not used: {_listed(unused)}")
        self.report = False


def identity(row: Row) -> bytes:
    """Return a row as bytes, without its place. Fields that are empty are left out: later versions may have more."""
    fields = [(name, value) for name, value in vars(row).items() if name != "where" and value not in (None, [], {})]
    return f"{type(row).__name__} {fields}\n".encode(errors="surrogateescape")


def _records(source: str, split: str, streamed: bool) -> Records:
    """Return the records of a file, a folder or a Hub data set."""
    path = Path(source).expanduser()
    if path.is_file():
        return _file_records(path, streamed)

    # NAME:PART, unless the whole is the name of a folder.
    name, colon, part = source.rpartition(":")
    named = bool(colon) and not path.is_dir()
    if not named:
        name, part = source, split

    # A path that does not exist is an error. It is never looked up on the Hub, whose message would mislead.
    folder = Path(name).expanduser()
    is_local = is_path(source) or folder.suffix.lower() in READERS
    if is_local and not folder.exists():
        raise DataError(f"{source}: no such file or folder. Give an existing one or a Hub data set id.")
    if folder.is_file():
        raise DataError(f"{source}: a file has no parts. Give {name}, or a folder with a file for each part.")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{source}: a pipe, a socket or a device, which cannot be read twice. Save the rows in a file.")
    return _dataset_records(str(folder), part, named, streamed)


def _listed(counts: Counter[str]) -> str:
    """Return keys with the numbers of rows that have them, the most frequent ones first."""
    named = [f"'{shorten(key)}' in {counted(count, 'row')}" for key, count in counts.most_common(SHOWN_KEYS)]
    return ", ".join(named) + (f" and {len(counts) - SHOWN_KEYS} more" if len(counts) > SHOWN_KEYS else "")


# --- files to records --------------------------------------------------------------------------------------


def _file_records(path: Path, streamed: bool) -> Records:
    # Errors of reading are translated here, once for all formats.
    reader = (STREAM_READERS if streamed else READERS).get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(READERS)}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _jsonl_records(path: Path) -> Records:
    with _open_text(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARACTERS + 1):
            number += 1
            where = f"{path}:{number}"
            _require_utf8(line, where)
            if len(line) > MAX_LINE_CHARACTERS:
                raise DataError(f"{where}: longer than {MAX_LINE_CHARACTERS} characters. Write one row in each line.")
            if line.strip():
                yield parse_json(line, where, DataError), where


def _json_records(path: Path) -> Records:
    # Many .json files hold JSON lines.
    if _holds_lines(path):
        yield from _jsonl_records(path)
        return
    number = 0
    with _open_text(path) as file:
        try:
            for number, text in enumerate(list_elements(file, MAX_LINE_CHARACTERS), start=1):
                where = f"{path}: row {number}"
                _require_utf8(text, where)
                yield parse_json(text, where, DataError), where
        except JsonListError as error:
            if number:
                raise DataError(f"{path}: not JSON after row {number} ({error}).") from error
            document = parse_json(read_text(path, DataError, max_bytes=MAX_FILE_BYTES), str(path), DataError)
            raise DataError(f"{path}: expected a JSON list of rows, found {type_name(document)}.") from error


def _holds_lines(path: Path) -> bool:
    """Return whether the first line of a file is a JSON object and further ones follow: such a file is not JSON."""
    with _open_text(path) as file:
        # A list may be one line of gigabytes.
        if file.read(1) != "{":
            return False
        line = "{" + file.readline(MAX_LINE_CHARACTERS)
        try:
            parse_json(line, str(path), DataError)
        except DataError:
            return False
        while line := file.readline(MAX_LINE_CHARACTERS):
            if line.strip():
                return True
        return False


def _csv_records(path: Path) -> Records:
    csv.field_size_limit(MAX_LINE_CHARACTERS)
    separator, name = ("\t", "tabs") if path.suffix.lower() == ".tsv" else (",", "commas")
    with _open_text(path, newline="") as file:
        # Strict: a quote that nothing closes would take all further lines into its value.
        reader = csv.DictReader(_utf8_lines(file, path), strict=True, delimiter=separator)
        try:
            twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
            if twice:
                raise DataError(f"{path}: several columns are named '{shorten(twice[0])}'. Rename all but one.")
            for record in reader:
                # `line_num` is the line on which a row ends. Short rows have values None, long rows a key None.
                where = f"{path}:{reader.line_num}"
                if None in record:
                    raise DataError(
                        f"{where}: more values than the {len(reader.fieldnames or ())} columns of the first line. "
                        f"Put values that contain {name} in double quotes."
                    )
                yield record, where
        except csv.Error as error:
            if "field limit" in str(error):
                raise DataError(
                    f"{path}:{reader.line_num + 1}: a value has more than {MAX_LINE_CHARACTERS} characters. Split it "
                    "into several rows, or close the double quote that opens it."
                ) from error
            raise DataError(
                f"{path}:{reader.line_num}: cannot be read as CSV ({error}). A double quote that opens a value has to "
                "close it, and one inside of a value is written twice."
            ) from error


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file. Bytes that are not UTF-8 become surrogates, so that `_require_utf8` can name their line."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _require_utf8(text: str, where: str) -> None:
    """Refuse a text with bytes that are not UTF-8.

    Raises:
        DataError: Names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        raise DataError(f"{where}: not UTF-8 text (byte 0x{byte:02x} at character {error.start + 1}).") from error


def _utf8_lines(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        _require_utf8(line, f"{path}:{number}")
        yield line


def _parquet_records(path: Path) -> Records:
    import datasets  # takes seconds to import, and text files do not need it

    try:
        records = datasets.Dataset.from_parquet(str(path), cache_dir=_cache_of([path]))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error.__cause__ or error}).") from error
    yield from class_labels.name_labels(_decoded_records(records, f"{path}: row"), records.features)


def _txt_records(path: Path) -> Records:
    text = read_text(path, DataError, max_bytes=MAX_FILE_BYTES)
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text files on every system
    if text.strip():
        yield {"text": text}, str(path)


def _parquet_stream(path: Path) -> Records:
    """Yield the rows of a Parquet file without converting it on disk."""
    import datasets  # takes seconds to import, and text files do not need it

    try:
        records = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True, batch_size=PARQUET_BATCH
        )
        features = records.features or {}
    except (OSError, *WRONG_DATA, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error.__cause__ or error}).") from error
    yield from class_labels.name_labels(_decoded_records(records, f"{path}: row"), features)


def _txt_pieces(path: Path) -> Records:
    """Yield a text file in pieces that end with a line, each a text of its own."""
    with _open_text(path) as file:
        number = 1
        while piece := file.read(TEXT_PIECE):
            piece += file.readline(TEXT_PIECE)
            where = f"{path}:{number}"
            _require_utf8(piece, where)
            number += piece.count("\n")
            yield {"text": piece}, where


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".tsv": _csv_records,
    ".parquet": _parquet_records,
    ".txt": _txt_records,
}
STREAM_READERS = {**READERS, ".parquet": _parquet_stream, ".txt": _txt_pieces}


def _dataset_records(name: str, split: str, named: bool, streamed: bool) -> Records:
    """Yield the records of a folder, as `datasets` saved it or of data files, or of a Hub data set.

    named: The user gave the part, as NAME:PART.
    streamed: Read a data set of several files, or of the Hub, without converting it on disk.
    """
    import datasets  # takes seconds to import, and text files do not need it
    from datasets.packaged_modules.csv.csv import Csv

    # Only a name that is no folder needs the Hub; the reason is for the message, a cached copy may still load.
    is_folder = Path(name).is_dir()
    offline = "" if is_folder else hub.unreachable_reason()
    described = is_folder and data_folders.require_own_files(Path(name))
    files: list[Path] = []
    features: Mapping[str, Any] = {}
    promised = None
    try:
        # `save_to_disk` writes state.json, or dataset_dict.json for several parts.
        if any((Path(name) / record).is_file() for record in (data_folders.SAVED_PART, data_folders.SAVED_PARTS)):
            data = _load_saved(name, split, named)
        else:
            builder = datasets.load_dataset_builder(name)
            cache = None  # Hub data sets are in the usual one
            if is_folder:
                parts = {str(part): files for part, files in (builder.config.data_files or {}).items()}
                split = split if described else data_folders.part_by_name(Path(name), parts, split)
                files = _own_files(parts, split, streamed)
                # The builder found the files, but its features may be of what they contained earlier.
                cache = _cache_of(() if files else itertools.chain(*parts.values()))
                builder = datasets.load_dataset_builder(name, cache_dir=cache)
            # Of the description of a data set, which may name labels that text files hold as numbers.
            features = builder.info.features or {}
            if not files:
                load = _load_texts if isinstance(builder, Csv) else datasets.load_dataset
                data = load(name, split=split, cache_dir=cache, streaming=streamed)
                promised = (builder.info.splits or {}).get(split) if streamed else None
                if is_folder:
                    class_labels.require_same_names(parts, data.features or {})
    except (OSError, *WRONG_DATA, datasets.exceptions.DatasetsError) as error:
        reason = offline or " ".join(str(error.__cause__ or error).split())[:300]
        found = f"no data set with a part '{split}' was found there"
        outcome = f"{found} that can be read" if is_folder else f"no such file or folder, and {found} or on the Hub"
        raise DataError(f"{name}: {outcome} ({reason}). Check the name; '{name}:PART' names another part.") from error
    if files:
        records = (record for path in files for record in _file_records(path, streamed))
    else:
        features = features or data.features or {}
        decoded = _decoded_records(data, f"{name}:{split}, row", promised and promised.num_examples)
        records = ((_without_mark(record), row) for record, row in decoded)
    yield from class_labels.name_labels(records, features)


def _load_saved(name: str, split: str, named: bool) -> Dataset:
    """Load a part of what `save_to_disk` wrote; without a name of the part, a single one is the right one."""
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(name)
    if isinstance(data, DatasetDict):
        return data[split]
    if named and split != str(data.split or "train"):
        raise ValueError(f"it was saved as one part, {str(data.split or 'without a name')!r}")
    return data


def _own_files(parts: Mapping[str, Sequence[str]], split: str, streamed: bool) -> list[Path]:
    """Return the files of a part of a folder, if all are of a format that `datasets` would convert: it makes numbers,
    dates and null of texts that look like them, and a row of every line of a .txt file. It reads a .json list whole.
    """
    files = [Path(file) for file in parts.get(split, ())]
    own = (".csv", ".tsv", ".jsonl", ".txt", *([".json"] if streamed else []))
    return files if all(path.suffix.lower() in own and path.is_file() for path in files) else []


def _cache_of(files: Iterable[str | Path]) -> str:
    """Return the cache folder of `datasets` for local files with these contents.

    By itself, `datasets` recognizes a file by its path and modification time, and what it extracted from an archive by
    the path alone: of a file that was replaced with one of the same time, it would return the earlier rows.
    """
    import datasets  # takes seconds to import, and text files do not need it

    contents = hashlib.sha256()
    # Of zip://FILE::ARCHIVE, the archive.
    for path in sorted({Path(str(file).rpartition("::")[2]) for file in files}):
        contents.update(f"{path}\0{sha256(path) if path.is_file() else ''}\0".encode(errors="surrogateescape"))
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "qat-edge" / contents.hexdigest()[:32])


def _load_texts(name: str, split: str, cache_dir: str | None, streaming: bool) -> Dataset | IterableDataset:
    """Load a part that consists of .csv or .tsv files, every value as the text that the file has."""
    from datasets import Features, Value, load_dataset

    # By itself, pandas reads NA as null and 007 as 7. Only the files know the names of the columns.
    load = partial(load_dataset, name, split=split, na_filter=False, cache_dir=cache_dir, streaming=streaming)
    found = load()
    texts = Features(dict.fromkeys(found.column_names or next(iter(found)), Value("string")))
    return found if found.features == texts else load(features=texts)


def _decoded_records(data: Dataset | IterableDataset, place: str, promised: int | None = None) -> Records:
    """Yield the rows of a data set. Images and sound stay as they are stored: no row can use them.

    Args:
        data: The rows.
        place: Of a row, without its number.
        promised: Number of rows that the description of a stream names; None where it names none.

    Raises:
        DataError: A row cannot be read, or fewer rows came than were promised.
    """
    from datasets.exceptions import DatasetsError  # takes seconds to import, and text files do not need it
    from huggingface_hub.errors import HfHubHTTPError

    for name, feature in (data.features or {}).items():
        if hasattr(feature, "decode"):
            data = data.cast_column(name, type(feature)(decode=False))

    number, records = 1, iter(data)
    while True:
        try:
            record = next(records)
        except StopIteration:
            if promised is not None and number <= promised:
                raise DataError(
                    f"{place} {number}: the stream ends here, and its description has {promised} rows. Read it again, "
                    "or leave --streaming out, which downloads it first."
                ) from None
            return
        except (HfHubHTTPError, ConnectionError, TimeoutError, DatasetsError) as error:
            raise DataError(f"{place} {number}: cannot be read ({' '.join(str(error).split())[:300]}).") from error
        except (ImportError, OSError, ValueError, TypeError, NotImplementedError) as error:
            raise DataError(
                f"{place} {number}: cannot be decoded ({' '.join(str(error).split())[:300]}). Write the file again; "
                "columns of images or sound inside of others have to be removed."
            ) from error
        yield without_nulls(record), f"{place} {number}"
        number += 1


def _without_mark(record: dict[str, Any]) -> dict[str, Any]:
    """Remove the byte-order mark of a file, which `datasets` leaves in the first name or text of text files."""
    return {
        key.removeprefix(BYTE_ORDER_MARK): value.removeprefix(BYTE_ORDER_MARK) if isinstance(value, str) else value
        for key, value in record.items()
    }
