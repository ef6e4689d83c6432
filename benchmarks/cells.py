"""One measured figure, or a few that belong together, as one JSON file: what makes the benchmark resumable.

A cell is known by everything that decides its figures. A changed setting is another cell, measured anew; the old file
stays where it is and is read by nobody. The cells behind a report lie beside it, one a line, so that whoever checks
the report out goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from qat_edge.errors import RunError
from qat_edge.run import LIBRARIES, git_revision, library_version, write_text
from qat_edge_devices import open_transport

FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """What is measured. kind: which measurement; name: of the model in the tables; settings: what else decides it."""

    kind: str
    task: str
    seed: int
    name: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """Twelve hex digits that differ where anything differs."""
        return digest(asdict(self))

    @property
    def file_name(self) -> str:
        """Readable at the front, unique at the end."""
        parts = (self.kind, self.task, slug(self.name), f"seed{self.seed}", self.digest)
        return "-".join(part for part in parts if part) + ".json"

    @property
    def title(self) -> str:
        """One cell in words, for progress lines."""
        steps = f", {self.settings['steps']} steps" if "steps" in self.settings else ""
        return f"{self.kind}: {self.name}" + (f", {self.task}" if self.task else "") + f", seed {self.seed}{steps}"


@dataclass(frozen=True)
class CellStore:
    """The finished cells of a work folder, and those of a report that was written earlier.

    published: what `publish` wrote, None for none; the work folder's own come first.
    """

    folder: Path
    published: Path | None = None

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Figures of a finished cell, None where it has not been measured.

        Raises:
            RunError: the file is damaged.
        """
        document = self.document(cell)
        return None if document is None else dict(document["figures"])

    def document(self, cell: Cell) -> dict[str, Any] | None:
        """All that is recorded about a finished cell: figures, versions, machine, date, seconds it took."""
        path = self.folder / cell.file_name
        if not path.is_file():
            return None if self.published is None else _published(self.published).get(cell.digest)
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT or document["cell"] != _plain(asdict(cell)):
                raise ValueError("it describes another cell")
            document["figures"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: no cell of this benchmark ({error}). Remove it; it is measured again.") from error
        return document

    def put(self, cell: Cell, figures: dict[str, Any], wall_s: float, gpu: str = "") -> None:
        """Keep the figures of a cell, with what they were measured under. gpu: its name, where one was used."""
        document = {
            "format": FORMAT,
            "cell": asdict(cell),
            "figures": figures,
            "wall_s": round(wall_s, 1),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{gpu}, {machine()}" if gpu else machine(),
            "python": platform.python_version(),
            "libraries": {name: library_version(name) for name in LIBRARIES},
            "git_revision": git_revision(),
        }
        write_text(self.folder / cell.file_name, json.dumps(document, indent=1, default=str) + "\n")


def publish(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the cells behind a report, one a line, so that a later version shows what was measured anew."""
    lines = [json.dumps(document, sort_keys=True, default=str) for document in documents]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


@cache
def machine() -> str:
    """The kind of machine, without its name."""
    with closing(open_transport("local")) as transport:
        return f"{platform.machine()}, {os.cpu_count()} cores, {transport.info().cpu_model}"


@cache
def _published(path: Path) -> dict[str, dict[str, Any]]:
    """What `publish` wrote, by the cells' digests; empty where there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        documents = json.loads(path.read_text(encoding="utf-8"))
        return {digest(document["cell"]): document for document in documents if document["format"] == FORMAT}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not the cells of a report ({error}). Restore it from version control.") from error


def digest(value: Any) -> str:
    """Twelve hex digits of a plain value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:12]


def slug(words: str) -> str:
    """Words as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value, default=str))
