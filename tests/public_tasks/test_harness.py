"""Models of a run in lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer, train_run
from qat_edge.data.conversation import ChatFormat
from qat_edge.data.tokenization import ScoredIds
from qat_edge.errors import RunError, UsageError
from qat_edge.evaluate import reference
from qat_edge.options import ExportOptions
from qat_edge.public_tasks import harness
from qat_edge.run import Run
from qat_edge.verbs.export import export

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason='lm-evaluation-harness is not installed: pip install "qat-edge[eval]"',
)
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("harness")
    make_model(make_tokenizer()).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    made = train_run(folder / "model", folder)
    export(made, ExportOptions(context_length=128, target=("onnx",), ptq=("none",)))
    return made


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def model(run: Run, **values: Any) -> Any:
    from qat_edge.public_tasks.harness_model import HarnessModel

    return HarnessModel(str(run.path), **values)


def log_probs(run: Run, ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities of the tokens from `start` on."""
    with torch.no_grad():
        logits = reference.load_exact(run.quantized)(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits, -1)[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'lm-evaluation-harness is not installed. `pip install "qat-edge\[eval\]"`'):
        harness.register()


@needs_harness
def test_continuations_are_scored_as_by_the_model(run: Run) -> None:
    tokenizer = make_tokenizer()
    found = model(run).loglikelihood(requests(("The cat ", "sat"), ("", "sat")))
    whole = tokenizer.encode("The cat sat")
    start = len(tokenizer.encode("The cat"))
    assert found[0][0] == pytest.approx(float(log_probs(run, whole, start).sum()), abs=1e-4)
    # A text without a context follows an end token.
    alone = [tokenizer.eos_token_id, *tokenizer.encode("sat")]
    assert found[1][0] == pytest.approx(float(log_probs(run, alone, 1).sum()), abs=1e-4)


@needs_harness
def test_answers_are_greedy(run: Run) -> None:
    prompt = make_tokenizer().encode("The cat")
    (text,) = model(run).generate_until(requests(("The cat", {"max_gen_toks": 3, "until": []})))
    (wanted,) = reference.generate(reference.load_exact(run.quantized), [prompt], [2], 3, 2)
    assert text == make_tokenizer().decode(wanted, skip_special_tokens=True)


@needs_harness
def test_the_greedy_continuation_is_marked(run: Run) -> None:
    prompt = make_tokenizer().encode("The cat")
    with torch.no_grad():
        best = int(reference.load_exact(run.quantized)(torch.tensor([prompt])).logits[0, -1].argmax())
    sequences = [ScoredIds([*prompt, token], [len(prompt) - 1]) for token in (best, best + 1)]
    assert [is_greedy for _, is_greedy in model(run)._scores(sequences)] == [True, False]


@needs_harness
def test_a_long_text_is_predicted_once_a_token(run: Run) -> None:
    text = "the line on the page " * 20
    ids = [2, *make_tokenizer().encode(text)]
    found = model(run, context_length=64).loglikelihood_rolling(requests((text,)))
    pieces = [ids[start : start + 64] for start in range(0, len(ids) - 1, 63)]
    assert sum(len(piece) - 1 for piece in pieces) == len(ids) - 1
    assert found[0] == pytest.approx(sum(float(log_probs(run, piece, 1).sum()) for piece in pieces), rel=1e-6)
    assert model(run).loglikelihood_rolling(requests(("",))) == [0]


@needs_harness
def test_a_long_context_loses_its_beginning(run: Run) -> None:
    (scored,) = [model(run, context_length=16)._continuation("abc" * 50, "xyz")]
    assert len(scored.ids) == 16 and scored.positions == [12, 13, 14]


@needs_harness
def test_conversations_are_rendered_as_in_training(run: Run) -> None:
    subject, tokenizer = model(run), make_tokenizer()
    messages = [{"role": "user", "content": "say 1"}]
    wanted = ChatFormat(tokenizer).prompt(messages)
    assert subject.apply_chat_template(messages) == wanted.text
    assert subject._context_ids(wanted.text) == wanted.ids
    with pytest.raises(UsageError, match="gen_prefix"):
        subject.apply_chat_template(messages, add_generation_prompt=False)


@needs_harness
@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.7}])
def test_sampling_is_refused(run: Run, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="answers are greedy"):
        model(run).generate_until(requests(("x", settings)))


@needs_harness
def test_answers_end_before_the_first_end(run: Run) -> None:
    from qat_edge.public_tasks.harness_model import _before

    assert _before("one\n\ntwo. three", [".", "\n\n", ""]) == "one"
    assert _before("one", None) == "one" and _before("a b", " ") == "a"


@needs_harness
def test_a_model_that_is_not_there_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="executorch is missing"):
        model(run, source="executorch")
    with pytest.raises(UsageError, match="--from tflite: not known"):
        model(run, source="tflite")


@needs_harness
@pytest.mark.parametrize("source", ["torch", "onnx"])
def test_the_harness_runs_its_own_task_files(run: Run, tmp_path: Path, source: str) -> None:
    """Its command line, a local task file, multiple choice and generation with the chat template."""
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"say {i}", "choices": ["the", "an"], "label": 0, "answer": f'{{"n":{i}}}'} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = TASK.format(
        name="choose_one", data=data, kind="multiple_choice", target="label", more='doc_to_choice: "{{choices}}"'
    )
    more = 'generation_kwargs: {until: ["~"], do_sample: false, max_gen_toks: 8}'
    generated = TASK.format(name="say_it", data=data, kind="generate_until", target='"{{answer}}"', more=more)
    for name, text in (("choose_one", chosen), ("say_it", generated)):
        (tmp_path / f"{name}.yaml").write_text(text)
    arguments = ["--model", "qat-edge", "--model_args", f"run={run.path},source={source},context_length=128"]
    arguments += ["--tasks", "choose_one,say_it", "--include_path", str(tmp_path), "--apply_chat_template"]
    arguments += ["--output_path", str(tmp_path / "out.json")]
    process = subprocess.run(
        [sys.executable, "-m", "qat_edge.public_tasks.harness", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())["results"]
    assert 0 <= results["choose_one"]["acc,none"] <= 1 and results["choose_one"]["sample_len"] == 4
    assert "say_it" in results


@needs_harness
def test_our_errors_end_the_harness_with_one_paragraph(tmp_path: Path) -> None:
    arguments = ["--model", "qat-edge", "--model_args", f"run={tmp_path / 'none'}", "--tasks", "arc_easy"]
    process = subprocess.run(
        [sys.executable, "-m", "qat_edge.public_tasks.harness", *arguments], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1, process.stderr[-2000:]
    assert "Error: " in process.stderr and "no such run folder" in process.stderr
    assert "Traceback" not in process.stderr
