"""Real text that comes with every Python: the language reference in `pydoc_data.topics`, split by topic.

`python -m qat_edge.demo_data.python_reference FOLDER` writes both files, with one row {"text": ...} per topic.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from qat_edge.storage import write_text

HELD_OUT_TOPICS = 12
MIN_CHARACTERS = 1500  # of a held-out topic, so that it fills a window of evaluation


def write(folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and eval.jsonl into `folder` and return their paths."""
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, texts in zip(paths, split(), strict=True):
        write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return paths


def split() -> tuple[list[str], list[str]]:
    """Return training and held-out texts, each sorted by the name of its topic.

    Some topics quote others in full ("compound" contains "if"), so a paragraph of a held-out topic is removed from
    every training text.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    held_out = _held_out(topics)
    # Compared without white space: a quotation may be indented otherwise.
    excluded = {_normalized(p) for name in held_out for p in _paragraphs(topics[name])}

    train = []
    for name in sorted(set(topics) - held_out):
        text = "\n\n".join(p for p in _paragraphs(topics[name]) if _normalized(p) not in excluded)
        if text:
            train.append(text)
    return train, [topics[name] for name in sorted(held_out)]


def _held_out(topics: dict[str, str]) -> set[str]:
    """Return held-out topics: evenly spread over the alphabet, long enough, and none of the longest tenth."""
    # A very long topic would take most of the evaluation, and is worth more in training.
    lengths = sorted(len(text) for text in topics.values())
    longest = lengths[len(lengths) * 9 // 10]
    # Every n-th name, so that related topics are on both sides.
    names = sorted(name for name, text in topics.items() if MIN_CHARACTERS <= len(text) <= longest)
    return set(names[:: len(names) // HELD_OUT_TOPICS][:HELD_OUT_TOPICS])


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def _normalized(paragraph: str) -> str:
    """Return a paragraph without its indentation and line breaks."""
    return " ".join(paragraph.split())


def main() -> None:
    """Write the example's data files into the folder named on the command line."""
    for path in write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/data/python-reference")):
        print(path)


if __name__ == "__main__":
    main()
