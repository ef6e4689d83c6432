"""Ask models of a run the questions of a task, and compare them on the same questions.

Load the task and the prompts, answer with each model, write RUN/eval/TASK.json after each, compare. Answers that are in
that file already, of the same model under the same settings, are not computed again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat_edge import progress
from qat_edge.data.conversation import AnswerReader
from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import LIBRARIES, library_version
from qat_edge.models import tasks
from qat_edge.models.tokenizer import end_tokens, load_tokenizer
from qat_edge.models.wheels import cache_folder
from qat_edge.options import EvalOptions
from qat_edge.public_tasks import answer_records, own_rows, paired
from qat_edge.public_tasks.answer_records import Answered, SourceAnswers, TaskAnswers
from qat_edge.public_tasks.answering import TORCH, AnsweringModel, ModelSource, find_source, open_model
from qat_edge.public_tasks.paired import Interval, PairedDifference
from qat_edge.public_tasks.prompting import Prepared, TaskPrompts
from qat_edge.public_tasks.questions import CHOOSE, GENERATE, PREDICT, Question, Task, load_task
from qat_edge.readers import counted, shorten
from qat_edge.run import Run
from qat_edge.run_lock import writes_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SourceScore:
    """Result of one model.

    Attributes:
        source: The model, as `--from` has it; "RUN: NAME" for one of another run.
        questions: Number of questions.
        score: Share of right answers, or negative log-probability in nats per token, with its interval.
        against: The model that it is compared with; empty for none.
        difference: Its scores minus that model's; None for no comparison.
    """

    source: str
    questions: int
    score: Interval
    against: str = ""
    difference: PairedDifference | None = None


@dataclass(frozen=True)
class Evaluated:
    """Result of the verb.

    Attributes:
        path: RUN/eval/TASK.json.
        task: Name of the task.
        title: A noun phrase for it.
        package: Where its questions come from.
        is_perplexity: Whether scores are nats per token; their exponential is the perplexity.
        scores: One a model, in the order of `--from`.
    """

    path: Path
    task: str
    title: str
    package: str
    is_perplexity: bool
    scores: list[SourceScore]


@writes_run("eval")
def evaluate(
    run: Run, options: EvalOptions, sources: Sequence[str] = (TORCH,), against: Run | None = None, force: bool = False
) -> Evaluated:
    """Measure models of a run on a task.

    Args:
        run: A run with a frozen checkpoint.
        options: The task, and how its questions are put.
        sources: The models; see `public_tasks.answering`. The others are compared with the first.
        against: A run that each model is compared with, model by model, instead.
        force: Measure again what was measured already.

    Raises:
        UsageError: A source or task is not known, or named twice, or no question fits.
        RunError: The run or `against` lacks something, or an artifact is too short for --context-length.
        DataError: The task's package cannot be downloaded or read.
    """
    # Everything that can be refused without a download or a model.
    if options.data is not None and options.task not in own_rows.TASKS:
        raise UsageError(
            f"--data and --task {options.task}: this task has its own questions. Leave --data out, or give --task "
            f"{' or '.join(own_rows.TASKS)}."
        )
    tasks.require_causal_lm(run, "eval")
    if not run.quantized.is_dir():
        raise RunError(f"{run.quantized} is missing. `qat-edge export {run.path}` makes it.")
    found = [find_source(run, name) for name in sources]
    _require_usable(found, options)
    path = run.evaluations / f"{options.task}.json"
    others = None if against is None else _results_of(against, options.task, sources)

    tokenizer = load_tokenizer(run.quantized)
    is_own = options.task in own_rows.TASKS
    task = own_rows.load(run, options, tokenizer) if is_own else load_task(options.task, cache_folder())
    results = _earlier(path, task, force)
    prompts = TaskPrompts(run, task, options, tokenizer)
    prepared = prompts.prepare()
    progress.info(f"{task.name}: {task.title}, {counted(len(prepared), 'question')} from {task.source}")

    for source in found:
        answers = None if force else _reusable(results, source, prompts.settings, prepared)
        if answers is None:
            results = results.with_source(_answer(run, source, task, prepared, prompts.settings, options, tokenizer))
            answer_records.save(path, results)
        else:
            progress.info(f"{source.name}: measured before, in {path}")
    scores = _scores(results, sources, prepared, against, others)
    return Evaluated(path, task.name, task.title, task.source, task.form == PREDICT, scores)


# --- before any work ---------------------------------------------------------------------------------------


def _require_usable(sources: Sequence[ModelSource], options: EvalOptions) -> None:
    """Refuse models that are named twice, and artifacts that are too short for the questions.

    Raises:
        UsageError, RunError: See above.
    """
    names = [source.name for source in sources]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"--from {repeated}: given more than once. Name each model once.")
    for source in sources:
        held = source.context_length
        if held is not None and held < options.context_length:
            raise RunError(
                f"--context-length {options.context_length}: {source.folder} holds {held} tokens. Give "
                f"--context-length {held}, or export with a longer --context-length."
            )


def _results_of(run: Run, task: str, sources: Sequence[str]) -> TaskAnswers:
    """Return the results of another run.

    Raises:
        RunError: It lacks the task, or a model.
    """
    path = run.evaluations / f"{task}.json"
    if not path.exists():
        flags = "".join(f" --from {name}" for name in sources)
        raise RunError(
            f"--against {run.path}: {task} was not measured there. `qat-edge eval {run.path} --task {task}{flags}` "
            "measures it."
        )
    results = answer_records.read(path)
    for name in sources:
        if name not in results.sources:
            others = shorten(", ".join(results.sources))
            raise RunError(
                f"--against {run.path}: '{name}' was not measured there on {task}, only {others}. "
                f"`qat-edge eval {run.path} --task {task} --from {name}` measures it."
            )
    return results


def _earlier(path: Path, task: Task, force: bool) -> TaskAnswers:
    """Return the results that are there already; with `force`, a damaged file counts as none.

    Raises:
        RunError: The file is damaged, or of another version.
    """
    none = TaskAnswers(task.name, task.source, task.form)
    if not path.exists():
        return none
    try:
        return dataclasses.replace(answer_records.read(path), package=task.source)
    except RunError:
        if force:
            return none
        raise


def _reusable(
    results: TaskAnswers, source: ModelSource, settings: dict[str, Any], prepared: Sequence[Prepared]
) -> SourceAnswers | None:
    """Return answers of the same model under the same settings to all of the questions; None if there are none."""
    earlier = results.sources.get(source.name)
    if earlier is None or not earlier.is_same_measurement(_measurement(source, settings, [], 0.0)):
        return None
    known = {(answer.id, answer.digest) for answer in earlier.answers}
    return earlier if all((each.question.id, each.question.digest) in known for each in prepared) else None


# --- answers -----------------------------------------------------------------------------------------------


def _answer(
    run: Run,
    source: ModelSource,
    task: Task,
    prepared: Sequence[Prepared],
    settings: dict[str, Any],
    options: EvalOptions,
    tokenizer: PreTrainedTokenizerBase,
) -> SourceAnswers:
    """Answer all questions with one model."""
    began = time.monotonic()
    eos_ids = end_tokens(run.quantized)
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with open_model(source, eos_ids, pad_id, options.threads) as model:
        answers = answers_of(model, task, prepared, settings["max_new_tokens"], tokenizer)
    return _measurement(source, settings, answers, time.monotonic() - began)


def answers_of(
    model: AnsweringModel,
    task: Task,
    prepared: Sequence[Prepared],
    max_new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Answered]:
    """Return the graded answers of a loaded model to the questions of a task.

    Args:
        model: The model.
        task: The task.
        prepared: Its questions as token ids.
        max_new_tokens: Longest answer, for a task that is answered in text.
        tokenizer: Of the model.
    """
    if task.form != GENERATE:
        return list(_scored(model, task, prepared))
    assert task.grade is not None
    reader = AnswerReader(tokenizer)
    outputs = model.generate([each.prompt_ids for each in prepared], max_new_tokens)
    answers = []
    for each, ids in zip(prepared, outputs, strict=True):
        text = reader.from_ids(ids)
        answers.append(_answered(each.question, float(task.grade(each.question, text)), 1, text))
    return answers


def _scored(model: AnsweringModel, task: Task, prepared: Sequence[Prepared]) -> Iterator[Answered]:
    """Yield the answers of a task that compares or measures probabilities."""
    scores = model.score([sequence for each in prepared for sequence in each.sequences])
    for each in prepared:
        question = each.question
        log_probs = [float(next(scores).log_probs.sum()) for _ in each.sequences]
        if task.form == PREDICT:
            yield _answered(question, -log_probs[0], len(each.sequences[0].positions), "")
            continue
        assert task.form == CHOOSE
        if task.per_character:
            log_probs = [value / len(choice) for value, choice in zip(log_probs, question.choices, strict=True)]
        chosen = max(range(len(log_probs)), key=log_probs.__getitem__)
        yield _answered(question, float(chosen == question.expected), 1, str(chosen))
    next(scores, None)  # lets the model clean up after its last sequence


def _answered(question: Question, score: float, weight: float, answer: str) -> Answered:
    return Answered(question.id, question.digest, score, weight, answer)


def _measurement(
    source: ModelSource, settings: dict[str, Any], answers: list[Answered], wall_s: float
) -> SourceAnswers:
    return SourceAnswers(
        source=source.name,
        model_sha256=source.model_sha256,
        settings=settings,
        libraries={name: library_version(name) for name in LIBRARIES},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=round(wall_s, 1),
        answers=answers,
    )


# --- comparison --------------------------------------------------------------------------------------------


def _scores(
    results: TaskAnswers,
    sources: Sequence[str],
    prepared: Sequence[Prepared],
    against: Run | None,
    others: TaskAnswers | None,
) -> list[SourceScore]:
    """Return the score of each model on these questions, compared with the first model or with another run.

    Raises:
        RunError: The two have no question in common, or tokenizers differ.
    """
    wanted = {(each.question.id, each.question.digest) for each in prepared}
    found = {
        name: [answer for answer in results.sources[name].answers if (answer.id, answer.digest) in wanted]
        for name in sources
    }
    first = sources[0]
    scores = []
    for name, answers in found.items():
        label, base = "", None
        if others is not None and against is not None:
            label, base = f"{against.path}: {name}", others.sources[name].answers
        elif name != first:
            label, base = first, found[first]
        try:
            change = None if base is None else paired.difference(answers, base)
        except RunError as error:
            raise RunError(f"{name} and {label} cannot be compared: {error}.") from error
        scores.append(SourceScore(name, len(answers), paired.mean(answers), label, change))
    return scores
