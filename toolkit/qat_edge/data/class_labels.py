"""Names of labels that `datasets` stores as numbers.

A ClassLabel column holds indices into its list of names. Every data set orders the names in its own way, so an index
means nothing to a model whose labels are in another order: rows carry the name as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qat_edge.data.rows import NamedLabel
from qat_edge.errors import DataError
from qat_edge.readers import shorten, show

LABEL = "label"  # the column whose numbers may be needed too, for a model whose labels have no names
NO_LABEL = -1  # stands for a missing label in ClassLabel columns
SHOWN_NAMES = 20  # that a message lists

Records = Iterator[tuple[Any, str]]  # a row as parsed, and its file and line


def name_labels(records: Records, features: Mapping[str, Any]) -> Records:
    """Yield records with the names of their labels in place of the numbers.

    The label of a row becomes a `NamedLabel`, any other a string. A missing label is None.

    Args:
        records: Rows as parsed, each with its file and row.
        features: Of the data set, by column.

    Raises:
        DataError: A value is neither a name nor the number of one. The message names the row.
    """
    columns = {column: feature for column, feature in features.items() if _has_names(feature)}
    for record, where in records:
        # A line of a .jsonl file may be no object, which is reported later.
        for column in columns.keys() & record.keys() if isinstance(record, dict) else ():
            record[column] = _with_names(record[column], columns[column], column, where)
        yield record, where


def require_same_names(parts: Mapping[str, Sequence[str]], features: Mapping[str, Any]) -> None:
    """Refuse tables whose labels are numbered differently: `datasets` reads all numbers by the names of the first.

    Args:
        parts: Files of a data set, by part. Those other than .parquet and .arrow record no names.
        features: Of the data set, by column.

    Raises:
        DataError: Names the first file that differs.
    """
    from datasets import ClassLabel  # takes seconds to import, and text files do not need it

    files = [Path(file) for part in parts.values() for file in part]
    for path in filter(Path.is_file, files):  # what is inside of an archive is no path
        for column, feature in _own_features(path).items():
            used = features.get(column)
            if isinstance(feature, ClassLabel) and isinstance(used, ClassLabel) and feature.names != used.names:
                raise DataError(
                    f"{path}: '{column}' numbers its labels in the order {listed(feature.names)}; the data set has "
                    f"{listed(used.names)}. Write all files with one order, or train on one of them."
                )


def listed(names: Sequence[str]) -> str:
    """Return names of labels for a message."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(shorten(name) for name in names[:SHOWN_NAMES]) + more


def _own_features(path: Path) -> Mapping[str, Any]:
    """Return the features that a table records, by column; none for files other than tables."""
    import pyarrow as pa
    from datasets import Features
    from pyarrow import ipc, parquet

    if path.suffix.lower() == ".parquet":
        return Features.from_arrow_schema(parquet.read_schema(path))
    if path.suffix.lower() != ".arrow":
        return {}
    # The two formats of Arrow files, as `datasets` reads them.
    with pa.memory_map(str(path)) as source:
        try:
            return Features.from_arrow_schema(ipc.open_stream(source).schema)
        except pa.ArrowInvalid:
            return Features.from_arrow_schema(ipc.open_file(source).schema)


def _has_names(feature: Any) -> bool:
    from datasets import ClassLabel  # takes seconds to import, and text files do not need it

    if isinstance(feature, dict):
        return any(map(_has_names, feature.values()))
    return isinstance(feature, ClassLabel) or (_items(feature) is not None and _has_names(_items(feature)))


def _items(feature: Any) -> Any:
    """Return the feature of a list's items; None for other features."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _with_names(value: Any, feature: Any, key: str, where: str) -> Any:
    """Replace the numbers of labels in one value. key: its column, or its path inside of one."""
    from datasets import ClassLabel

    if value is None:
        return None
    if isinstance(feature, ClassLabel):
        found = _named(value, feature.names, key, where)
        return found.name if isinstance(found, NamedLabel) and key != LABEL else found
    if isinstance(feature, dict) and isinstance(value, dict):
        return {k: _with_names(v, feature.get(k), f"{key}.{k}", where) for k, v in value.items()}
    if isinstance(value, list) and _items(feature) is not None:
        return [_with_names(item, _items(feature), f"{key}[]", where) for item in value]
    return value


def _named(value: Any, names: list[str], key: str, where: str) -> Any:
    """Return a label with its name; None for a missing one, and the value itself where the numbers are the names."""
    # A text file, whose data set names the labels in its description, has either the name or the number. A name may
    # look like the number of another label.
    text = str(value).strip()
    if isinstance(value, str) and text in names:
        index = names.index(text)
    elif text.isdecimal() and int(text) < len(names):
        index = int(text)
    elif text in ("", str(NO_LABEL)):
        return None
    else:
        raise DataError(
            f"{where}: '{key}' is {show(value)}, which is neither a label of the data set ({listed(names)}) nor the "
            "number of one, from 0 on. Correct the row."
        )
    if names == [str(number) for number in range(len(names))]:
        return value
    return NamedLabel(index, tuple(names))
