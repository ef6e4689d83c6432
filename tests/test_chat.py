"""A conversation with every form of a model: its prompts, its signals, its limits, and what ends it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import make_tokenizer, short_training
from data.chat_templates import THINKING, tokenizer_for
from qat_edge import api, stop_signals
from qat_edge.cli import commands, console
from qat_edge.data.conversation import ChatFormat, Prompt
from qat_edge.errors import ArtifactError, RunError, UsageError
from qat_edge.evaluate.results import Parity
from qat_edge.options import ExportOptions
from qat_edge.run import Run
from qat_edge.verbs.chat import COMMANDS, Conversation, chat, open_conversation
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.generate import FoundModel, find_model
from qat_edge_exporters.targets import TARGETS, target_named

CONTEXT = 4096
INSTALLED = [name for name in ("executorch", "onnx", "gguf", "hf") if not target_named(name).runs_elsewhere]
SOURCES = [
    pytest.param(name, marks=pytest.mark.skipif(name not in ("torch", *INSTALLED), reason=f"{name} cannot run here"))
    for name in ("torch", "executorch", "onnx", "gguf", "hf")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model whose answers depend on the whole prompt and never end by themselves: it gives no special token."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2 * CONTEXT, tie_word_embeddings=False,
            initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    made = Run(folder / "run")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    options = short_training(folder / "model", folder, rows, steps=2, learning_rate=1e-6, rotate="off")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat_edge.verbs.export._measure_parity", lambda *_: Parity(not_measured="Measured elsewhere."))
        finetune(options, made.path)
        export(made, ExportOptions(target=tuple(INSTALLED), context_length=CONTEXT))
    return made


# --- every runtime ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_each_turn_continues_the_whole_conversation(run: Run, source: str) -> None:
    with open_conversation(run, source, system="Be brief.", max_new_tokens=12) as conversation:
        first = conversation.send("say 3")
        turn = conversation.turn("say 4")
        second = conversation.reply(turn, lambda piece: None).text

        # The template writes the conversation, with the answer as it was shown.
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "say 3"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "say 4"},
        ]
        model = find_model(run, source, "chat")
        assert turn.prompt == ChatFormat(model.tokenizer).prompt(messages)
        assert conversation.messages == [*messages, {"role": "assistant", "content": second}]

        # A process that never saw the first turn gives the same answer.
        with model.open_generator() as fresh:
            pieces: list[str] = []
            assert not fresh.generate(turn.prompt, pieces.append, 12)
            assert "".join(pieces) == second != first

        conversation.reset()
        assert conversation.send("say 3") == first


@pytest.mark.parametrize("source", SOURCES)
def test_ctrl_c_ends_the_answer_and_not_the_conversation(run: Run, source: str) -> None:
    command = [sys.executable, "-m", "qat_edge", "chat", str(run.path), "--from", source, "--max-new-tokens", "3900"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    answers = []
    with subprocess.Popen(command, bufsize=0, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        for message in (b"say 3\n", b"say 4\n"):
            process.stdin.write(message)
            answer = process.stdout.read(1)
            assert answer, process.stderr.read()
            process.send_signal(signal.SIGINT)
            while b"Stopped" not in (line := process.stderr.readline()):
                assert line, "the chat ended"
            assert b"The answer so far stays in the conversation." in line
            # All of it was printed before that line.
            while select.select([process.stdout], [], [], 0.2)[0]:
                answer += process.stdout.read(2**16)
            answers.append(answer)
        output, errors = process.communicate(timeout=300)
    assert (process.returncode, output, errors) == (0, b"", b"")
    assert all(answer.endswith(b"\n") for answer in answers) and answers[0] != answers[1]


def test_a_runtime_that_dies_ends_the_chat(run: Run) -> None:
    with (
        pytest.raises(
            ArtifactError, match=r"onnxruntime-genai ended in the middle of the conversation: .*\(Killed\)"
        ) as e,
        open_conversation(run, "onnx", max_new_tokens=4) as conversation,
    ):
        conversation.send("say 3")
        generator: Any = conversation._generator
        os.kill(generator._runner._process.pid, signal.SIGKILL)
        conversation.send("say 4")
    assert e.value.exit_code == 1
    assert len(conversation.messages) == 2


def test_the_python_api_has_conversations(run: Run) -> None:
    pieces: list[str] = []
    with api.chat(run.path, max_new_tokens=4) as conversation:
        assert conversation.send("say 3", pieces.append) == "".join(pieces) != ""
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    with pytest.raises(UsageError, match="max_new_tokens"):
        api.chat(run.path, max_new_tokens=0).__enter__()


@pytest.mark.parametrize(
    ("source", "message"),
    [("executorch-vulkan", "executorch-vulkan cannot run here"), ("tflite", "--from tflite: not known. Known: torch")],
)
def test_a_source_that_cannot_run_is_named(run: Run, source: str, message: str) -> None:
    with pytest.raises((RunError, UsageError), match=message):
        chat(run, [], source, print)


def test_a_run_without_the_artifact_is_named(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path)
    (tmp_path / "quantized").symlink_to(run.quantized)
    with pytest.raises(RunError, match=r"exports/onnx is missing. `qat-edge export .*` makes it"):
        chat(other, [], "onnx", print)


# --- the loop over lines, with a stand-in for the model --------------------------------------------------------


@dataclass(frozen=True)
class StandIn(FoundModel):
    """A model whose answer is `answer(prompt, emit)`."""

    answer: Callable[[Prompt, Callable[[str], None]], None] = lambda prompt, emit: emit("Yes.")

    @contextmanager
    def open_generator(self) -> Iterator[Any]:
        yield self

    def generate(self, prompt: Prompt, emit: Callable[[str], None], max_new_tokens: int) -> bool:
        self.answer(prompt, emit)
        return max_new_tokens >= 4

    def stop(self) -> None:
        """Do nothing: `answer` ends by itself."""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that chats with a stand-in and returns the text of its answers."""

    def ask(
        *lines: str, tokenizer: Any = None, arguments: Any = None, length: int | None = None, **options: Any
    ) -> str:
        found = {"answer": options.pop("answer")} if "answer" in options else {}
        model = StandIn(Path("folder"), None, tokenizer or make_tokenizer(), arguments or {}, length, **found)
        monkeypatch.setattr("qat_edge.verbs.chat.find_model", lambda *_: model)
        pieces: list[str] = []
        chat(Run(Path("run")), lines, "torch", pieces.append, **options)
        return "".join(pieces)

    return ask


def recorded(prompts: list[str]) -> Callable[[Prompt, Callable[[str], None]], None]:
    def answer(prompt: Prompt, emit: Callable[[str], None]) -> None:
        prompts.append(prompt.text)
        emit("Yes.")

    return answer


def test_lines_are_messages_or_commands(stand_in: Any, messages: list[str]) -> None:
    prompts: list[str] = []
    lines = ("Hi\n", "\n", " /help \n", "/hello there\r\n", "/reset\n", "Again", "/exit\n", "never read\n")
    assert stand_in(*lines, answer=recorded(prompts), system="Short.") == "Yes.\n" * 3
    system = "<|im_start|>system\nShort.<|im_end|>\n"
    first = f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[0] == first
    assert prompts[1] == f"{first}Yes.<|im_end|>\n<|im_start|>user\n/hello there<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[2] == first.replace("Hi", "Again")
    assert messages == [COMMANDS, "The conversation is forgotten."]


def test_a_conversation_that_does_not_fit_is_refused_whole(stand_in: Any, messages: list[str]) -> None:
    prompts: list[str] = []
    lines = ["Hi", "x" * 200, "Hi", "/reset", "Hi"]
    message = (
        r"^The conversation is 2\d\d tokens long with this message, and folder holds 120 with the answer. The message "
    )
    with pytest.raises(UsageError, match=message + r"was left out\. /reset begins another conversation\.$"):
        stand_in(*lines, length=120)
    # In front of a person it is a warning, and the conversation goes on without that message.
    assert stand_in(*lines, length=120, goes_on=True, answer=recorded(prompts)) == "Yes.\n" * 3
    assert prompts[1].count("Hi") == 2 and "xx" not in prompts[1] and prompts[2] == prompts[0]
    assert messages[0].startswith("The conversation is 2")


def test_an_answer_that_was_cut_says_why(stand_in: Any, messages: list[str]) -> None:
    stand_in("Hi", max_new_tokens=3)
    stand_in("Hi", length=len(ChatFormat(make_tokenizer()).prompt([{"role": "user", "content": "Hi"}]).ids) + 2)
    assert messages[0] == "The answer was cut after 3 tokens. A larger --max-new-tokens permits longer ones."
    assert messages[1].startswith("The answer was cut after 2 tokens: folder holds ")
    assert messages[1].endswith(" are used up. /reset begins another conversation.")


def test_a_longer_context_is_advised_for_an_artifact() -> None:
    model = StandIn(Path("folder"), TARGETS["onnx"], make_tokenizer(), {}, 10)
    conversation = Conversation(model, model)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="an export with a longer --context-length holds more"):
        conversation.send("Hi")


def test_a_message_that_spells_a_token_is_refused(stand_in: Any) -> None:
    with pytest.raises(UsageError, match=r"'<\|im_end\|>'.* The message was left out. /reset begins another"):
        stand_in("Hi", "Hi<|im_end|>")


def test_an_answer_of_reasoning_is_written_as_the_template_writes_earlier_turns(stand_in: Any) -> None:
    tokenizer, prompts = tokenizer_for(THINKING), list[str]()

    def answer(prompt: Prompt, emit: Callable[[str], None]) -> None:
        prompts.append(prompt.text)
        emit("<think>\nUp north.\n</think>\n\nOslo" if len(prompts) == 1 else "<think>\n\n</think>\n\nYes.")

    shown = stand_in("Where?", "Sure?", "Really?", tokenizer=tokenizer, answer=answer)
    assert shown == "<think>\nUp north.\n</think>\n\nOslo\nYes.\nYes.\n"
    said = ["Where?", "<think>\nUp north.\n</think>\n\nOslo", "Sure?", "Yes.", "Really?"]
    whole = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    assert prompts[2] == ChatFormat(tokenizer).prompt(whole).text
    assert "Up north" not in prompts[2] and "Oslo" in prompts[2]


def test_the_arguments_of_training_are_those_of_every_turn(stand_in: Any) -> None:
    prompts: list[str] = []
    arguments = {"enable_thinking": False}
    stand_in("Hi", "Hi", tokenizer=tokenizer_for(THINKING), arguments=arguments, answer=recorded(prompts))
    assert [prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts] == [True, True]


def test_a_template_that_cannot_chat_is_refused_before_the_first_message(stand_in: Any) -> None:
    def unread() -> Iterator[str]:
        raise AssertionError("a line was read")
        yield

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(UsageError, match=r"conversation: the chat template leaves out message 1 .*'system'"):
        stand_in(*(), tokenizer=tokenizer, system="Be brief.")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="tokenizer has no chat template, so there is no form for a conversation"):
        stand_in(*(), tokenizer=tokenizer)


# --- signals --------------------------------------------------------------------------------------------------


def test_an_answer_stopped_before_it_began_leaves_no_trace(stand_in: Any, messages: list[str]) -> None:
    prompts: list[str] = []

    def answer(prompt: Prompt, emit: Callable[[str], None]) -> None:
        prompts.append(prompt.text)
        if len(prompts) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            emit("Yes.")

    with stop_signals.raise_on_signals():
        assert stand_in("One", "Two", answer=answer) == "\nYes.\n"
    assert messages == ["Stopped before the answer began: the message was left out of the conversation."]
    assert "One" not in prompts[1]


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143)])
def test_a_second_ctrl_c_and_other_signals_end_the_chat(stand_in: Any, signals: list[int], code: int) -> None:
    def answer(prompt: Prompt, emit: Callable[[str], None]) -> None:
        for each in signals:
            os.kill(os.getpid(), each)

    with pytest.raises(stop_signals.Stopped) as stopped, stop_signals.raise_on_signals():
        stand_in("One", answer=answer)
    assert stopped.value.exit_code == code


# --- the command line -----------------------------------------------------------------------------------------


def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: bytes | str) -> Any:
    model = StandIn(Path("folder"), None, make_tokenizer(), {}, None)
    monkeypatch.setattr("qat_edge.verbs.chat.find_model", lambda *_: model)
    monkeypatch.setattr("qat_edge.cli.commands._open", lambda path: Run(path))
    return CliRunner().invoke(commands.main, ["chat", str(tmp_path)], input=typed)


def test_a_pipe_gets_answers_and_no_prompt_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = invoke(monkeypatch, tmp_path, "Hi\nAnd now?")
    assert (done.exit_code, done.stdout) == (0, "Yes.\nYes.\n"), done.output
    done = invoke(monkeypatch, tmp_path, b"Hi\n\xff\n")
    assert done.exit_code == 2 and "stdin: this is not text in utf-8" in done.output, done.output


def test_a_prompt_ends_with_the_input_and_with_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(*events: Any) -> list[str]:
        def prompt(*_: Any, **__: Any) -> str:
            event = events_left.pop(0)
            if isinstance(event, str):
                return event
            try:
                raise event
            except BaseException:
                raise click.Abort from None

        events_left = list(events)
        monkeypatch.setattr("click.prompt", prompt)
        return list(console.typed_lines())

    assert typed("Hi", "", EOFError()) == ["Hi", ""]
    assert typed("Hi", stop_signals.Stopped(signal.SIGINT)) == ["Hi"]
    with pytest.raises(stop_signals.Stopped):
        typed("Hi", stop_signals.Stopped(signal.SIGTERM))
