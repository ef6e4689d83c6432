"""Parts that all benchmark reports share: Markdown tables, figures with their range, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from qat_edge.manifest import LIBRARIES
from qat_edge.report.formatting import duration, markdown_table, number

MISSING = "not measured"
NONE_SHOWN = "no difference shown"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; `|` within a cell is escaped."""
    first, *others = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    return markdown_table(first, others)


def counted_seeds(seeds: Sequence[int]) -> str:
    """Return the number of seeds for a sentence."""
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def median_of(values: Sequence[float], write: Callable[[float], str] = number) -> str:
    """Return median and range, such as `166 (158 to 171)`; `not measured` where there is no value."""
    if not values:
        return MISSING
    if len(values) == 1:
        return write(values[0])
    return f"{write(median(values))} ({write(min(values))} to {write(max(values))})"


def provenance(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return table rows with the dates, machines and versions of finished cells."""
    days = sorted({record["created"][:10] for record in records})
    libraries = _versions(records)
    return [
        ("cells", f"{len(records)} in {duration(sum(record['wall_s'] for record in records))}"),
        ("dates", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"),
        ("machines", "; ".join(sorted({record["machine"] for record in records}))),
        ("revisions", ", ".join(sorted({_revision(record["git_revision"]) for record in records}))),
        ("libraries", ", ".join(f"{name} {' or '.join(found)}" for name, found in libraries.items())),
    ]


def _revision(described: str | None) -> str:
    """Shortened commit, and a remark where the checkout had local changes."""
    if described is None:
        return "unknown"
    return described[:12] + (" with local changes" if described.endswith("-dirty") else "")


def _versions(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Versions by library, in the order of LIBRARIES; the order in a stored record means nothing."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in {"Python": record["python"], **record["libraries"]}.items():
            if version is not None:
                found.setdefault(name, set()).add(version)
    order = ["Python", *LIBRARIES]
    known = [name for name in order if name in found]
    others = sorted(found.keys() - set(order))
    return {name: sorted(found[name]) for name in (*known, *others)}
