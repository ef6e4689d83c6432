"""The tested versions: within the ranges of pyproject.toml, and the same in the bill of materials."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "tools" / "lock"


def locked() -> dict[str, str]:
    """Return the locked versions by canonical name."""
    pairs = (line.split("==") for line in (LOCK / "requirements.txt").read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(name): pinned for name, pinned in pairs}


def test_every_dependency_is_locked_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [Requirement(text) for text in (*project["dependencies"], *extras["docs"], *extras["dev"])]
    pinned = locked()
    wrong = [
        f"{need}: {pinned.get(canonicalize_name(need.name))}"
        for need in required
        if need.name != "qat-edge"
        and not need.specifier.contains(pinned.get(canonicalize_name(need.name), "0"), prereleases=True)
    ]
    assert wrong == [], "run `make lock`"


def test_the_bill_of_materials_lists_the_same_versions() -> None:
    components = json.loads((LOCK / "sbom.cdx.json").read_text(encoding="utf-8"))["components"]
    found = {canonicalize_name(c["name"]): c["version"].partition("+")[0] for c in components}
    found.pop("pip", None)
    found.pop("setuptools", None)
    assert found == {name: pinned for name, pinned in locked().items() if name != "setuptools"}


@pytest.mark.parametrize("name", ["torch", "torchao", "executorch", "transformers", "onnxruntime", "onnxruntime-genai"])
def test_the_tests_run_with_the_locked_versions(name: str) -> None:
    # These decide numbers; another version would make the lock a wrong statement.
    try:
        installed = version(name).partition("+")[0]
    except PackageNotFoundError:
        pytest.fail(f"{name} is not installed")
    assert installed == locked()[name]
