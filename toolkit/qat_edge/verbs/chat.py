"""Answer one message after another with the run's frozen model in torch, or with an artifact in its own runtime.

The model stays loaded. Each prompt is the whole conversation in the model's chat template, as training rendered it. A
runtime that keeps its KV cache processes only what is new in it (`TextGenerator`); the text does not depend on that.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qat_edge import config, progress, stop_signals
from qat_edge.data.chat_template import ChatTemplate
from qat_edge.data.conversation import ChatFormat, Prompt
from qat_edge.data.rows import Message
from qat_edge.errors import DataError, UsageError
from qat_edge.options import CHAT_TOKENS, MOST_PROMPT
from qat_edge.readers import counted
from qat_edge.run import Run
from qat_edge.verbs.generate import Emit, FoundModel, answer, find_model
from qat_edge_exporters.targets import TextGenerator

RESET, EXIT, HELP = "/reset", "/exit", "/help"  # lines that are no messages
COMMANDS = (
    f"{RESET} forgets the conversation, {EXIT} or the end of the input ends the chat. Ctrl-C stops an answer, whose "
    "text so far stays in the conversation; at the prompt it ends the chat. Every other line is a message."
)


@dataclass(frozen=True)
class UserTurn:
    """A message that can be answered.

    Attributes:
        text: of the message.
        prompt: the conversation with it, up to where the answer begins.
        max_new_tokens: longest answer that fits.
    """

    text: str
    prompt: Prompt
    max_new_tokens: int


@dataclass(frozen=True)
class Reply:
    """The answer to one message.

    Attributes:
        text: as it was passed on, and as it is in the conversation.
        cut: why it did not end by itself, as a sentence; empty where it did.
    """

    text: str
    cut: str


class Conversation:
    """A conversation with a loaded model.

    Attributes:
        messages: the conversation so far: {"role", "content"} of each message.
    """

    def __init__(
        self, model: FoundModel, generator: TextGenerator, system: str | None = None, max_new_tokens: int = CHAT_TOKENS
    ) -> None:
        """Begin a conversation.

        Args:
            model: that answers.
            generator: the same model, loaded.
            system: system message before the conversation.
            max_new_tokens: longest answer, in tokens.
        """
        self.messages: list[Message] = []
        self._model = model
        self._generator = generator
        self._system = system
        self._most = max_new_tokens
        self._format = ChatFormat(model.tokenizer)
        self._block = ChatTemplate(model.tokenizer).empty_reasoning
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def send(self, message: str, emit: Emit = lambda text: None) -> str:
        """Answer a message, and return the answer.

        Args:
            message: the user's.
            emit: called with each piece of the answer as it comes.

        Raises:
            UsageError: the conversation with this message does not fit, or the chat template cannot write it. The
                message is left out of it.
            ArtifactError: the runtime failed.
        """
        reply = self.reply(self.turn(message), emit)
        if reply.cut:
            progress.info(reply.cut)
        return reply.text

    def turn(self, message: str) -> UserTurn:
        """Check a message, and put it into the chat template.

        Raises:
            UsageError: see `send`.
        """
        prompt = self.prompt(message)
        return UserTurn(message, prompt, self._free_tokens(prompt))

    def reply(self, turn: UserTurn, emit: Emit) -> Reply:
        """Answer a message, and put both into the conversation."""
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            emit(piece)

        has_ended = answer(self._generator, turn.prompt, self._block, take, turn.max_new_tokens)
        text = "".join(pieces)
        self.messages += [_from_user(turn.text), {"role": "assistant", "content": text}]
        return Reply(text, "" if has_ended else self._why_cut(turn.max_new_tokens))

    def forget_last(self) -> None:
        """Take the last message and its answer out of the conversation."""
        del self.messages[-2:]

    def stop(self) -> None:
        """End the answer in progress; callable from a signal handler."""
        self._generator.stop()

    def prompt(self, message: str) -> Prompt:
        """Return the conversation with a message in the model's chat template, up to where the answer begins.

        Raises:
            UsageError: the message is empty or no text, or the template refuses or leaves out a part of it.
        """
        config.require_text(message, "message", MOST_PROMPT)
        if not message.strip():
            raise UsageError("The message is empty, so there is nothing to answer.")
        try:
            messages = [*self.messages, _from_user(message)]
            return self._format.prompt(messages, self._model.template_arguments, where="conversation")
        except DataError as error:
            raise UsageError(f"{error} The message was left out. {RESET} begins another conversation.") from error

    def _free_tokens(self, prompt: Prompt) -> int:
        """Return how many tokens the answer may have.

        Raises:
            UsageError: none fits.
        """
        length, used = self._model.length, len(prompt.ids)
        if length is None:
            return self._most
        if used >= length:
            raise UsageError(
                f"The conversation is {used} tokens long with this message, and {self._model.folder} holds {length} "
                f"with the answer. The message was left out. {self._advice()}"
            )
        return min(self._most, length - used)

    def _why_cut(self, count: int) -> str:
        if count == self._most:
            return f"The answer was cut after {counted(count, 'token')}. A larger --max-new-tokens permits longer ones."
        return (
            f"The answer was cut after {counted(count, 'token')}: {self._model.folder} holds {self._model.length} "
            f"tokens of a conversation, and they are used up. {self._advice()}"
        )

    def _advice(self) -> str:
        longer = "; an export with a longer --context-length holds more" if self._model.target else ""
        return f"{RESET} begins another conversation{longer}."


@contextmanager
def open_conversation(
    run: Run, source: str, *, system: str | None = None, max_new_tokens: int = CHAT_TOKENS, constrained: bool = False
) -> Iterator[Conversation]:
    """Load a model for a conversation, until the end of the block.

    Args:
        run: a finished run.
        source: "torch" for the frozen checkpoint, or the name of an exported target.
        system: system message before the conversation.
        max_new_tokens: longest answer, in tokens.
        constrained: permit only answers by the artifact's schema, of `export --schema`.

    Raises:
        RunError: there is no such model, it was exported from another checkpoint, or runs on other machines only.
        UsageError: the tokenizer has no chat template, or the template refuses the system message.
        ArtifactError: the runtime refused the artifact.
    """
    model = find_model(run, source, "chat", constrained)
    if not model.tokenizer.chat_template:
        raise UsageError(
            "This model's tokenizer has no chat template, so there is no form for a conversation. `qat-edge generate "
            "--raw` continues a text."
        )
    with model.open_generator() as generator:
        conversation = Conversation(model, generator, system, max_new_tokens)
        if system is not None:
            conversation.prompt("Hello")  # a template without system messages is better known now
        yield conversation


def chat(
    run: Run,
    lines: Iterable[str],
    source: str,
    emit: Emit,
    *,
    system: str | None = None,
    max_new_tokens: int = CHAT_TOKENS,
    constrained: bool = False,
    goes_on: bool = False,
) -> None:
    """Answer each line until a line is /exit, or there is none; the text of the answers goes to `emit`.

    Args:
        run: a finished run.
        lines: messages and commands; see `COMMANDS`. The first is read when the model is loaded.
        source: "torch" for the frozen checkpoint, or the name of an exported target.
        emit: is called with each piece of text as it comes, and with a newline after each answer.
        system: system message before the conversation.
        max_new_tokens: longest answer, in tokens.
        constrained: see `open_conversation`.
        goes_on: warn about a message that cannot be answered and take the next one, as in front of a person. Without,
            it is an error: the next lines were written for another conversation.

    Raises:
        RunError: see `open_conversation`, like UsageError and ArtifactError.
        UsageError: a message cannot be answered.
        ArtifactError: the runtime failed.
    """
    opened = open_conversation(run, source, system=system, max_new_tokens=max_new_tokens, constrained=constrained)
    with opened as conversation:
        for line in lines:
            command = line.strip()
            if command == EXIT:
                return
            if command == RESET:
                conversation.reset()
                progress.info("The conversation is forgotten.")
            elif command == HELP:
                progress.info(COMMANDS)
            elif command:
                _answer_line(conversation, line.rstrip("\r\n"), emit, goes_on)


def _answer_line(conversation: Conversation, message: str, emit: Emit, goes_on: bool) -> None:
    """Answer one message; Ctrl-C ends the answer, and a second one the chat."""
    try:
        turn = conversation.turn(message)
    except UsageError as error:
        if not goes_on:
            raise
        progress.warn(str(error))
        return

    with stop_signals.defer_signals(lambda _: conversation.stop()) as request:
        reply = conversation.reply(turn, emit)
    emit("\n")
    if request.signum is None:
        note = reply.cut
    elif request.signum != signal.SIGINT:
        raise stop_signals.Stopped(request.signum)
    elif reply.text:
        note = "Stopped. The answer so far stays in the conversation."
    else:
        conversation.forget_last()
        note = "Stopped before the answer began: the message was left out of the conversation."
    if note:
        progress.info(note)


def _from_user(text: str) -> Message:
    return {"role": "user", "content": text}
