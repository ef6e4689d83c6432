"""Check that a chat template writes everything that a conversation has, or say what it leaves out.

A field is used if the template writes something else with it than without it. Messages, tools, calls, reasoning and
arguments of the template that have no effect are refused; other fields are counted.

Texts have to be written whole. Each conversation is rendered a second time with probes in place of its texts; with the
texts put back, both renderings are equal up to white space, unless the template changes a text. A template may trim
texts, move them, quote them as JSON and write more around them. A text of a user, a tool or an answer that loses words
is refused; other changes are counted.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from qat_edge.data.chat_template import PROBE, ChatTemplate
from qat_edge.data.rows import REASONING, WEIGHT, Chat, Message, is_trained
from qat_edge.errors import DataError, ModelError
from qat_edge.readers import shorten, show

# Keys of messages that are refused, not counted, where they have no effect. Templates leave out past reasoning.
NEEDED = ("role", "content", "tool_calls", WEIGHT)
USED = (*NEEDED, *REASONING)
SURE_LENGTH = 24  # characters of a text that is not found by accident
SHOWN_WORDS = 5  # of a text that is left out, in a message
# Roles whose texts have to be written whole. Templates take switches such as /no_think out of messages of the system,
# and reasoning out of earlier answers.
WHOLE_ROLES = ("user", "tool")
REASONING_END = "</think>"  # of nearly all models that reason; others have it in their template
USUAL_ROLES = ("user", "assistant")  # that no template ignores


class TemplateUse:
    """Checks of conversations against one chat template.

    Attributes:
        unused: Number of messages with each field that the template does not use.
        rewritten: Number of messages that are trained on and whose text the template changes.
        changed_context: Number of other messages whose text the template changes.
        first_change: Name of the first of these, for messages.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.unused: Counter[str] = Counter()
        self.rewritten = self.changed_context = 0
        self.first_change = ""

    def as_read(self, chat: Chat, last: int) -> Chat:
        """Return the conversation in the form that the template reads.

        Templates differ in two points: arguments of calls are an object or its JSON text, and messages that only call
        tools have no content or an empty one.
        """
        if all("content" in m and "tool_calls" not in m for m in chat.messages):
            return chat
        failure: DataError | None = None
        is_python = False
        for as_text, fill in product((False, True), repeat=2):
            candidate = dataclasses.replace(chat, messages=[_in_form(m, as_text, fill) for m in chat.messages])
            try:
                text = self._template.render(candidate, last + 1)
            except DataError as error:
                failure = failure or error
                continue
            if not any(_is_python(arguments, text) for arguments in _arguments(candidate.messages)):
                return candidate
            is_python = True
        if not is_python and failure:
            raise failure
        raise DataError(
            f"{chat.where}: the chat template does not write arguments of tool calls as JSON. Write the calls into "
            "'content', as the model should answer, or use a model with tools in its template."
        )

    def check_arguments(self, chat: Chat) -> None:
        """Check that the template reads each argument that the row gives to it."""
        if not chat.template_arguments:
            return
        reserved = inspect.signature(self._template.tokenizer.apply_chat_template).parameters
        variables = self._template.facts(chat).variables
        for name in chat.template_arguments:
            if name in reserved or name == "messages":
                raise DataError(
                    f"{chat.where}: 'chat_template_kwargs' cannot have '{name}'. Give it as a key of the row."
                )
            if name not in variables:
                raise DataError(
                    f"{chat.where}: the chat template has no argument '{shorten(name)}', so it would have no effect. "
                    "Remove it from 'chat_template_kwargs'."
                )

    def check_message(self, chat: Chat, index: int, prompt: str, text: str) -> bool:
        """Check that the template writes calls, reasoning and the whole text of a message that is trained on.

        Args:
            chat: The conversation.
            index: Index of the message.
            prompt: The conversation rendered as the prompt of this message.
            text: The conversation rendered through this message.

        Returns:
            Whether the template changes more than white space in the text of the message.
        """
        message = chat.messages[index]
        reasoning = [key for key in REASONING if message.get(key)]
        if "tool_calls" in message and self._has_no_effect(chat, index, text, ["tool_calls"]):
            raise DataError(_calls_left_out(chat, index))
        if reasoning and self._has_no_effect(chat, index, text, reasoning):
            raise DataError(
                f"{chat.where}: message {index + 1}: '{reasoning[0]}' has no effect: the chat template leaves it out. "
                "Write the reasoning into 'content', as the model should answer, or remove it."
            )
        content = message.get("content", "")
        if self._is_in_answer(content, prompt, text):
            return False

        changed = self._render_changed(chat, index, {index: PROBE})
        if changed == text:
            raise DataError(
                f"{chat.where}: the chat template leaves out the text of message {index + 1} (role 'assistant')."
            )
        # A text without words may be trimmed to nothing: its row trains an end alone, which is counted.
        lost = _lost_words(content, text, changed or "")
        if lost and _words(content):
            raise DataError(
                f"{chat.where}: the chat template leaves out a part of message {index + 1} (role 'assistant'), "
                f"such as {', '.join(map(show, lost[:SHOWN_WORDS]))}. If that is reasoning, give it as "
                "'reasoning_content' to a model whose template writes it; otherwise remove it from 'content'."
            )
        self.rewritten += 1
        return True

    def check_context(self, chat: Chat, last: int, text: str) -> None:
        """Check that the template writes the messages, tools and documents before the last turn, and count fields.

        Args:
            chat: The conversation.
            last: Index of the last message that is trained on.
            text: The conversation rendered through that message.
        """
        messages = list(enumerate(chat.messages[: last + 1]))
        context = [i for i, message in messages if i < last or not is_trained(message)]
        # An empty text has nothing to lose, but the template may ignore the role of its message.
        texts = [i for i in context if _text(chat, i) or chat.messages[i]["role"] not in USUAL_ROLES]
        is_whole = _are_found(chat, text, texts) or self._is_whole(chat, last, text, texts)
        for i in context:
            if i in texts and not is_whole:
                self._check_text(chat, last, text, i)
            is_call = "tool_calls" in chat.messages[i] and not is_trained(chat.messages[i])
            if is_call and self._has_no_effect(chat, last, text, ["tool_calls"], at=i):
                raise DataError(_calls_left_out(chat, i))
        for i, _ in messages:
            self._count_fields(chat, last, text, i)

        lost = [tool["function"]["name"] for tool in chat.tools or () if tool["function"]["name"] not in text]
        if chat.tools and (lost or self._is_same(dataclasses.replace(chat, tools=None), last, text)):
            name = (lost or [chat.tools[0]["function"]["name"]])[0]
            raise DataError(
                f"{chat.where}: 'tools' have no effect: the chat template leaves out '{shorten(name)}'. Use a model "
                "with tools in its template, or describe them in a message of the system."
            )
        if chat.documents and self._is_same(dataclasses.replace(chat, documents=None), last, text):
            raise DataError(
                f"{chat.where}: 'documents' have no effect: the chat template leaves them out. Write them into "
                "a message."
            )

    def _is_in_answer(self, content: str, prompt: str, text: str) -> bool:
        """Return whether the part of a rendered conversation that follows a prompt has a text, white space aside."""
        # The text may begin in the prompt: some templates write an empty block of reasoning there.
        written, end = _squeezed(text), _squeezed(self._template.around.tail)
        before, content = len(_squeezed(prompt)), _squeezed(content)
        position = written.removesuffix(end).rfind(content)
        return not content or (position >= 0 and position + len(content) > before)

    def _is_whole(self, chat: Chat, last: int, text: str, indices: Sequence[int]) -> bool:
        """Return whether the template writes the texts of some messages as they are, white space aside."""
        probes = {i: f"{PROBE} {i}." for i in indices}
        probed = self._render_changed(chat, last, probes)
        if probed is None or any(probe not in probed for probe in probes.values()):
            return False
        # The probes are replaced in one pass: a text may have one of them in it.
        parts = re.split("(" + "|".join(map(re.escape, probes.values())) + ")", probed) if probes else [probed]
        contents = {probe: _text(chat, i) for i, probe in probes.items()}
        return _squeezed("".join(contents.get(part, part) for part in parts)) == _squeezed(text)

    def _check_text(self, chat: Chat, last: int, text: str, index: int) -> None:
        """Refuse the text of a message of the context that the template leaves out or shortens; count other changes."""
        message = chat.messages[index]
        role, content = message["role"], _text(chat, index)
        changed = self._render_changed(chat, last, {index: PROBE})
        if changed is None:
            return
        if changed == text and not is_trained(message):
            raise DataError(
                f"{chat.where}: the chat template leaves out message {index + 1} (role '{role}'). "
                "Remove it, or use a model whose template has this role."
            )
        # Templates leave out past reasoning, and it had a loss where it was the last.
        if role == "assistant":
            for end in filter(None, (REASONING_END, self._template.answer_start)):
                content = content.rpartition(end)[2]
        lost = _lost_words(content, text, changed)
        named = set(_words(self._template.facts(chat).source.casefold()))
        if role in WHOLE_ROLES and any(word.casefold() not in named for word in lost):
            raise DataError(
                f"{chat.where}: the chat template leaves out a part of message {index + 1} (role '{role}'), such as "
                f"{', '.join(map(show, lost[:SHOWN_WORDS]))}, so that the model would read another text. Correct the "
                "template of the model, or use another model."
            )
        forms = (content, _json(_text(chat, index))[1:-1])  # as it is, and as JSON has it
        if lost or not any(_squeezed(form) in _squeezed(text) for form in forms):
            self.changed_context += 1
            self.first_change = self.first_change or f"{chat.where}, message {index + 1}, role '{shorten(role)}'"

    def _count_fields(self, chat: Chat, last: int, text: str, index: int) -> None:
        """Count the further fields of a message that the template does not use."""
        source = self._template.facts(chat).source
        known = USED if is_trained(chat.messages[index]) else NEEDED
        for key in chat.messages[index]:
            # A template that never names a field cannot use it.
            if key not in known and (key not in source or self._has_no_effect(chat, last, text, [key], at=index)):
                self.unused[key] += 1

    def _has_no_effect(self, chat: Chat, last: int, text: str, keys: Sequence[str], at: int | None = None) -> bool:
        """Return whether the template writes the same without some fields of a message.

        Args:
            chat: The conversation.
            last: Index of the last message that is rendered.
            text: The conversation rendered through that message.
            keys: The fields; 'content' is none of them.
            at: Index of the message; `last` by default.
        """
        index = last if at is None else at
        changed = {key: value for key, value in chat.messages[index].items() if key not in keys}
        changed.setdefault("content", "")
        messages = [*chat.messages[:index], changed, *chat.messages[index + 1 :]]
        return self._is_same(dataclasses.replace(chat, messages=messages), last, text)

    def _render_changed(self, chat: Chat, last: int, contents: Mapping[int, str]) -> str | None:
        """Return a conversation rendered with other contents of some messages; None where the template refuses it."""
        messages = [{**m, "content": contents[i]} if i in contents else m for i, m in enumerate(chat.messages)]
        try:
            return self._template.render(dataclasses.replace(chat, messages=messages), last + 1)
        except (DataError, ModelError):
            return None

    def _is_same(self, changed: Chat, last: int, text: str) -> bool:
        """Return whether a changed conversation is rendered as `text`, not refused for what it lacks."""
        try:
            return self._template.render(changed, last + 1) == text
        except (DataError, ModelError):
            return False


def _are_found(chat: Chat, text: str, indices: Sequence[int]) -> bool:
    """Return whether a rendered conversation has the texts of some messages in order, none short enough for chance."""
    position = 0
    for i in indices:
        content = _text(chat, i)
        found = text.find(content, position)
        if found < 0 or len(content) < SURE_LENGTH:
            return False
        position = found + len(content)
    return True


def _lost_words(content: str, text: str, changed: str) -> list[str]:
    """Return the words of a message that a rendered text has less often than it should, in any case.

    Args:
        content: Text of the message.
        text: The conversation as it is rendered.
        changed: The same with a probe in place of this text.
    """
    whole, written, others = content.casefold(), text.casefold(), changed.casefold().replace(PROBE.casefold(), "")
    words = dict.fromkeys(_words(content) or content.split())
    expected = {word: others.count(word.casefold()) + whole.count(word.casefold()) for word in words}
    return [word for word, count in expected.items() if written.count(word.casefold()) < count]


def _text(chat: Chat, index: int) -> str:
    """Return the text of a message, empty where it only calls tools."""
    return str(chat.messages[index].get("content", "")).strip()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _squeezed(text: str) -> str:
    """Return a text without white space, which templates trim and insert anywhere."""
    return "".join(text.split())


def _calls_left_out(chat: Chat, index: int) -> str:
    return (
        f"{chat.where}: message {index + 1}: 'tool_calls' have no effect: the chat template leaves them out. Use a "
        "model with tools in its template, or write the call into 'content', as the model should answer."
    )


def _in_form(message: Message, as_text: bool, fill: bool) -> Message:
    """Return a message with the arguments of its calls as JSON text, and with an empty content for none."""
    changed = dict(message)
    if fill:
        changed.setdefault("content", "")
    if as_text and "tool_calls" in message:
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return changed


def _arguments(messages: Sequence[Message]) -> Iterator[Any]:
    return (call["function"]["arguments"] for m in messages for call in m.get("tool_calls", ()))


def _is_python(arguments: Any, text: str) -> bool:
    """Return whether a text has arguments in Python's notation, which a template writes that expects JSON text."""
    return isinstance(arguments, dict) and str(arguments) in text and str(arguments) != _json(arguments)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
