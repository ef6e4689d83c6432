"""Details of a run for the end of its page: options, machine, versions and artifacts, as names and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qat_edge.evaluate.encoder_results import EncoderReport
from qat_edge.evaluate.results import Measurement, Report
from qat_edge.report.collect import RunResults
from qat_edge.report.formatting import label, megabytes, number
from qat_edge.report.guard_details import guard_rows
from qat_edge.report.tables import MISSING, Table, TableCell, TableRow, number_cell

# Divisor and unit of a value, by the suffix of its name.
UNITS = {
    "_bytes": (1e6, "MB"),
    "_ms": (1, "ms"),
    "_s": (1, "s"),
    "_mb": (1, "MB"),
    "_ghz": (1, "GHz"),
    "_mhz": (1, "MHz"),
}


@dataclass(frozen=True)
class DetailList:
    """A titled list of names and values."""

    title: str
    rows: list[tuple[str, str]]


def report_details(report: Report) -> list[DetailList]:
    """Return the machine, the runtimes and the options of one report."""
    machine = [("device", report.device), ("measured", report.created), *flatten(report.machine)]
    lists = [
        DetailList("Machine", machine),
        DetailList("Runtimes", [(label(row), _runtime(row)) for row in report.measured]),
        DetailList("Options of validate", flatten(report.options)),
    ]
    return [item for item in lists if item.rows]


def encoder_details(comparison: EncoderReport) -> list[DetailList]:
    """Return the machine and the options of an encoder's measurement."""
    machine = [("device", comparison.device), ("measured", comparison.created), *flatten(comparison.machine)]
    return [DetailList("Machine", machine), DetailList("Options of validate", flatten(comparison.options))]


def provenance(results: RunResults) -> list[DetailList]:
    """Return identities, options and versions of everything that happened before the measurement."""
    # The manifest of the frozen checkpoint records model, data, scheme and versions.
    frozen = results.quantized
    scheme = frozen.get("scheme") or {}
    data = {"training": frozen.get("data"), "seed": frozen.get("seed")} if frozen else {}
    lists = [
        DetailList("Model", flatten(frozen.get("model") or {})),
        DetailList("Data", flatten(data)),
        DetailList("Quantization", flatten(scheme if isinstance(scheme, dict) else {})),
        DetailList("Options of finetune", flatten(results.options("finetune"))),
        DetailList("Guard of QAT", guard_rows(results.training or {})),
        DetailList("Options of export", flatten(results.options("export"))),
        DetailList("Versions that froze the checkpoint", flatten(versions(frozen))),
    ]
    return [item for item in lists if item.rows]


def versions(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions recorded in a manifest, by the name of the software; empty if the manifest is missing."""
    if not manifest:
        return {}
    names = {"qat-edge": "qat_edge", "git revision": "git_revision", "python": "python", "platform": "platform"}
    libraries = manifest.get("libraries") or {}
    return {
        **{name: manifest.get(key) for name, key in names.items()},
        **{name: version for name, version in libraries.items() if version is not None},
    }


def artifacts(results: RunResults) -> Table | None:
    """Return a table of the exported artifacts; None if there are none. An encoder's has no context length."""
    has_context = results.encoder is None
    rows = [
        TableRow(name, "ptq" if name.startswith("ptq/") else "qat", _artifact_cells(manifest, has_context))
        for name, manifest in results.exports.items()
    ]
    heads = [("Context", "tokens")] if has_context else []
    heads += [("Export time", "s"), ("Files", ""), ("Largest file", ""), ("SHA-256", "first 16 digits")]
    return Table("Exported artifacts", heads, rows, first="Folder") if rows else None


def _artifact_cells(manifest: Mapping[str, Any], has_context: bool) -> list[TableCell]:
    options, files = manifest.get("options") or {}, manifest.get("files") or {}
    # The largest file is the one that people copy, so its hash identifies the artifact.
    largest = max(files, key=lambda file: files[file]["bytes"], default="")
    return [
        *([number_cell(options.get("context_length"))] if has_context else []),
        number_cell(manifest.get("wall_s")),
        TableCell(str(len(files)), len(files)),
        TableCell(largest) if largest else MISSING,
        TableCell(str(files[largest].get("sha256", "–"))[:16]) if largest else MISSING,
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested values as pairs of name and text: {"data": {"rows": 3}} becomes ("data · rows", "3").

    A suffix of a name that is a unit (see `UNITS`) moves to the value: ("wall_s", 3.5) becomes ("wall", "3.50 s").
    """
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        # Nested sections keep their names as a prefix.
        if isinstance(value, Mapping):
            lines += flatten(value, f"{prefix}{key} · ")
            continue
        name, text = _name_and_text(str(key), value)
        lines.append((f"{prefix}{name}", text))
    return lines


def _runtime(row: Measurement) -> str:
    words = [row.runtime]
    if row.memory_bytes is not None:
        words.append(f"peak memory {megabytes(row.memory_bytes)} MB")
    if row.runtime_bytes is not None:
        words.append(f"of which {megabytes(row.runtime_bytes)} MB before the artifact was loaded")
    return ", ".join(words)


def _name_and_text(key: str, value: Any) -> tuple[str, str]:
    # A bool is an int in Python, so it comes first.
    if isinstance(value, bool):
        return key, "yes" if value else "no"
    if value is None:
        return key, "not set"
    if isinstance(value, int | float):
        # Names carry the unit as a suffix: "wall_s", "memory_bytes".
        for suffix, (divisor, unit) in UNITS.items():
            if key.endswith(suffix):
                return key.removesuffix(suffix), f"{number(value / divisor)} {unit}"
        return key, f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list | tuple):
        return key, ", ".join(map(str, value)) or "none"
    return key, str(value)
