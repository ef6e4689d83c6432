"""Real text that every Python has: the language reference in `pydoc_data.topics`, split by topic.

`python -m qat_edge.demo_data.python_reference FOLDER` writes both files, rows of {"text": ...}, one a topic.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from qat_edge.run import write_text

HELD_OUT_TOPICS = 12
MIN_CHARACTERS = 1500  # a held-out topic is longer, so that its windows fill


def write(folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl into `folder`; returns their paths."""
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, texts in zip(paths, split(), strict=True):
        write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return paths


def split() -> tuple[list[str], list[str]]:
    """Training and held-out texts, in the order of their topics' names.

    Some topics quote others whole ("compound" holds "if"), so a paragraph that stands in a held-out topic is taken
    out of every training text.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    held_out = _held_out(topics)
    known = {_words(p) for name in held_out for p in _paragraphs(topics[name])}
    train = [
        "\n\n".join(p for p in _paragraphs(topics[name]) if _words(p) not in known)
        for name in sorted(set(topics) - held_out)
    ]
    return [text for text in train if text], [topics[name] for name in sorted(held_out)]


def _held_out(topics: dict[str, str]) -> set[str]:
    """Topics spread evenly over the alphabet of those that are long enough, the longest tenth left to training."""
    lengths = sorted(len(text) for text in topics.values())
    longest = lengths[len(lengths) * 9 // 10]
    names = sorted(name for name, text in topics.items() if MIN_CHARACTERS <= len(text) <= longest)
    return set(names[:: len(names) // HELD_OUT_TOPICS][:HELD_OUT_TOPICS])


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def _words(paragraph: str) -> str:
    """A paragraph however it is indented and wrapped."""
    return " ".join(paragraph.split())


def main() -> None:
    """Write the example's data files into the folder named on the command line."""
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/data/python-reference")):
        print(path)


if __name__ == "__main__":
    main()
