"""Check whether named runtimes have every operator and backend of a program.

known_runtimes.toml lists those of apps, with their sources. The Python wheel's are those registered in the installed
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.manifest import library_version
from qat_edge_exporters.executorch.pte.program_info import ProgramInfo, RuntimeCheck
from qat_edge_exporters.executorch.runtime_probe import Probed

TABLE = Path(__file__).parent / "known_runtimes.toml"
WHEEL = "python-wheel"


def check_runtimes(program: ProgramInfo, names: Sequence[str], probed: Probed | None) -> list[RuntimeCheck]:
    """Check `program` against each runtime.

    Args:
        program: contents of the .pte.
        names: runtimes of the table, or WHEEL.
        probed: result of loading the program in the installed runtime; needed for WHEEL only.
    """
    table = readers.read_toml(TABLE, ArtifactError)
    checks = []
    for name in names:
        if name == WHEEL:
            assert probed is not None, f"{WHEEL} is checked by what runtime_probe found"
            checks.append(_check_wheel(program, probed))
        else:
            checks.append(_check_listed(program, name, table))
    return checks


def _check_wheel(program: ProgramInfo, probed: Probed) -> RuntimeCheck:
    title = f"executorch {library_version('executorch')} in this environment, with its two operator libraries"
    # Nothing is known of a runtime that crashed before it listed its operators.
    crashed = not probed["operators"]
    missing = _Missing([], []) if crashed else _missing(program, probed["operators"], probed["backends"])
    return RuntimeCheck(
        runtime=WHEEL,
        title=title,
        source="its registered operators and backends, and loading the file",
        missing_operators=missing.operators,
        missing_backends=missing.backends,
        tried=True,
        error=probed["error"],
    )


def _check_listed(program: ProgramInfo, name: str, table: dict[str, Any]) -> RuntimeCheck:
    runtime = table["runtimes"][name]
    # A runtime is built with libraries of operators, listed once for all runtimes.
    operators = [op for library in runtime["libraries"] for op in table["libraries"][library]["operators"]]
    missing = _missing(program, operators, runtime["backends"])
    return RuntimeCheck(
        runtime=name,
        title=f"{runtime['title']}, {table['version']}",
        source=runtime["source"],
        missing_operators=missing.operators,
        missing_backends=missing.backends,
    )


class _Missing(NamedTuple):
    operators: list[str]
    backends: list[str]


def _missing(program: ProgramInfo, operators: Iterable[str], backends: Iterable[str]) -> _Missing:
    """Return what the program uses and a runtime lacks, sorted."""
    return _Missing(sorted(set(program.operators) - set(operators)), sorted(set(program.delegates) - set(backends)))
