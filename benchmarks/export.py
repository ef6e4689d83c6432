"""Time and peak memory of exporting to a .pte: `python -m benchmarks.export` measures them and writes docs/export.md.

The models are synthetic Llamas with random weights, rounded to nearest: exporting takes as long as for a trained model.
Sizes from 50 M to 1.5 B parameters show how memory grows with the weights; models of one width with 6 to 30 layers show
how time grows with depth. Each export runs in a process of its own, and each finished one is a JSON file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, CellStore, digest
from benchmarks.export_step import CONTEXT, GROUP_SIZE, MODELS, VOCABULARY, Shape
from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError
from qat_edge.manifest import sha256
from qat_edge.storage import work_folder, write_text

ROOT = Path(__file__).parents[1]
RESULT = "export.json"
KILLED = -9  # exit code of a process that the kernel ended for its memory
EXPORTER = "qat_edge_exporters.executorch.export_pte"


def main() -> None:
    """Export synthetic models of growing size, and write the report."""
    given = _parser().parse_args()
    from benchmarks import export_page

    try:
        result = given.work / RESULT
        if not given.page_only:
            records = measure_all(given.only or list(MODELS), given.work)
            write_text(result, json.dumps(records, indent=1) + "\n")
        progress.info(f"Wrote {export_page.write(result, given.out)}")
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: finished exports are kept. Run it again to resume.") from None


def measure_all(names: Sequence[str], work: Path) -> dict[str, Any]:
    """Return the record of every model that was exported with today's exporter code.

    Args:
        names: models out of MODELS to export now where they are missing.
        work: work folder with the finished cells.
    """
    store, found = CellStore(work / "cells"), {}
    for name, shape in MODELS.items():
        cell = _cell(shape)
        if name in names and store.get(cell) is None:
            progress.info(f"Exporting {name}: {shape.parameters / 1e6:.0f} M parameters in {shape.layers} layers")
            began = time.monotonic()
            figures = measure_export(shape, work)
            store.put(cell, figures, time.monotonic() - began)
        record = store.record(cell)
        if record is not None:
            found[name] = record
    return found


def measure_export(shape: Shape, work: Path) -> dict[str, Any]:
    """Return the figures of one export. The model is made in another process and deleted afterwards.

    Raises:
        QatEdgeError: a process failed; its last lines are quoted.
    """
    with work_folder(work, "export") as folder:
        checkpoint, out, result = folder / "checkpoint", folder / "out", folder / "result.json"
        for made in (checkpoint, out):
            made.mkdir()
        _step("make", str(shape.heads), str(shape.layers), str(checkpoint))
        _step("measure", str(checkpoint), str(out), str(result))
        figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return figures


def _step(*arguments: str) -> None:
    """Run one step of `benchmarks.export_step`, and quote the end of its output where it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = [sys.executable, "-m", "benchmarks.export_step", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(0)
        last_lines = " | ".join(log.read().splitlines()[-4:])
    if done.returncode != 0:
        killed = done.returncode == KILLED
        reason = "it was killed, probably because this machine has too little free memory" if killed else last_lines
        raise QatEdgeError(f"`export_step {' '.join(arguments[:3])}` ended with exit code {done.returncode}: {reason}")


def _cell(shape: Shape) -> Cell:
    """Identity of one export: the model, and the source of the exporter."""
    settings = {
        "heads": shape.heads, "layers": shape.layers, "vocabulary": VOCABULARY, "context": CONTEXT,
        "group_size": GROUP_SIZE, "exporter": digest([sha256(source) for source in _sources()]),
    }  # fmt: skip
    return Cell("export", "", 0, f"{shape.parameters / 1e6:.0f}M", settings)


@cache
def _sources() -> list[Path]:
    """Source files of the exporter that an export imports; the encoder's is imported, but never runs here."""
    import_module(EXPORTER)
    modules = {name: module for name, module in sys.modules.items() if name.startswith(EXPORTER.partition(".")[0])}
    return [Path(str(modules[name].__file__)) for name in sorted(modules) if not name.endswith(".encoder")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=main.__doc__)
    parser.add_argument(
        "--only", choices=list(MODELS), action="append", help="export this model; repeat for several; all by default"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "export", help="work folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "export.md", help="report to write")
    parser.add_argument(
        "--page-only",
        "--document",
        action="store_true",
        help="export nothing, write the report of the finished exports",
    )
    return parser


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
