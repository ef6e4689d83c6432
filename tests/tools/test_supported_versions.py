"""The supported versions of Python: the same in pyproject.toml, the Makefile, the checks and the documentation."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = [f"3.{minor}" for minor in range(8, 20) if SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}")]
MAKE = shutil.which("make")
STUB = '#!/bin/sh\n[ "$1" = -c ] && exec "{real}" -c "import sys; sys.version_info = ({version}, 0); $2"\n'
needs_make = pytest.mark.skipif(MAKE is None or sys.platform == "win32", reason="needs make and a POSIX shell")


def test_pages_and_checks_name_the_supported_versions() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["checks"]["strategy"]["matrix"]
    assert matrix["python"] == VERSIONS
    assert {system.partition("-")[0] for system in matrix["system"]} == {"ubuntu", "macos", "windows"}

    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert f"Python {VERSIONS[0]} to {VERSIONS[-1]}" in page


def test_the_workflow_checks_what_make_does() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    commands = "\n".join(step.get("run", "") for step in workflow["jobs"]["checks"]["steps"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    platforms = re.search(r"^PLATFORMS := (.*)$", makefile, re.MULTILINE)
    assert platforms is not None and f"for platform in {platforms[1]}; do" in commands
    for line in ("ruff check .", "ruff format --check .", "mkdocs build --quiet --strict", "pytest -n logical"):
        assert line in commands and line in makefile, line


@needs_make
@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ({"python3.11": "3, 11", "python3.14": "3, 14"}, "python3.11"),
        ({"python3.10": "3, 10", "python3.13": "3, 13"}, "python3.13"),
        ({"python3": "3, 12", "python": "3, 11"}, "python3"),
        ({"python3": "3, 9", "python": "3, 15"}, None),
    ],
)
def test_make_takes_the_first_supported_python(installed: dict[str, str], chosen: str | None, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "bash"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    for name, version in installed.items():
        (programs / name).write_text(STUB.format(real=sys.executable, version=version), encoding="utf-8")
        (programs / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "tools/lock/requirements.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)

    command = [str(MAKE), "--dry-run", "setup"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": str(programs)}, capture_output=True, encoding="utf-8", check=False
    )
    if chosen is None:
        assert done.returncode != 0 and "No Python 3.11, 3.12, 3.13 or 3.14 found. Install one" in done.stderr
    else:
        assert f"{chosen} -m venv .venv" in done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("python", "system", "machine", "expected"),
    [("3.13", "Linux", "x86_64", True), ("3.14", "Darwin", "arm64", False), ("3.11", "Windows", "AMD64", False),
     ("3.11", "Linux", "aarch64", False), ("3.11", "Darwin", "arm64", True)],
)  # fmt: skip
def test_coremltools_is_required_where_it_has_wheels(python: str, system: str, machine: str, expected: bool) -> None:
    (line,) = [text for text in PROJECT["optional-dependencies"]["coreml"] if text.startswith("coremltools")]
    marker = Requirement(line).marker
    assert marker is not None
    where = {"python_version": python, "platform_system": system, "platform_machine": machine}
    assert marker.evaluate(where) == expected
