"""Names of models and files in options, manifests and other documents, on every system.

A run that was made on Windows may be read on Linux, and the other way round, so both kinds of path are known on both.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def is_path(name: str) -> bool:
    """Return whether a name was meant as a path on a disk: as an id on the Hub, it would be "organization/model"."""
    return name.startswith((".", "/", "~")) or "\\" in name or DRIVE.match(name) is not None


def short_name(name: str) -> str:
    """Return a model's name for reports: of a path its last part, of an id on the Hub all of it."""
    if is_path(name) or name.count("/") > 1:
        return PureWindowsPath(name).name  # which knows both separators
    return name


def is_inside(name: str) -> bool:
    """Return whether a name in a document leads to a file below the folder that it is about, on any system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return "\0" not in name and not any(path.anchor or ".." in path.parts for path in paths)
