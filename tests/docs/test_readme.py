"""README is short, begins with the two commands, and describes the repository as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.doc_pages import DOCS, README, ROOT

TEXT = README.read_text(encoding="utf-8")
WORD_LIMIT = 900
PACKAGES = ("toolkit/qat_edge", "exporters/qat_edge_exporters", "devices/qat_edge_devices")
# Folders that tools make; none of them is part of the repository.
MADE = {"build", "dist", "runs", "site", "__pycache__"}


def test_has_at_most_900_words() -> None:
    assert len(TEXT.split()) <= WORD_LIMIT


def test_begins_with_the_two_make_commands() -> None:
    assert re.findall(r"^make \w+", TEXT, flags=re.MULTILINE) == ["make demo", "make test"]


def test_has_the_six_commands_in_order() -> None:
    commands = [
        line.split()[1] for block in TEXT.split("```")[1::2] for line in block.splitlines() if line[:9] == "qat-edge "
    ]
    assert commands == ["finetune", "export", "verify", "validate", "report", "generate"]


def _results() -> str:
    return TEXT.split("## Results")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    "figure", sorted(set(re.findall(r"\d[\d,]*\.\d+|\d,\d{3}|\d{2,}(?=%| MB| tokens)", _results())))
)
def test_every_figure_of_the_results_is_on_a_benchmark_page(figure: str) -> None:
    pages = [
        (DOCS / name).read_text(encoding="utf-8") for name in ("accuracy.md", "frontier.md", "speed.md", "export.md")
    ]
    assert any(re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d])", page) for page in pages)


# --- the tree of the repository -----------------------------------------------------------------------------


def _tree() -> set[str]:
    """Return the folders that README's tree names, as paths from the root."""
    lines = TEXT.split("## Repository")[1].split("```")[1].splitlines()[1:]
    found, parent = set(), ""
    for line in lines:
        indented, folder = line.startswith("  "), line.split()[0].rstrip("/")
        parent = parent if indented else folder
        found.add(f"{parent}/{folder}" if indented else folder)
    return found


def _on_disk() -> set[str]:
    """Return the folders of the root, and those inside the three packages, that hold files."""
    roots = {package.split("/")[0] for package in PACKAGES}
    found = {path.name for path in ROOT.iterdir() if _is_source(path)} - roots | set(PACKAGES)
    return found | {
        f"{package}/{path.name}" for package in PACKAGES for path in (ROOT / package).iterdir() if _is_source(path)
    }


def _is_source(path: Path) -> bool:
    """Return whether a folder is part of the repository: not made by a tool, and not left behind empty."""
    if not path.is_dir() or path.name.startswith(".") or path.name in MADE or path.name.endswith(".egg-info"):
        return False
    return any(file.is_file() and "__pycache__" not in file.parts for file in path.rglob("*"))


def test_the_tree_is_that_of_the_disk() -> None:
    assert _tree() == _on_disk()
