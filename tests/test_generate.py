"""A run whose answers end with a token of the template alone: every artifact ends there, and all prompts are equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from conftest import CHAT_TEMPLATE, Recorder, make_model, make_tokenizer, relist, train_run
from data.chat_templates import THINKING, tokenizer_for
from qat_edge import progress
from qat_edge.data import tokenization
from qat_edge.data.conversation import Prompt, text_prompt
from qat_edge.data.formats import Completion
from qat_edge.errors import ArtifactError, RunError, UsageError
from qat_edge.evaluate.evaluator import load_eval_set
from qat_edge.evaluate.reference import load_exact
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models.tokenizer import end_tokens, load_tokenizer
from qat_edge.options import DoctorOptions, ExportOptions, ValidateOptions
from qat_edge.run import Run
from qat_edge.verbs.doctor import doctor
from qat_edge.verbs.export import export
from qat_edge.verbs.generate import WithoutPrefix, answer, chat_prompt, generate
from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.executorch import generate_text, llm_runner
from qat_edge_exporters.targets import target_named

# Each of them would change texts or stop them.
SETTINGS = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 2, "stop_strings": ["e"]}


@pytest.fixture(scope="module")
def lines() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, lines: Recorder) -> Run:
    """The template ends turns with <|stop|>, an added token; model and tokenizer end with <|endoftext|>.

    The tokenizer begins every text with <|im_start|>. The model's own settings would change every text.
    """
    folder = tmp_path_factory.mktemp("stop")
    tokenizer = tokenizer_for(CHAT_TEMPLATE.replace("<|im_end|>", "<|stop|>"), adds_bos=True)
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True, normalized=False)])
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    model = make_model(tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    for key, value in SETTINGS.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with progress.report_to(lines):
        made = train_run(folder / "model", folder)
        export(made, ExportOptions(context_length=64))
    return made


def test_the_token_that_ends_turns_in_training_ends_every_artifact(run: Run, lines: Recorder) -> None:
    stop = load_tokenizer(run.quantized).convert_tokens_to_ids("<|stop|>")
    assert any(
        "Answers end with '<|stop|>'" in line and "is not among the model's end tokens [0]" in line
        for line in lines.lines
    )
    assert read_manifest(run.adapter)["conversation"] == {"end_of_turn": [stop], "template_arguments": {}}
    assert read_manifest(run.exports / "onnx")["conversation"]["end_of_turn"] == [stop]
    for folder in (run.quantized, run.exports / "executorch"):
        assert end_tokens(folder) == [0, stop]
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, stop]
    assert target_named("onnx").read(run.exports / "onnx").metadata["end_tokens"] == [0, stop]
    assert target_named("executorch").read(run.exports / "executorch").metadata["get_eos_ids"] == [0, stop]
    assert load_eval_set(run, ValidateOptions(tokens=32, window=64, prompts=2)).eos_ids == [0, stop]


def test_doctor_compares_the_template_with_the_end_tokens(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "executorch"
    shutil.copytree(run.exports / "executorch", folder)
    assert doctor(folder, DoctorOptions()).faults == []
    # Another template in the folder, and no record of the training.
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|stop|>", "<|im_end|>"))
    assert [
        "The chat template ends answers with '<|im_end|>' (2)" in f for f in doctor(folder, DoctorOptions()).faults
    ] == [True]
    (folder / MANIFEST).unlink()
    assert len(doctor(folder, DoctorOptions()).faults) == 1


def test_verify_compares_the_end_tokens_of_an_onnx_folder_with_training(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(run.exports / "onnx", folder)
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["eos_token_id"] = [0]
    path.write_text(json.dumps(settings))
    relist(folder)
    faults = verify_folder(folder, "onnx", run.quantized).faults
    assert [fault.split(" (")[0] for fault in faults] == [
        f"genai_config.json: model.eos_token_id is [0], the export writes {end_tokens(run.quantized)}.",
        "Training ended answers with '<|stop|>'",
    ]


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_runtime_that_refuses_or_crashes_is_an_error(run: Run, target: str, tmp_path: Path) -> None:
    folder = tmp_path / target
    shutil.copytree(run.exports / target, folder)
    weights = folder / {"onnx": "model.onnx.data", "executorch": "model.pte"}[target]
    weights.write_bytes(weights.read_bytes()[:1000])
    prompt = text_prompt("say 3", load_tokenizer(run.quantized))
    with (
        pytest.raises(ArtifactError, match=r"refused it: .* Export it again"),
        target_named(target).open_generator(folder, load_tokenizer(folder)) as generator,
    ):
        generator.generate(prompt, lambda text: None, 2)


@pytest.mark.parametrize(
    ("source", "raw"), [("torch", True), ("torch", False), ("onnx", True), ("executorch", True), ("executorch", False)]
)
def test_every_runtime_continues_the_ids_of_training(
    run: Run, source: str, raw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(run.quantized)
    seen: list[list[int]] = []

    # ExecuTorch's runner compares its own ids with these, and refuses others.
    def recorded(generator: Any, prompt: Prompt, *rest: Any) -> bool:
        seen.append(prompt.ids)
        return answer(generator, prompt, *rest)

    monkeypatch.setattr("qat_edge.verbs.generate.answer", recorded)
    generate(run, "say 3", source, lambda text: None, raw=raw, max_new_tokens=2)

    (trained,) = tokenization.tokenize([Completion("say 3", " and on", "row")], tokenizer, 64).rows
    expected = text_prompt("say 3", tokenizer) if raw else chat_prompt(tokenizer, "say 3", None, {})
    assert seen == [expected.ids]
    assert seen[0][0] == tokenizer.bos_token_id
    if raw:
        assert trained["input_ids"][: len(seen[0])] == seen[0]


def test_every_runtime_decodes_greedily_whatever_the_model_sets(run: Run, lines: Recorder) -> None:
    search = json.loads((run.exports / "onnx" / "genai_config.json").read_text())["search"]
    assert (search["repetition_penalty"], search["no_repeat_ngram_size"], search["num_beams"]) == (3.0, 1, 1)
    (warning,) = [line for line in lines.lines if "generation_config.json sets" in line]
    assert "no_repeat_ngram_size 1, num_beams 2, repetition_penalty 3.0, stop_strings list of 1" in warning

    # A prompt with a printable text, decoded by hand: runtimes differ in how they show half a character.
    tokenizer, model, count = load_tokenizer(run.quantized), load_exact(run.quantized), 8
    expected = {}
    for prompt in map(chr, range(ord("A"), ord("z"))):
        ids = text_prompt(prompt, tokenizer).ids
        first = len(ids)
        with torch.no_grad():
            while len(ids) < first + count:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[first:])
        if text.isprintable() and text.isascii() and "<|" not in text and len(set(ids[first:])) < count:
            expected[prompt] = text
    prompt, text = expected.popitem()

    for source in ("torch", "onnx", "executorch"):
        pieces: list[str] = []
        generate(run, prompt, source, pieces.append, raw=True, max_new_tokens=count)
        assert "".join(pieces) == text, source


def test_generation_in_torch_ends_at_every_end_token(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_exact(run.quantized).generation_config.eos_token_id == end_tokens(run.quantized)
    seen: list[Any] = []

    def recorded(model: Any, *_: Any, **__: Any) -> None:
        seen.append(model.generation_config.eos_token_id)

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", recorded)
    generate(run, "say 3", "torch", lambda text: None, max_new_tokens=2)
    assert seen == [end_tokens(run.quantized)]


def test_a_prompt_beyond_the_positions_of_the_torch_model_is_refused(run: Run, lines: Recorder) -> None:
    with pytest.raises(UsageError, match=r"The prompt is \d+ tokens long and .*quantized holds 512 with its answer"):
        generate(run, "x" * 600, "torch", lambda text: None, raw=True)
    with progress.report_to(lines):
        generate(run, "x" * 510, "torch", lambda text: None, raw=True, max_new_tokens=5)
    assert lines.lines[-1].startswith("The answer ends after 1 token at most: the prompt has 511, and ")


def test_an_artifact_of_another_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "run")
    shutil.copytree(run.path, other.path)
    manifest = other.exports / "onnx" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"quantized_sha256": "0" * 64}))
    with pytest.raises(RunError, match=r"onnx was exported from an earlier .*quantized. Export again: .* --force"):
        generate(other, "say 3", "onnx", lambda text: None)
    # Without the checkpoint, as where the artifact is shipped alone, there is nothing to compare with.
    shutil.rmtree(other.quantized)
    generate(other, "say 3", "onnx", lambda text: None, max_new_tokens=1)


def test_a_prompt_that_the_runner_splits_otherwise_is_refused(run: Run) -> None:
    folder = run.exports / "executorch"
    tokenizer = load_tokenizer(folder)
    prompt = text_prompt("say 3", tokenizer)
    splitter = llm_runner._load_tokenizer(folder / "tokenizer.json")
    assert llm_runner.first_difference(llm_runner._split(splitter, prompt.text), prompt.ids) == ""
    other = Prompt(prompt.text, [*prompt.ids, 5])
    message = r"splits this prompt differently than training did .*first difference at token"
    with (
        pytest.raises(ArtifactError, match=message),
        generate_text.open_generator(folder, tokenizer) as generator,
    ):
        generator.generate(other, lambda text: None, 2)


def test_generate_takes_no_system_message_without_a_template(run: Run) -> None:
    with pytest.raises(UsageError, match="--system and --raw"):
        generate(run, "say 3", "torch", lambda text: None, raw=True, system="Be brief.")
    with pytest.raises(UsageError, match="System role not supported"):
        words = make_tokenizer()
        words.chat_template = "{{ raise_exception('System role not supported') }}"
        chat_prompt(words, "Hi", "Be brief.", {})
    words.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(UsageError, match=r"prompt with --system: the chat template leaves out message 1 .*'system'"):
        chat_prompt(words, "Hi", "Be brief.", {})


def test_an_empty_message_is_refused_and_an_empty_system_message_is_one() -> None:
    tokenizer = make_tokenizer()
    for prompt in ("", " \n"):
        with pytest.raises(UsageError, match="The prompt is empty"):
            chat_prompt(tokenizer, prompt, None, {})
    assert chat_prompt(tokenizer, "Hi", "", {}).text.startswith("<|im_start|>system\n<|im_end|>")
    assert "system" not in chat_prompt(tokenizer, "Hi", None, {}).text


def test_the_arguments_of_training_are_those_of_generation() -> None:
    words = tokenizer_for(THINKING)
    prompt = chat_prompt(words, "Hi", None, {"enable_thinking": False})
    assert prompt.text.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["<think>", "\n\n", "</think>", "\n\n", "Oslo", "\n\n", "now"], "Oslo\n\nnow"),
        (["Oslo"], "Oslo"),
        (["<thin", " air"], "<thin air"),
        (["<think>\n\n</think>\n\nOslo"], "Oslo"),
        (["  Oslo"], "  Oslo"),
        (["<think>", "\n"], "<think>\n"),
        (["<think>\n\n</think>"], ""),
        (["<think>", "\nUp north.\n", "</think>"], "<think>\nUp north.\n</think>"),
    ],
)
def test_an_empty_block_of_reasoning_is_not_shown(pieces: list[str], shown: str) -> None:
    found: list[str] = []
    take = WithoutPrefix(found.append, "<think>\n\n</think>\n\n")
    for piece in pieces:
        take(piece)
    take.finish()
    assert "".join(found) == shown
