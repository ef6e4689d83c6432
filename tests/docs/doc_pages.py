"""Pages of the documentation as the tests read them: their text, code blocks, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
RUNNABLE = "<!-- runnable -->"  # on the line before a Python block that a test executes
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class CodeBlock:
    """One fenced block of code.

    Attributes:
        page: the file it is in.
        line: line number of the opening fence.
        language: first word after the fence; empty for a shell command.
        title: value of `title="..."` after the fence; empty without.
        code: text between the fences.
        runnable: whether a test executes it.
    """

    page: Path
    line: int
    language: str
    title: str
    code: str
    runnable: bool

    @property
    def name(self) -> str:
        """Return the page and line, as a name for a test."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return README, CONTRIBUTING and every page of the site."""
    return [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def code_blocks(*languages: str) -> list[CodeBlock]:
    """Return the code blocks of all pages in one of the languages; "" is a block without one."""
    return [block for page in pages() for block in _blocks(page) if block.language in languages]


def _blocks(page: Path) -> Iterator[CodeBlock]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        before, info = text[: match.start()], match["info"]
        title = re.search(r'title="([^"]*)"', info)
        yield CodeBlock(
            page=page,
            line=before.count("\n") + 1,
            language=info.split()[0] if info.strip() else "",
            title=title[1] if title else "",
            code=match["code"],
            runnable=before.rstrip().endswith(RUNNABLE),
        )


def without_code(page: Path) -> str:
    """Return a page's prose: code blocks and inline code are removed."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site and GitHub make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


def _slug(heading: str) -> str:
    words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[\s-]+", "-", words)


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page))
