"""Check a folder of data before `datasets` reads it: no file outside of it is read, and none in it is left out.

`datasets` takes the files of a folder from its description (README.md), from the record of `save_to_disk`, or else from
their names: train.jsonl is the part "train". Files whose names say nothing are then left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qat_edge.errors import DataError
from qat_edge.path_names import is_inside
from qat_edge.readers import read_object, read_yaml, shorten, show, texts_in

SAVED_PART, SAVED_PARTS = "state.json", "dataset_dict.json"  # the records of `save_to_disk`
# Suffixes of files with rows, also below that of a compressed file; and of archives and tables that may have rows.
ROW_SUFFIXES = frozenset(
    {
        ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt",
        ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar",
        ".xlsx", ".xls", ".ods", ".feather", ".orc", ".avro", ".pkl", ".pickle", ".h5", ".hdf5", ".sqlite", ".db",
        ".npy", ".npz", ".xml",
    }
)  # fmt: skip
EVAL_NAME = re.compile(r"(^|[-._ 0-9])eval(uation)?([-._ 0-9]|$)")  # which `datasets` counts among "test"
SHOWN_FILES = 5  # that a message names


def require_own_files(folder: Path) -> bool:
    """Refuse a folder whose description or record names data files elsewhere, before they are read or requested.

    Returns:
        Whether the description names the files of the folder, so that their names mean nothing.

    Raises:
        DataError: Names the entry.
    """
    described = _description(folder)
    for configurations in described:
        for entry in texts_in(configurations):
            _require_inside(entry, folder, "the description of the data set (README.md or .huggingface.yaml)")
    _check_saved(folder)
    return any(
        isinstance(entry, dict) and not entry.keys().isdisjoint(("data_files", "data_dir"))
        for configurations in described
        for entry in (configurations if isinstance(configurations, list) else ())
    )


def _description(folder: Path) -> list[Any]:
    """Return the entries 'configs' of the files that describe a data set.

    Raises:
        DataError: Their YAML cannot be read.
    """
    import datasets  # takes seconds to import, and text files do not need it

    card, settings = folder / datasets.config.REPOCARD_FILENAME, folder / datasets.config.REPOYAML_FILENAME
    try:
        documents = [datasets.load.DatasetCard.load(card).data.to_dict()] if card.is_file() else []
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"{card}: its YAML cannot be read ({shorten(' '.join(str(error).split()))}).") from error
    if settings.is_file():
        documents.append(read_yaml(settings, DataError))
    return [document.get("configs") for document in documents if isinstance(document, dict)]


def _check_saved(folder: Path) -> None:
    """Check the records of a data set that `save_to_disk` wrote: the names of its parts, and of their files.

    Raises:
        DataError: A record is damaged, or names files outside of the folder.
    """
    parts = [folder]
    if (folder / SAVED_PARTS).is_file():
        names = read_object(folder / SAVED_PARTS, DataError).get("splits")
        parts += [folder / name for name in _names(names, folder / SAVED_PARTS)]
    for part in parts:
        if (part / SAVED_PART).is_file():
            files = read_object(part / SAVED_PART, DataError).get("_data_files")
            names = [file.get("filename") if isinstance(file, dict) else None for file in _list(files)]
            _names(names if isinstance(files, list) else None, part / SAVED_PART)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _names(value: Any, record: Path) -> list[str]:
    """Return the names of files or folders in a record of `save_to_disk`.

    Raises:
        DataError: They are no names, or lead out of the folder of the record.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise DataError(f"{record}: damaged: it does not list the names of the data. Save the data set again.")
    for name in value:
        _require_inside(name, record.parent, record.name)
    return value


def _require_inside(entry: str, folder: Path, record: str) -> None:
    """Refuse the name of data outside of a folder.

    Raises:
        DataError: Names the entry.
    """
    if "://" in entry or "::" in entry or not is_inside(entry):
        raise DataError(
            f"{folder}: {record} names data outside of the folder, {show(entry)}. Put the files into the folder, or "
            "remove the entry."
        )


# --- files by their names ----------------------------------------------------------------------------------


def part_by_name(folder: Path, parts: Mapping[str, Sequence[str]], part: str) -> str:
    """Check that the parts of a folder hold all its rows, and return the one to read where `part` is requested.

    Args:
        folder: Without a description that names its files.
        parts: Their files, as `datasets` found them.
        part: Requested; files named eval are in `datasets`' part "test".

    Raises:
        DataError: Files would be left out, or "test" has files named eval and others. Names the files.
    """
    root = folder.resolve()
    relative = {name: [Path(file).relative_to(root) for file in files] for name, files in parts.items()}
    _require_all_used(folder, relative)
    if part not in ("eval", "test") or "eval" in parts or "test" not in parts:
        return part
    files = relative["test"]
    named = [file for file in files if any(EVAL_NAME.search(name) for name in file.parts)]
    if named and len(named) < len(files):
        raise DataError(
            f"{folder}: {_shown(sorted(files))} are one part, 'test', because files named eval are counted among it. "
            "Give the file itself, or move the others out of the folder."
        )
    return "test" if named else part


def _require_all_used(folder: Path, parts: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a folder with files of rows that are in none of its parts.

    Raises:
        DataError: Names the files.
    """
    import datasets  # takes seconds to import, and text files do not need it

    ignored = {path for files in parts.values() for path in files}
    root, left_out = folder.resolve(), []
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        hidden = any(name.startswith((".", "__")) for name in inner.parts)
        if hidden or inner in ignored or path.name in datasets.data_files.FILES_TO_IGNORE or not path.is_file():
            continue
        if not ROW_SUFFIXES.isdisjoint(suffix.lower() for suffix in path.suffixes):
            left_out.append(inner)
    if left_out:
        found = "; ".join(f"'{name}' is {_shown(files)}" for name, files in parts.items())
        raise DataError(
            f"{folder}: {_shown(left_out)} would not be read, because the parts of a folder come from the names of its "
            f"files: {found}. Move the others out of the folder, join them with a part by their names (train-2.jsonl), "
            "or give one file."
        )


def _shown(paths: Sequence[Path]) -> str:
    """Return the first names of files for a message."""
    more = f" and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else ""
    return ", ".join(shorten(str(path)) for path in paths[:SHOWN_FILES]) + more
