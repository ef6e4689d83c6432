"""Options that name files: absolute in a run's config.yaml, so that it can be used from any working directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from qat_edge.errors import DataError

Options = TypeVar("Options")
# Options whose value is a path, or may be one: models and data sets may also be names on the Hub.
PATH_OPTIONS = (
    "model",
    "data",
    "eval_data",
    "bits",
    "frozen_base",
    "calibration_data",
    "text",
    "profile",
    "ssh_config",
    "runner_binary",
    "schema",
)
NO_PATHS = {"schema": "tools"}  # a value that is no path, even where there is a file of that name
# Those that name neither a model nor rows, with what they name.
NO_DATA = {
    "bits": "a file",
    "frozen_base": "a run folder",
    "profile": "a profile or a .toml file",
    "ssh_config": "a file",
    "runner_binary": "a file",
    "schema": "a file, or tools",
}


def absolute(options: Options) -> Options:
    """Return options with absolute paths in the place of relative ones; names on the Hub stay as they are."""
    record: Any = options
    found = {name: _absolute(value) for name, value in _paths(record)}
    return dataclasses.replace(record, **found)


def missing(options: Any) -> list[tuple[str, str]]:
    """Return name and value of the options that are paths to something that is not there."""
    return [(name, value) for name, value in _paths(options) if is_gone(value)]


def is_gone(value: str | None) -> bool:
    """Return whether a recorded value is the path of a file or folder that is not there any more."""
    return value is not None and Path(value).is_absolute() and _local(value) is None


def same(one: Any, other: Any) -> bool:
    """Return whether two values of an option are equal, or two spellings of one path."""
    if one == other:
        return True
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    here, there = _local(one), _local(other)
    return here is not None and there is not None and here[1] == there[1] and here[0].samefile(there[0])


def require_data(source: str, flag: str | None) -> None:
    """Require that rows which an earlier command read are where they were.

    Args:
        source: Recorded path, or name on the Hub.
        flag: Flag of the present command that names another place; None where it has none.

    Raises:
        DataError: They are not.
    """
    if is_gone(source):
        place = f"give its new place: {flag} FILE" if flag else "put a link to its new place there"
        raise DataError(f"{source}: no such file or folder; finetune read it there. Restore it, or {place}.")


def _paths(options: Any) -> Iterator[tuple[str, str]]:
    """Yield name and value of the options that may be paths and are given."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in PATH_OPTIONS and isinstance(value, str) and value != NO_PATHS.get(field.name):
            yield field.name, value


def _absolute(value: str) -> str:
    found = _local(value)
    if found is None:
        return value
    path, part = found
    return f"{Path.cwd() / path}{part}"


def _local(value: str) -> tuple[Path, str] | None:
    """Return path and ":PART" of a value that is on this disk, None for any other."""
    # NAME:PART is a part of a folder, unless the whole is the name of a file or folder.
    name, colon, part = value.rpartition(":")
    for text, rest in ((value, ""), (name, f":{part}")):
        path = Path(text).expanduser()
        if text and path.exists() and (not rest or (colon and path.is_dir())):
            return path, rest
    return None
