"""Running text for perplexity: topics of Python's language reference, which comes with every Python.

The topics are those that `demo_data.python_reference` holds out, so that a model trained on its training rows can be
measured on them. Each question is a passage of whole paragraphs.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

from qat_edge.demo_data import python_reference
from qat_edge.public_tasks.questions import PREDICT, Question, Task, in_random_order

PASSAGE_CHARACTERS = 1200  # at most, unless one paragraph is longer; about 300 tokens


def load(name: str, cache: Path) -> Task:
    """Return the passages; nothing is downloaded."""
    held_out = python_reference.split()[1]
    passages = [passage for topic in held_out for passage in _passages(topic)]
    return Task(
        name=name,
        title="text of the Python language reference",
        source=f"pydoc_data of Python {platform.python_version()}",
        form=PREDICT,
        test=in_random_order([Question(id=f"passage-{index}", text=text) for index, text in enumerate(passages)]),
    )


def _passages(topic: str) -> Iterator[str]:
    """Yield consecutive paragraphs of a topic, joined up to the length of a passage."""
    passage = ""
    for paragraph in topic.strip().split("\n\n"):
        if passage and len(passage) + len(paragraph) > PASSAGE_CHARACTERS:
            yield passage
            passage = ""
        passage += paragraph + "\n\n"
    yield passage
