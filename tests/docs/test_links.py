"""Links between pages lead to files and headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.doc_pages import DOCS, ROOT, anchors, links, pages

LINKS = [
    (page, target) for page in pages() for target in links(page) if not target.startswith(("http://", "https://", "#"))
]


def test_pages_have_links() -> None:
    assert len(LINKS) > 50


@pytest.mark.parametrize(
    ("page", "target"), LINKS, ids=[f"{page.relative_to(ROOT)}->{target}" for page, target in LINKS]
)
def test_every_link_resolves(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve()
    assert path.exists()
    assert path.is_relative_to(ROOT)
    if page.is_relative_to(DOCS):
        assert path.is_relative_to(DOCS), "the site has no pages outside docs/"
    if anchor:
        assert anchor in anchors(path)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_a_page_resolve(page: Path) -> None:
    own = anchors(page)
    assert [target for target in links(page) if target.startswith("#") and target[1:] not in own] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    missing = [str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if str(p.relative_to(DOCS)) not in navigation]
    assert missing == []


# Files of the repository that pages name in backticks; a run's own files are not among them.
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|yml|toml|ipynb|md))`")
FOLDERS = ("", "toolkit", "exporters", "devices", "toolkit/qat_edge", "devices/qat_edge_devices")
PATHS = sorted({name for page in pages() for name in NAMED.findall(page.read_text(encoding="utf-8"))})


def test_pages_name_files() -> None:
    assert "quant/numerics.py" in PATHS
    assert "examples/quickstart.py" in PATHS


@pytest.mark.parametrize("name", [name for name in PATHS if not name.startswith(("runs/", "RUN/"))])
def test_every_named_file_exists(name: str) -> None:
    assert any((ROOT / folder / name).is_file() for folder in FOLDERS)
