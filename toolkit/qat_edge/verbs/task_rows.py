"""Write a public task as rows for `finetune`: `--data` without anything of the test part, and `--eval-data`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.errors import RunError, UsageError
from qat_edge.models.wheels import cache_folder
from qat_edge.public_tasks import function_calls
from qat_edge.public_tasks.questions import Question, load_task
from qat_edge.storage import write_text

TRAIN_FILE, TEST_FILE = "train.jsonl", "test.jsonl"


@dataclass(frozen=True)
class TaskRows:
    """Result of the verb.

    Attributes:
        train: File with the training rows.
        test: File with the questions of `eval`, as rows.
        train_rows: Number of rows in `train`.
        test_rows: Number of rows in `test`; questions without a right answer are no rows.
    """

    train: Path
    test: Path
    train_rows: int
    test_rows: int


def write_task_rows(name: str, folder: Path, as_text: bool = False, force: bool = False) -> TaskRows:
    """Write train.jsonl and test.jsonl into a folder.

    Args:
        name: The task.
        folder: Made if it does not exist.
        as_text: Describe functions in the system message, for chat templates that take no tools.
        force: Replace files that exist.

    Raises:
        UsageError: The task is not known, or has no training part.
        RunError: A file exists already, or cannot be written.
        DataError: The task's package cannot be downloaded or read.
    """
    paths = folder / TRAIN_FILE, folder / TEST_FILE
    for path in paths:
        if path.exists() and not force:
            raise RunError(f"{path} exists already. Give --force to replace it.")
    task = load_task(name, cache_folder())
    if task.train is None:
        raise UsageError(
            f"{name}: has questions for testing only. Tasks with rows to train on: bfcl and its parts, chain_sum, "
            "gsm_symbolic."
        )

    train, test = list(_rows(task.train(), as_text)), list(_rows(task.test, as_text))
    for path, rows in zip(paths, (train, test), strict=True):
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return TaskRows(*paths, len(train), len(test))


def _rows(questions: Iterable[Question], as_text: bool) -> Iterable[dict[str, Any]]:
    """Yield a conversation for each question that has a right answer."""
    for question in questions:
        if question.solution is None:
            continue
        shown = function_calls.as_text(question) if as_text else question
        tools = {} if shown.tools is None else {"tools": shown.tools}
        yield {"messages": [*shown.messages, shown.solution], **tools}
