"""Runtimes by name, and whether each has every operator and backend of a program.

known_runtimes.toml holds those of apps, with their sources. The Python wheel's are asked of the one that is installed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat_edge.run import library_version
from qat_edge_exporters.executorch.pte.program_info import Check, Program

TABLE = Path(__file__).parent / "known_runtimes.toml"
WHEEL = "python-wheel"


def check(program: Program, names: Sequence[str], probed: dict[str, Any]) -> list[Check]:
    """One verdict for each of `names`; `probed` is what `probe.ask` said of the installed runtime."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [_wheel(program, probed) if name == WHEEL else _listed(program, name, table) for name in names]


def _wheel(program: Program, probed: dict[str, Any]) -> Check:
    title = f"executorch {library_version('executorch')} in this environment, with its two operator libraries"
    missing = _missing(program, probed["operators"], probed["backends"]) if probed["operators"] else ([], [])
    source = "its registered operators and backends, and loading the file"
    return Check(WHEEL, title, source, *missing, tried=True, error=probed["error"])


def _listed(program: Program, name: str, table: dict[str, Any]) -> Check:
    runtime = table["runtimes"][name]
    operators = [op for library in runtime["libraries"] for op in table["libraries"][library]["operators"]]
    missing = _missing(program, operators, runtime["backends"])
    return Check(name, f"{runtime['title']}, {table['version']}", runtime["source"], *missing)


def _missing(program: Program, operators: Sequence[str], backends: Sequence[str]) -> tuple[list[str], list[str]]:
    return sorted(set(program.operators) - set(operators)), sorted(set(program.delegates) - set(backends))
