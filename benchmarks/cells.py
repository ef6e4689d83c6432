"""Store of measurements: one JSON file per cell, so that an interrupted benchmark can be resumed.

A cell is one measured figure, or a few that are measured together. Its identity is everything that decides the
figures: after a changed setting it is another cell and is measured anew, while the old file stays unused. The cells
behind a report are stored next to it, one per line, so that a fresh checkout does not measure them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from qat_edge import progress
from qat_edge.errors import RunError
from qat_edge.manifest import LIBRARIES, git_revision, library_version
from qat_edge.storage import write_text
from qat_edge_devices import open_transport

FORMAT = 1
Item = TypeVar("Item")


@dataclass(frozen=True)
class Cell:
    """Identity of one measurement.

    Attributes:
        kind: type of measurement, such as "emulated".
        task: data set, empty where there is none.
        seed: random seed, or number of the round.
        name: name of the model in the tables.
        settings: everything else that decides the figures.
    """

    kind: str
    task: str
    seed: int
    name: str
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """Twelve hex digits that identify the cell."""
        return digest(asdict(self))

    @property
    def file_name(self) -> str:
        """File name: a readable beginning and a unique end."""
        parts = (self.kind, self.task, slug(self.name), f"seed{self.seed}", self.digest)
        return "-".join(part for part in parts if part) + ".json"

    @property
    def title(self) -> str:
        """Description for progress lines."""
        steps = f", {self.settings['steps']} steps" if "steps" in self.settings else ""
        return f"{self.kind}: {self.name}" + (f", {self.task}" if self.task else "") + f", seed {self.seed}{steps}"


@dataclass(frozen=True)
class CellStore:
    """Finished cells of a work folder and of an earlier report.

    Attributes:
        folder: one JSON file per cell; takes precedence over `published`.
        published: file that `publish` wrote, None for none.
    """

    folder: Path
    published: Path | None = None

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Return the figures of a finished cell, None where it has not been measured.

        Raises:
            RunError: the file is damaged.
        """
        record = self.record(cell)
        return None if record is None else dict(record["figures"])

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """Return figures, versions, machine, date and duration of a finished cell, None where it is missing.

        Raises:
            RunError: the file is damaged.
        """
        path = self.folder / cell.file_name
        if not path.is_file():
            return None if self.published is None else _published(self.published).get(cell.digest)
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT or record["cell"] != _plain(asdict(cell)):
                raise ValueError("it describes another cell")
            record["figures"].keys()  # fails where this is no table of figures
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: not a cell of this benchmark ({error}). Delete it to measure it again.") from error
        return record

    def put(self, cell: Cell, figures: dict[str, Any], wall_s: float, gpu: str = "") -> None:
        """Store the figures of a cell with versions, machine and date.

        Args:
            cell: identity of the measurement.
            figures: plain JSON values.
            wall_s: seconds that measuring took.
            gpu: name of the GPU, empty where none was used.
        """
        # The provenance is stored with every cell: the cells of one report may come from several days and machines.
        record = {
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
        write_text(self.folder / cell.file_name, json.dumps(record, indent=1, default=str) + "\n")


def rounds(
    store: CellStore, kind: str, settings: Mapping[str, Any], count: int, measure: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the records of the first rounds of a benchmark; measure the missing ones.

    Args:
        store: of finished rounds.
        kind: of the cells.
        settings: everything that decides the figures besides the round.
        count: number of rounds.
        measure: returns the figures of the round with a number, from 0 on.
    """
    records = []
    for index in range(count):
        cell = Cell(kind, "", index, "round", dict(settings))
        if store.get(cell) is None:
            progress.info(f"Round {index + 1} of {count}")
            began = time.monotonic()
            store.put(cell, measure(index), time.monotonic() - began)
        records.append(store.record(cell) or {})
    return records


def in_turn(items: Sequence[Item], index: int) -> list[Item]:
    """Return the items in the order of a round, which begins with another one than the round before."""
    first = index % max(len(items), 1)
    return [*items[first:], *items[:first]]


def publish(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the cells behind a report, one per line, so that a diff shows which were measured anew."""
    lines = [json.dumps(record, sort_keys=True, default=str) for record in records]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


@cache
def machine() -> str:
    """Return architecture, number of cores and CPU model of this machine, without its host name."""
    with closing(open_transport("local")) as transport:
        return f"{platform.machine()}, {os.cpu_count()} cores, {transport.info().cpu_model}"


@cache
def _published(path: Path) -> dict[str, dict[str, Any]]:
    """Records that `publish` wrote, by digest of the cell; empty where there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return {digest(record["cell"]): record for record in records if record["format"] == FORMAT}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not the cells of a report ({error}). Restore it from version control.") from error


def digest(value: Any) -> str:
    """Return twelve hex digits of the SHA-256 of a plain value; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:12]


def slug(title: str) -> str:
    """Return a title as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def _plain(value: Any) -> Any:
    """Return the value as JSON reads it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value, default=str))
