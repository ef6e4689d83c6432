"""The site builds without a warning, and its pages fetch nothing from a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.doc_pages import DOCS, ROOT

FETCHED = re.compile(r'<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    built = {str(page.relative_to(site).with_suffix("")) for page in site.rglob("*.html")}
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} <= built


def test_pages_fetch_nothing_from_a_network(site: Path) -> None:
    found = {f"{page.name}: {url}" for page in site.rglob("*.html") for url in FETCHED.findall(page.read_text("utf-8"))}
    assert found == set()


@pytest.mark.parametrize(
    "name", ["finetune", "quantize", "export", "verify", "validate", "generate", "load_frozen", "Run", "QatEdgeError"]
)
def test_the_reference_has_every_public_name(site: Path, name: str) -> None:
    pages = [(site / "reference" / page).read_text("utf-8") for page in ("api.html", "errors.html")]
    assert any(re.search(rf'id="qat_edge[\w.]*\.{name}"', page) for page in pages)
