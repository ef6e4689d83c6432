"""Share of answers that are valid by the schema next to an artifact, with and without its grammar.

Only prompts count whose expected answer is valid: a model that was trained to answer otherwise is not at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qat_edge import progress
from qat_edge.data.answer_schema import SCHEMA_FILE, AnswerSchema, read_schema
from qat_edge.errors import ArtifactError
from qat_edge.evaluate.results import SchemaResult
from qat_edge.readers import counted
from qat_edge_exporters.targets import target_named

if TYPE_CHECKING:
    from qat_edge.evaluate.evaluator import EvalSet
    from qat_edge_devices.runtime import Runtime

NO_PROMPTS = "no prompts were answered"
OWN_RUNNER = "the runner of --runner-binary takes no grammar"


class JudgedPrompts(NamedTuple):
    """The prompts that count.

    Attributes:
        answer: the schema.
        positions: of the prompts whose expected answer is valid.
        reason: why there are none, or why the first other one does not count; empty where all count.
    """

    answer: AnswerSchema
    positions: list[int]
    reason: str


def judged_prompts(eval_set: EvalSet, folder: Path) -> JudgedPrompts | None:
    """Return the prompts that count for the schema of an artifact; None where it has no schema.

    Raises:
        ArtifactError: its schema.json cannot be read.
    """
    path = folder / SCHEMA_FILE
    if not path.is_file():
        return None
    answer = read_schema(path, ArtifactError)
    if not eval_set.prompts:
        return JudgedPrompts(answer, [], NO_PROMPTS)
    reader = eval_set.reader()
    faults = [answer.fault(reader.from_text(prompt.expected)) for prompt in eval_set.prompts]
    positions = [index for index, fault in enumerate(faults) if not fault]
    reason = ""
    if len(positions) < len(faults):
        first = next(index for index, fault in enumerate(faults) if fault)
        reason = f"{eval_set.prompts[first].where}: {faults[first]}"
        progress.warn(
            f"{path}: {len(faults) - len(positions)} of {len(faults)} expected answers are not valid by it, and their "
            f"prompts do not count; the first: {reason}"
        )
    return JudgedPrompts(answer, positions, reason)


def judge(judged: JudgedPrompts, texts: Sequence[str], not_measured: str) -> SchemaResult:
    """Judge answers that were generated without a constraint.

    Args:
        judged: prompts that count.
        texts: answers to all prompts.
        not_measured: why there are none with the constraint.
    """
    faults = [judged.answer.fault(texts[index]) for index in judged.positions]
    return SchemaResult(
        answers=len(faults),
        left_out=len(texts) - len(faults),
        valid=faults.count(""),
        first_fault=next(filter(None, faults), ""),
        not_measured=not_measured,
    )


def measure_schema(
    eval_set: EvalSet,
    folder: Path,
    target: str,
    runtime: Runtime,
    runtime_name: str,
    outputs: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> SchemaResult | None:
    """Judge the answers of an artifact, and those that it gives under its grammar; None where it has no schema.

    Args:
        eval_set: with the prompts.
        folder: of the artifact.
        target: its name.
        runtime: prepared for it.
        runtime_name: package that generates on the device.
        outputs: ids that it generated for each prompt, without the grammar.
        max_new_tokens: longest answer.
    """
    judged = judged_prompts(eval_set, folder)
    if judged is None:
        return None
    reader = eval_set.reader() if eval_set.prompts else None
    texts = [] if reader is None else [reader.from_ids(ids) for ids in outputs]
    record = target_named(target)
    reason = _why_not(record.grammar.package if record.grammar else "", record.without_grammar, runtime_name, judged)
    free = judge(judged, texts, reason)
    if reason or reader is None:
        return free

    progress.info(f"  generating {counted(free.answers, 'answer')} under the grammar of {SCHEMA_FILE}")
    prompts = [eval_set.prompt_ids[index] for index in judged.positions]
    found = runtime.generate(prompts, eval_set.eos_ids, max_new_tokens, constrained=True).completions
    faults = [judged.answer.fault(reader.from_ids(completion.ids)) for completion in found]
    cut = sum(bool(fault) and each.stopped != "eos" for fault, each in zip(faults, found, strict=True))
    return free.with_constraint(faults.count(""), cut)


def _why_not(package: str, without_grammar: str, runtime_name: str, judged: JudgedPrompts) -> str:
    """Return why no answers are generated under a grammar, as a phrase or sentence; empty where they are."""
    if not package:
        return without_grammar
    if not judged.positions:
        return judged.reason
    if runtime_name != package:
        return f"the device runs it in {runtime_name}, and only {package} takes the grammar"
    return ""
