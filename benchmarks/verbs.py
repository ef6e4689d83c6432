"""Time and memory of every command on SmolLM2-135M: `python -m benchmarks.verbs` writes docs/verbs.md.

The commands are those of `qat-edge demo`, and doctor, plan and sensitivity, one after the other in a process each, on
the demo's data. The parts of a command are what it reports to the terminal: the time before a line of a progress bar
belongs to that bar, any other time to the line before it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks import page
from benchmarks.cells import Cell, CellStore, publish
from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.demo_data import assistant
from qat_edge.errors import QatEdgeError, RunError
from qat_edge.models.demo_model import fetch_demo_model
from qat_edge.models.wheels import cache_folder
from qat_edge.peak_memory import wait_for
from qat_edge.python_process import python_command
from qat_edge.readers import counted, shorten
from qat_edge.report.formatting import duration
from qat_edge.storage import write_text
from qat_edge.verbs.demo import FINETUNE, QUESTION, VALIDATE
from qat_edge_devices.agent.machine import allowed_cpus

ROOT = Path(__file__).parents[1]
PAGE, PUBLISHED = ROOT / "docs/verbs.md", ROOT / "docs/verbs.json"
SHOWN = 3  # largest parts of a command
LABEL = 48  # characters of a part's name
START = "start and imports"
_BAR = re.compile(r"^\s*(?P<title>.*?)\s+\d+/\d+(\s|$)")


class Line(NamedTuple):
    """A line that a command printed, and the seconds since its start."""

    at_s: float
    text: str


def main() -> None:
    """Run every command once, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verbs", description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/verbs"), help="folder of the run and of finished cells")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is measured already")
    given = parser.parse_args()
    store = CellStore(given.work / "cells", PUBLISHED)
    try:
        with progress.report_to(ConsoleReporter()):
            records = [record for record in measured(given.work, store, given.page_only) if record]
        if not records:
            raise RunError(f"No command was measured on {counted(len(allowed_cpus()), 'core')}. Leave --page-only out.")
        publish(records, PUBLISHED)
        write_text(PAGE, page_of(records))
        print(f"Wrote {PAGE}")
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error


def commands(work: Path) -> dict[str, list[str]]:
    """Return all commands by title, in the order in which they need each other."""
    train, held_out = assistant.write(work / "data")
    model, run = fetch_demo_model(cache_folder()), str(work / "run")
    exports = work / "run/exports"
    data = ["--data", str(train), "--eval-data", str(held_out)]
    return {
        "plan": ["plan", model],
        "finetune": ["finetune", "--model", model, *data, *FINETUNE, "--out", run, "--force"],
        "export, ExecuTorch": ["export", run, "--target", "executorch"],
        "export, ONNX": ["export", run, "--target", "onnx"],
        "verify": ["verify", run],
        "doctor, ExecuTorch": ["doctor", str(exports / "executorch"), "--runtime", "python-wheel"],
        "doctor, ONNX": ["doctor", str(exports / "onnx"), "--runtime", "onnxruntime"],
        "validate": ["validate", run, *VALIDATE],
        "sensitivity": ["sensitivity", run, "--force"],
        "report": ["report", run],
        "generate": ["generate", run, "--from", "executorch", "--system", assistant.SYSTEM, QUESTION],
    }


def measured(work: Path, store: CellStore, page_only: bool) -> Iterable[dict[str, Any] | None]:
    """Yield the record of every command; measure those that are missing, unless `page_only`.

    Raises:
        RunError: A command failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    for title, arguments in commands(work).items():
        flags = [argument for argument in arguments if argument.startswith("--")]
        cell = Cell("verb", "", 0, title, {"flags": flags, "cores": len(allowed_cpus())})
        if store.get(cell) is None and not page_only:
            progress.info(f"qat-edge {title}")
            began = time.monotonic()
            store.put(cell, measure(arguments, work), time.monotonic() - began)
        yield store.record(cell)


def measure(arguments: Sequence[str], work: Path) -> dict[str, Any]:
    """Run one command; return its time, its peak memory and its parts.

    Args:
        arguments: Of qat-edge.
        work: Gets log.txt, which has what the command prints on stderr. Parts are named without this folder.

    Raises:
        RunError: It failed.
    """
    began, lines = time.monotonic(), []

    def read(stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(errors="replace").rstrip().replace(f"{work.resolve()}/", "")
            lines.append(Line(time.monotonic() - began, text))

    process = subprocess.Popen(
        python_command("qat_edge", *arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    reader = threading.Thread(target=read, args=(process.stderr,))
    reader.start()
    peak_bytes = wait_for(process)
    wall_s = time.monotonic() - began
    reader.join()
    log = work / "log.txt"
    write_text(log, "\n".join(f"{line.at_s:8.2f} {line.text}" for line in lines) + "\n")
    if process.returncode != 0:
        raise RunError(f"qat-edge {' '.join(arguments)} ended with exit code {process.returncode}; see {log}.")
    return {"wall_s": wall_s, "peak_bytes": peak_bytes, "parts": parts_of(lines, wall_s)}


def parts_of(lines: Sequence[Line], wall_s: float) -> dict[str, float]:
    """Return the seconds of each part of a command."""
    parts: dict[str, float] = {}
    label, last_s = START, 0.0
    for line in [*(line for line in lines if line.text.strip()), Line(wall_s, "")]:
        bar = _BAR.match(line.text)
        owner = bar["title"] if bar else label
        parts[owner] = parts.get(owner, 0.0) + line.at_s - last_s
        label, last_s = owner if bar else shorten(line.text.strip(), LABEL), line.at_s
    return parts


def page_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    rows, cores = [], counted(records[0]["cell"]["settings"]["cores"], "core")
    for record in records:
        figures = record["figures"]
        largest = sorted(figures["parts"].items(), key=lambda part: -part[1])[:SHOWN]
        rows.append((
            record["cell"]["name"], duration(figures["wall_s"]), f"{figures['peak_bytes'] / 1e9:.2f}",
            "; ".join(f"{name} {duration(seconds)}" for name, seconds in largest),
        ))  # fmt: skip
    return "\n".join([
        "# Time and memory of the commands",
        "",
        "`python -m benchmarks.verbs` writes this page; no figure is typed by hand. The model is "
        "SmolLM2-135M-Instruct, with the data and the flags of `make demo`. Each command runs once, in a process of "
        f"its own, on {cores}. *Memory* is the peak of its largest process. The parts are what a command reports while "
        "it runs; the three that take most time are listed. Other programs may have used the machine's other cores: "
        "the times are for finding what is slow, not for comparing machines.",
        "",
        page.table(("", ""), page.provenance(records)),
        "",
        page.table(("command", "time", "memory, GB", "largest parts"), rows),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
