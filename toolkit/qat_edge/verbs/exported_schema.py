"""The schema of `export --schema`: found or inferred before any work, shipped with each artifact, compared by `verify`.

RUN/schema.json is what the run's artifacts were last exported with. Every artifact has a copy, with the grammar that
its runtime takes, and is tried in that runtime before it takes its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge import config, option_paths, progress, readers
from qat_edge.data.answer_schema import SCHEMA_FILE, AnswerSchema, read_schema
from qat_edge.data.changed_rows import DATA, describe_change
from qat_edge.data.chat_template import ChatTemplate
from qat_edge.data.formats import RowStream
from qat_edge.data.tool_schema import schema_of_tools
from qat_edge.errors import DataError, ExportError, RunError
from qat_edge.export_command import export_again
from qat_edge.models import tasks
from qat_edge.models.tokenizer import TOKENIZER_FILES, load_tokenizer
from qat_edge.options import TOOLS
from qat_edge.quant.ptq.method_names import QAT
from qat_edge.run import Run
from qat_edge.storage import write_text
from qat_edge.verbs.quantize import quantize_if_missing
from qat_edge_exporters.targets import Target


def wanted_schema(run: Run, source: str | None, targets: Sequence[Target], force: bool) -> AnswerSchema | None:
    """Return the schema to ship with artifacts of `targets`; None without --schema.

    Args:
        run: whose model answers.
        source: value of --schema.
        targets: that the schema has to be expressible for.
        force: replace the schema that the run has.

    Raises:
        UsageError: the run is an encoder.
        DataError: no valid schema, or none that can be inferred from the training rows.
        ExportError: a target's grammar cannot express it.
        RunError: an artifact was exported with another schema, and `force` is not set.
    """
    if source is None:
        return None
    tasks.require_causal_lm(run, f"--schema {source}")
    if source == TOOLS:
        answer = _schema_of_rows(run, load_tokenizer(_folder_with_tokenizer(run, force)))
        _require_grammars(answer, source, targets)
    else:
        # Checked before any work; the block of reasoning needs the tokenizer.
        answer = read_schema(Path(source), DataError, f"--schema {source}")
        _require_grammars(answer, source, targets)
        tokenizer = load_tokenizer(_folder_with_tokenizer(run, force))
        lead = ChatTemplate(tokenizer).empty_reasoning if tokenizer.chat_template else ""
        answer = dataclasses.replace(answer, lead=answer.lead or lead)
    other = next(_with_other_schema(run, answer), None)
    if other is not None and not force:
        raise RunError(
            f"--schema {source}: {other} was exported with another schema, and a run has one. Give --force, and "
            "every --target that is to have the new one."
        )
    return answer


def _schema_of_rows(run: Run, tokenizer: PreTrainedTokenizerBase) -> AnswerSchema:
    """Return the schema of calls of the tools in the training rows."""
    options = config.load_trained(run.config)
    trained = options.data
    option_paths.require_data(trained, None)
    rows = RowStream(trained, report=False, streamed=options.streaming)
    answer = schema_of_tools(rows, tokenizer, trained)
    if describe_change(run, DATA, rows, ""):
        progress.warn(f"{trained} has other rows than when finetune read it: the tools are those of its rows now")
    return answer


def _require_grammars(answer: AnswerSchema, source: str, targets: Sequence[Target]) -> None:
    """Require that the grammars of all targets can express a schema.

    Raises:
        ExportError: names the target whose grammar cannot.
    """
    for target in targets:
        try:
            target.require_grammar(answer)
        except ExportError as error:
            raise ExportError(f"--schema {source}: {error}, or leave out --target {target.format}.") from error


def save_schema(run: Run, answer: AnswerSchema) -> None:
    """Write the run's schema, once its artifacts have it, and name artifacts that have another one."""
    write_text(run.schema, answer.text)
    for folder in _with_other_schema(run, answer):
        progress.warn(
            f"{folder} has another schema than {run.schema} now, as verify reports. Export it again: "
            f"`{export_again(folder, schema=str(run.schema))}`."
        )


def _with_other_schema(run: Run, answer: AnswerSchema) -> Iterator[Path]:
    """Yield the artifacts of a run that have another schema, or one that cannot be read."""
    for folder in (variant.exports / target for variant in run.variants() for target in variant.targets()):
        path = folder / SCHEMA_FILE
        if path.is_file() and path.read_bytes() != answer.text.encode("utf-8"):
            yield folder


def _folder_with_tokenizer(run: Run, force: bool) -> Path:
    """Return the folder of a run that has its tokenizer: the frozen checkpoint, which is made where it is missing."""
    for folder in (run.quantized, run.adapter, run.reference):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    return quantize_if_missing(run, QAT, force).quantized


def try_schema(folder: Path, target: Target) -> None:
    """Try the grammar of an artifact in its runtime, where that takes one and runs here.

    Raises:
        ExportError: the runtime refuses the grammar.
    """
    if target.grammar is None:
        progress.warn(f"{target.name}: {target.without_grammar}")
        return
    if target.runs_elsewhere:
        progress.warn(f"{target.name}: the grammar was not tried. {target.runs_elsewhere}")
        return
    refusal = target.grammar.refusal(folder / target.file)
    if refusal:
        raise ExportError(
            f"--schema: the {target.title} artifact was not written, because {target.grammar.runtime} does not take "
            f"the grammar of the schema: {refusal}. Change the schema, or leave out --target {target.format}."
        )


def schema_text(folder: Path) -> str | None:
    """Return the content of schema.json next to an artifact; None where it has none."""
    path = folder / SCHEMA_FILE
    return _read(path) if path.is_file() else None


def schema_faults(run: Run, folder: Path, target: Target) -> list[str]:
    """Compare schema.json of an artifact with the run's, and its grammar with both; a sentence for each difference."""
    path = folder / SCHEMA_FILE
    if not path.is_file():
        return []
    faults = target.schema_faults(folder)
    if not run.schema.is_file():
        return [*faults, f"{SCHEMA_FILE}: {run.schema} is missing, so that nothing says whether it is the run's."]
    try:
        is_equal = _read(run.schema) == _read(path)
    except RunError as error:
        return [*faults, f"{SCHEMA_FILE}: it cannot be compared with the schema of the run. {error}"]
    return faults if is_equal else [*faults, f"{SCHEMA_FILE}: not the schema of the run, {run.schema}."]


def _read(path: Path) -> str:
    return readers.read_text(path, RunError)
