"""Paragraphs for errors that no code of ours expects: a resource that ran out, or a bug."""

from __future__ import annotations

import platform
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from qat_edge import __version__
from qat_edge.manifest import LIBRARIES, library_version
from qat_edge.peak_memory import is_out_of_memory
from qat_edge.storage import REMEDIES

EX_SOFTWARE = 70  # sysexits.h: an internal software error


def describe_known(error: BaseException) -> str | None:
    """Return a paragraph for a resource that ran out or a path that cannot be used; None for any other error."""
    if is_out_of_memory(error):
        return (
            "Out of memory. Choose a smaller --batch-size or --max-length, or --gradient-checkpointing or --base nf4, "
            "where the command has them, or close other programs."
        )
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}. {REMEDIES[error.errno]}"
    return None


def report_bug(error: BaseException) -> str:
    """Write the traceback of an unexpected error to a file and return the paragraph that names it."""
    head = f"qat-edge {__version__} failed in a way it does not expect: {_summary(error)}."
    try:
        path = _write(error)
    except OSError as cause:
        traceback.print_exception(error)
        return f"{head} Please report it with the traceback above (no file could be written: {cause})."
    return (
        f"{head} Please report it with the file {path}, which has the command, the versions and the traceback. Read it "
        f"first: paths and values of yours may be in it. Platform: {platform.platform()}, Python "
        f"{platform.python_version()}. Command: {_command()}"
    )


def _write(error: BaseException) -> Path:
    """Write the report into the folder for temporary files."""
    versions = [f"{name} {library_version(name)}" for name in LIBRARIES]
    lines = [
        f"qat-edge {__version__}",
        f"command: {_command()}",
        f"platform: {platform.platform()}",
        f"python: {platform.python_version()}",
        f"libraries: {', '.join(versions)}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    with tempfile.NamedTemporaryFile(
        "w", prefix="qat-edge-bug-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write("\n".join(lines))
    return Path(file.name)


def _command() -> str:
    return f"qat-edge {shlex.join(sys.argv[1:])}"[:1000]


def _summary(error: BaseException) -> str:
    """Return class and message of an error on one short line."""
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
