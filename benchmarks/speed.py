"""Speed of the exported files compared with other engines: `python -m benchmarks.speed RUN` writes docs/speed.md.

A round times every engine once, one after the other, with two threads and with one thread; each round starts with
another engine. Ratios compare figures of the same round, so that a longer disturbance affects both sides. Each finished
round is a JSON file in the work folder; an interrupted benchmark resumes with the next round.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks import bandwidth, cells
from benchmarks.cells import CellStore
from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError
from qat_edge.logs import quiet_libraries
from qat_edge.run import Run
from qat_edge.storage import write_text

if TYPE_CHECKING:
    from benchmarks.engines import Amounts, Engine

ROOT = Path(__file__).parents[1]
RESULT = "speed.json"


def main() -> None:
    """Time the exports of a finished run, llama.cpp and onnxruntime-genai, and write the report."""
    given = _parser().parse_args()
    quiet_libraries(verbose=False)
    from benchmarks import engines, speed_page  # they import torch

    try:
        result = given.work / RESULT
        if not given.page_only:
            amounts = engines.Amounts(given.prefill, given.decode, given.repeats)
            ready, reasons = engines.gather(Run.open(given.run), given.work)
            records = rounds(ready, CellStore(given.work / "cells"), amounts, given.rounds)
            found = {"engines": engines.engine_info(ready), "reasons": reasons, "rounds": records}
            write_text(result, json.dumps(found, indent=1) + "\n")
        progress.info(f"Wrote {speed_page.write(result, given.out)}")
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: finished rounds are kept. Run it again to resume.") from None


def rounds(engines: Sequence[Engine], store: CellStore, amounts: Amounts, count: int) -> list[dict[str, Any]]:
    """Return the records of the first `count` rounds; measure the missing ones."""
    from dataclasses import asdict

    settings = {"amounts": asdict(amounts), "engines": {engine.name: asdict(engine.info) for engine in engines}}
    return cells.rounds(store, "speed", settings, count, lambda index: one_round(engines, index, amounts))


def one_round(engines: Sequence[Engine], index: int, amounts: Amounts) -> dict[str, Any]:
    """Time every engine once with each number of threads; the round's index decides which one is first."""
    order = cells.in_turn(engines, index)
    # Cores that other programs keep busy, before anything of ours runs.
    others = psutil.cpu_percent(interval=1.0) / 100 * (os.cpu_count() or 1)
    rates: dict[str, float] = {}
    rows: list[Mapping[str, Any]] = []
    for threads in bandwidth.THREADS:
        rates[str(threads)] = bandwidth.measure(threads)
        rows += [engine.timed(threads, amounts) for engine in order]
    return {"others_busy_cores": others, "bytes_per_s": rates, "rows": rows}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=main.__doc__)
    parser.add_argument("run", type=Path, help="finished run with exports of both targets, such as runs/demo")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, 7 by default")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats in each process, 5 by default")
    parser.add_argument("--prefill", type=int, default=128, help="tokens of the prompt, 128 by default")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded after the prompt, 64 by default")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs" / "speed",
        help="folder for the other engines, their models and the finished rounds",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.md", help="report to write")
    parser.add_argument(
        "--page-only",
        "--document",
        action="store_true",
        help="measure nothing, write the report of the finished rounds",
    )
    return parser


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
