"""The schema of a model's answers next to an artifact: schema.json, and the grammar that the runtime takes.

A runtime that takes a grammar chooses each token among those that the grammar permits. The others get schema.json
alone, for the app that checks answers by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qat_edge import readers
from qat_edge.data.answer_schema import SCHEMA_FILE, AnswerSchema, read_schema
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.lazy import load

if TYPE_CHECKING:
    from qat_edge_exporters.file_diagnosis import SchemaCheck


@dataclass(frozen=True)
class AnswerGrammar:
    """A kind of grammar.

    Attributes:
        file: name of the file next to the artifact.
        writer: returns its text: (AnswerSchema) -> str, or raises ExportError.
        runtime: that takes it, as `doctor` calls it.
        package: that `validate` runs it in.
        call: how an app gives it to the runtime.
        probe: tries it in the runtime: (file of the model, file of the grammar) -> why it is refused, or "".
    """

    file: str
    writer: str
    runtime: str
    package: str
    call: str
    probe: str

    def text(self, answer: AnswerSchema) -> str:
        """Return the content of the file.

        Raises:
            ExportError: the grammar cannot express the schema.
        """
        return str(load(self.writer)(answer))

    def refusal(self, model: Path) -> str:
        """Return why the installed runtime does not take the grammar next to a model; empty if it does."""
        return str(load(self.probe)(model, model.parent / self.file)).rstrip(".")


def check_schema_files(model: Path, grammar: AnswerGrammar | None, without_grammar: str, loads: bool) -> SchemaCheck:
    """Examine schema.json next to a model, and its grammar.

    Args:
        model: file of the model.
        grammar: that its runtime takes; None for none.
        without_grammar: why the runtime takes none, as a sentence.
        loads: the installed runtime loads the model, so that the grammar can be tried.
    """
    from qat_edge_exporters.file_diagnosis import SchemaCheck

    faults = grammar_faults(model.parent, grammar)
    if grammar is None:
        return SchemaCheck("", without_grammar, False, faults)
    if not faults and loads and (refusal := grammar.refusal(model)):
        faults = [
            f"{grammar.file}: {grammar.runtime} does not take it: {refusal}. Change the schema, and export again."
        ]
    note = f"Give it {grammar.file}: {grammar.call}."
    return SchemaCheck("" if faults else grammar.runtime, note, loads and not faults, faults)


def write_schema(folder: Path, answer: AnswerSchema, grammar: AnswerGrammar | None) -> None:
    """Write schema.json, and the grammar where the runtime takes one.

    Raises:
        ExportError: the grammar cannot express the schema.
    """
    (folder / SCHEMA_FILE).write_text(answer.text, encoding="utf-8", newline="\n")
    if grammar is not None:
        (folder / grammar.file).write_text(grammar.text(answer), encoding="utf-8", newline="\n")


def read_grammar(folder: Path, grammar: AnswerGrammar) -> str:
    """Return the grammar next to an artifact, which has to be that of its schema.json.

    Raises:
        ArtifactError: one of the two is missing, cannot be read, or does not fit the other.
    """
    faults = grammar_faults(folder, grammar)
    if faults:
        raise ArtifactError(f"{folder}: {faults[0]}")
    return readers.read_text(folder / grammar.file, ArtifactError)


def grammar_faults(folder: Path, grammar: AnswerGrammar | None) -> list[str]:
    """Return what is wrong with schema.json and the grammar of a folder, a sentence each."""
    path = folder / SCHEMA_FILE
    try:
        answer = read_schema(path, ArtifactError, SCHEMA_FILE)
    except ArtifactError as error:
        return [str(error)]
    if grammar is None:
        return []
    if not (folder / grammar.file).is_file():
        return [f"{grammar.file}: missing next to {SCHEMA_FILE}, so that {grammar.runtime} constrains nothing."]
    try:
        expected = grammar.text(answer)
        found = readers.read_text(folder / grammar.file, ArtifactError, grammar.file)
    except (ExportError, ArtifactError) as error:
        return [f"{grammar.file}: {str(error).rstrip('.')}."]
    if found != expected:
        return [f"{grammar.file}: not the grammar of {SCHEMA_FILE} next to it. Export again, or restore both files."]
    return []
