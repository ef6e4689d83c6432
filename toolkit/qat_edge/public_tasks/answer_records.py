"""Results of eval by question: RUN/eval/TASK.json, which a later eval pairs with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qat_edge.evaluate.results import read_document, to_json, write_document

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
        RunError: There are none, or the file is damaged or of another version.
    """
    return read_document(path, FORMAT, "results of eval", "eval --force", _build)


def _build(document: dict[str, Any]) -> TaskAnswers:
    sources = {name: _source_answers(values) for name, values in document.pop("sources").items()}
    return TaskAnswers(**document, sources=sources)


def _source_answers(values: dict[str, Any]) -> SourceAnswers:
    answers = [_answered(**each) for each in values.pop("answers")]
    return SourceAnswers(**values, answers=answers)


def _answered(id: str, digest: str, score: float, weight: float, answer: str) -> Answered:
    """Return one answer; a value that is no number is an error here rather than in a later computation."""
    return Answered(str(id), str(digest), float(score), float(weight), str(answer))
