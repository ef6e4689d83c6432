"""Results of eval by question: RUN/eval/TASK.json, which a later eval pairs with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qat_edge.errors import RunError
from qat_edge.evaluate.results import read_document, to_json, write_document
from qat_edge.public_tasks.questions import CHOOSE, GENERATE, PREDICT
from qat_edge.readers import shorten, show

FORMAT = 1


@dataclass(frozen=True)
class Answered:
    """The answer to one question.

    Attributes:
        id: Of the question.
        digest: Of what decides its score; see `Question.digest`.
        score: 1 for a right answer, 0 for a wrong one; negative log-probability in nats where a text is predicted.
        weight: 1; the number of tokens where a text is predicted.
        answer: The generated text, or the index of the chosen continuation; empty where a text is predicted.
    """

    id: str
    digest: str
    score: float
    weight: float
    answer: str


@dataclass(frozen=True)
class SourceAnswers:
    """All answers of one model.

    Attributes:
        source: The model, as `--from` has it.
        model_sha256: Checksum of its manifest.
        settings: Options that decide the answers.
        libraries: Versions of the libraries that computed them.
        created: Time in ISO format.
        wall_s: Time that it took, in seconds.
        answers: One a question.
    """

    source: str
    model_sha256: str
    settings: dict[str, Any]
    libraries: dict[str, str | None]
    created: str
    wall_s: float
    answers: list[Answered]

    def is_same_measurement(self, other: SourceAnswers) -> bool:
        """Return whether model, settings and libraries are those of another one."""
        ours = (self.model_sha256, self.settings, self.libraries)
        return ours == (other.model_sha256, other.settings, other.libraries)


@dataclass(frozen=True)
class TaskAnswers:
    """Content of RUN/eval/TASK.json.

    Attributes:
        task: Name of the task.
        package: Where its questions come from.
        form: What it asks for; see `questions`.
        sources: Answers of each model.
    """

    task: str
    package: str
    form: str
    sources: dict[str, SourceAnswers] = field(default_factory=dict)

    def with_source(self, answers: SourceAnswers) -> TaskAnswers:
        """Return a copy with the answers of one model added or replaced."""
        return replace(self, sources={**self.sources, answers.source: answers})


def save(path: Path, results: TaskAnswers) -> None:
    """Write the results, whole or not at all."""
    write_document(path, FORMAT, to_json(results))


def read(path: Path) -> TaskAnswers:
    """Read results.

    Raises:
        RunError: There are none, or the file is damaged or of another version, or an entry cannot be what eval wrote.
    """
    command = f"eval {path.parent.parent} --task {path.stem} --force"
    found = read_document(path, FORMAT, "results of eval", command, _build)
    fault = next(_faults(found, path.stem), None)
    if fault is not None:
        raise RunError(f"{path}: damaged ({fault}). Run {command} again.")
    return found


def _build(document: dict[str, Any]) -> TaskAnswers:
    sources = {name: _source_answers(values) for name, values in document.pop("sources").items()}
    return TaskAnswers(**document, sources=sources)


def _source_answers(values: dict[str, Any]) -> SourceAnswers:
    answers = [Answered(**each) for each in values.pop("answers")]
    return SourceAnswers(**values, answers=answers)


def _faults(found: TaskAnswers, task: str) -> Iterator[str]:
    """Yield what eval of a task would not have written, by entry; types have been checked already."""
    if found.task != task:
        yield f"task is {show(found.task)}, expected '{task}'"
    if found.form not in (GENERATE, CHOOSE, PREDICT):
        yield f"form is {show(found.form)}, expected {GENERATE}, {CHOOSE} or {PREDICT}"
    for name, results in found.sources.items():
        entry = f"sources.{shorten(name)}"
        if results.source != name:
            yield f"{entry}.source is {show(results.source)}"
        if not 0 <= results.wall_s < math.inf:
            yield f"{entry}.wall_s is {results.wall_s}, expected seconds"
        seen: set[tuple[str, str]] = set()
        for index, answer in enumerate(results.answers):
            yield from _answer_faults(answer, found.form == PREDICT, f"{entry}.answers[{index}]")
            if (answer.id, answer.digest) in seen:
                yield f"{entry}.answers[{index}].id is {show(answer.id)}, as of an earlier answer"
            seen.add((answer.id, answer.digest))


def _answer_faults(answer: Answered, is_nats: bool, entry: str) -> Iterator[str]:
    if is_nats and not 0 <= answer.score < math.inf:
        yield f"{entry}.score is {answer.score}, expected nats: a finite number of 0 or more"
    if not is_nats and answer.score not in (0, 1):
        yield f"{entry}.score is {answer.score}, expected 0 or 1"
    if is_nats and not 1 <= answer.weight < math.inf:
        yield f"{entry}.weight is {answer.weight}, expected a number of tokens, 1 or more"
    if not is_nats and answer.weight != 1:
        yield f"{entry}.weight is {answer.weight}, expected 1"
