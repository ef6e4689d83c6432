"""Every format of one model in its own runtime: `python -m benchmarks.formats RUN` writes docs/formats.md.

Exact codes come from RUN/verified.json, which `qat-edge verify` writes. A round times all formats once, one after the
other with one thread, and begins with another one than the round before; each finished round is a JSON file in the work
folder. Ratios compare figures of the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import cells, engines, page
from benchmarks.cells import CellStore, publish
from benchmarks.engines import Amounts
from qat_edge import progress, readers
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError, RunError
from qat_edge.logs import quiet_libraries
from qat_edge.manifest import MANIFEST, library_version, read_manifest, sha256
from qat_edge.report.formatting import number
from qat_edge.run import Run
from qat_edge.storage import write_text

ROOT = Path(__file__).parents[1]
PREFILL, DECODE, REPEATS = 128, 64, 3
# Target -> name of the format, and the library that runs it.
FORMATS = {
    "executorch": ("`.pte`", "executorch"),
    "onnx": ("ONNX folder", "onnxruntime-genai"),
    "gguf": ("GGUF file", "xllamacpp"),
    "hf": ("Hugging Face folder", "transformers"),
}
ADAPTED = "ONNX folder with an adapter"
HEAD = ("format", "runtime", "MB", "exact", "error, dB", "prompt, tokens/s", "decoding, tokens/s", "of `.pte`")
INTRODUCTION = """# One model in every format

`python -m benchmarks.formats` writes this page from the JSON files of its rounds; no figure is typed by hand. \
The demo's model, SmolLM2-135M-Instruct trained with `--embedding-bits 8 --head-bits 4` so that every format can hold \
its rotation, is frozen once, and `qat-edge export` writes the same codes into every format. The adapter is trained \
next to the frozen weights of the same model without training (`quantize`, `finetune --frozen-base`).

*Exact* counts linear layers whose codes and scales, read back from the file, equal the frozen ones bit for bit; \
matrices of the adapter follow. *Error* compares what the runtime computes with the frozen checkpoint in torch; the \
number behind it is the noise floor, the checkpoint against itself with a disturbance of 1e-7. MB are those of the \
whole folder, tokenizer included. Speed is that of one thread: {decode} tokens after a prompt of {prefill}, the median \
of {rounds} rounds with minimum and maximum. Ratios compare figures of the same round.
"""


@dataclass(frozen=True)
class Format:
    """One artifact.

    Attributes:
        name: of the format.
        target: of the artifact.
        folder: of the artifact.
        library: that runs it, with its version.
        megabytes: of its folder.
        exact: what verify found equal, as text.
        error: decibels of parity and of the noise floor, as text.
        sha256: of its manifest.
    """

    name: str
    target: str
    folder: Path
    library: str
    megabytes: float
    exact: str
    error: str
    sha256: str


def main() -> None:
    """Time every exported format of a finished run, and of a run of adapters on it, and write the report."""
    given = _parser().parse_args()
    quiet_libraries(verbose=False)
    try:
        found = formats(Run.open(given.run))
        if given.adapters is not None:
            found += [each for each in formats(Run.open(given.adapters), ADAPTED) if each.target == "onnx"]
        records = rounds(found, CellStore(given.work / "cells", given.out.with_suffix(".json")), given.rounds)
        publish(records, given.out.with_suffix(".json"))
        write_text(given.out, text(found, records))
        progress.info(f"Wrote {given.out}")
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error


def formats(run: Run, name: str = "") -> list[Format]:
    """Return the run's own artifacts, with what `verify` found.

    Args:
        run: a run with exports that were verified.
        name: of all its formats; those of FORMATS where empty.

    Raises:
        RunError: an artifact was not verified since it was exported, or is not equal to its checkpoint.
    """
    results = {row["folder"]: row for row in readers.read_json(run.verified, RunError)}
    found = []
    for target in (target for target in FORMATS if (run.exports / target / MANIFEST).is_file()):
        folder = run.exports / target
        row = results.get(str(folder.relative_to(run.path)), {})
        if row.get("manifest_sha256") != sha256(folder / MANIFEST) or row.get("faults"):
            raise RunError(f"{folder}: not verified, or not equal. Run `qat-edge verify {run.path}`.")
        title, library = FORMATS[target]
        found.append(
            Format(
                name=name or title,
                target=target,
                folder=folder,
                library=f"{library} {library_version(library)}",
                megabytes=sum(size["bytes"] for size in read_manifest(folder)["files"].values()) / 1e6,
                exact=_exact(row),
                error=_error(row["parity"]),
                sha256=row["manifest_sha256"],
            )
        )
    return found


def _exact(row: Mapping[str, Any]) -> str:
    layers = f"{row['linears_equal']} of {row['linears']}"
    return f"{layers}, {row['adapter_equal']} of {row['adapter']}" if row["adapter"] else layers


def _error(parity: Mapping[str, Any]) -> str:
    if parity["error_db"] is None:
        return page.MISSING
    return f"{parity['error_db']:.0f} ({parity['noise_db']:.0f})"


def rounds(found: Sequence[Format], store: CellStore, count: int) -> list[dict[str, Any]]:
    """Return the records of the first `count` rounds; measure the missing ones."""
    amounts = Amounts(PREFILL, DECODE, REPEATS)
    settings = {"amounts": asdict(amounts), "formats": {each.name: each.sha256 for each in found}}

    def measure(index: int) -> dict[str, Any]:
        order = cells.in_turn(found, index)
        return {"rates": {each.name: engines.timed_artifact(each.target, each.folder, 1, amounts) for each in order}}

    return cells.rounds(store, "formats", settings, count, measure)


def text(found: Sequence[Format], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page."""
    measured = [record["figures"]["rates"] for record in records]
    rows = []
    for each in found:
        decode = [rates[each.name]["decode"] for rates in measured]
        ratios = [own / rates[found[0].name]["decode"] for own, rates in zip(decode, measured, strict=True)]
        rows.append([
            each.name, each.library, number(each.megabytes), each.exact, each.error,
            page.median_of([rates[each.name]["prefill"] for rates in measured]), page.median_of(decode),
            page.median_of(ratios),
        ])  # fmt: skip
    introduction = INTRODUCTION.format(decode=DECODE, prefill=PREFILL, rounds=len(records))
    provenance = page.table(("", ""), page.provenance(records))
    return "\n".join((introduction, page.table(HEAD, rows), "", provenance)) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=main.__doc__)
    parser.add_argument("run", type=Path, help="finished run whose exports were verified")
    parser.add_argument("--adapters", type=Path, help="run of adapters on that run, with a verified ONNX folder")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, 7 by default")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "formats", help="folder of the finished rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "formats.md", help="report to write")
    return parser


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
