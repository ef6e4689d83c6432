"""What the benchmarks' reports have in common: tables, figures with their spread, what was run where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from qat_edge.report.figures import duration, number

MISSING = "not measured"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first words are aligned by the reader's renderer."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def median_of(values: Sequence[float], write: Callable[[float], str] = number) -> str:
    """`166 (158 to 171)`: the median with the least and the greatest; `not measured` of nothing."""
    if not values:
        return MISSING
    if len(values) == 1:
        return write(values[0])
    return f"{write(median(values))} ({write(min(values))} to {write(max(values))})"


def provenance(documents: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """When, where and with what finished cells were measured, as rows of a table."""
    days = sorted({document["created"][:10] for document in documents})
    libraries = _versions(documents)
    return [
        ("cells", f"{len(documents)} in {duration(sum(d['wall_s'] for d in documents))}"),
        ("dates", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"),
        ("machines", "; ".join(sorted({document["machine"] for document in documents}))),
        ("revisions", ", ".join(sorted({_revision(document["git_revision"]) for document in documents}))),
        ("libraries", ", ".join(f"{name} {' or '.join(found)}" for name, found in libraries.items())),
    ]


def _revision(described: str | None) -> str:
    """The commit, shortened, and whether the checkout had changes of its own."""
    if described is None:
        return "unknown"
    return described[:12] + (" with local changes" if described.endswith("-dirty") else "")


def _versions(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for document in documents:
        for name, version in {"Python": document["python"], **document["libraries"]}.items():
            if version is not None:
                found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in found.items()}
