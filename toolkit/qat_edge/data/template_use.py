"""Check that a chat template writes everything that a conversation has, or say what it leaves out.

A field is used if the template writes something else with it than without it. Messages, tools, calls, reasoning and
arguments of the template that have no effect are refused; other fields are counted.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from qat_edge.data.chat_template import PROBE, ChatTemplate
from qat_edge.data.rows import REASONING, WEIGHT, Chat, Message, is_trained
from qat_edge.errors import DataError, ModelError
from qat_edge.readers import shorten, show

# Keys of messages that are refused, not counted, where they have no effect. Templates leave out past reasoning.
NEEDED = ("role", "content", "tool_calls", WEIGHT)
USED = (*NEEDED, *REASONING)
SHOWN_WORDS = 5  # of a text that is left out, in a message
USUAL_ROLES = ("user", "assistant")  # that no template ignores


class TemplateUse:
    """Checks of conversations against one chat template.

    Attributes:
        unused: Number of messages with each field that the template does not use.
        rewritten: Number of messages that are trained on and whose text the template changes.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.unused: Counter[str] = Counter()
        self.rewritten = 0

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

    def check_message(self, chat: Chat, index: int, text: str) -> None:
        """Check that the template writes calls, reasoning and the whole text of a message that is trained on."""
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
        if content.strip() and content.strip() not in text and self._has_no_effect(chat, index, text, ["content"]):
            raise DataError(
                f"{chat.where}: the chat template leaves out the text of message {index + 1} (role 'assistant')."
            )
        # White space may change anywhere: templates trim texts, and reasoning inside of them.
        if "".join(content.split()) not in "".join(text.split()):
            lost = _lost_words(content, text)
            if lost:
                raise DataError(
                    f"{chat.where}: the chat template leaves out a part of message {index + 1} (role 'assistant'), "
                    f"such as {', '.join(map(show, lost[:SHOWN_WORDS]))}. If that is reasoning, give it as "
                    "'reasoning_content' to a model whose template writes it; otherwise remove it from 'content'."
                )
            self.rewritten += 1

    def check_context(self, chat: Chat, last: int, text: str) -> None:
        """Check that the template writes the messages, tools and documents before the last turn, and count fields.

        Args:
            chat: The conversation.
            last: Index of the last message that is trained on.
            text: The conversation rendered through that message.
        """
        position = 0
        for i, message in enumerate(chat.messages[: last + 1]):
            # A search is enough for nearly all; templates may also rewrite a text, or move it.
            content = message.get("content", "").strip()
            found = text.find(content, position)
            position = found + len(content) if found >= 0 else position
            if not is_trained(message):
                # Short results of tools and messages of the system may be found by accident.
                unsure = message["role"] not in USUAL_ROLES or (content and found < 0)
                if unsure and self._has_no_effect(chat, last, text, ["content"], at=i):
                    raise DataError(
                        f"{chat.where}: the chat template leaves out message {i + 1} (role '{message['role']}'). "
                        "Remove it, or use a model whose template has this role."
                    )
                if "tool_calls" in message and self._has_no_effect(chat, last, text, ["tool_calls"], at=i):
                    raise DataError(_calls_left_out(chat, i))
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

    def _count_fields(self, chat: Chat, last: int, text: str, index: int) -> None:
        """Count the further fields of a message that the template does not use."""
        source = self._template.facts(chat).source
        known = USED if is_trained(chat.messages[index]) else NEEDED
        for key in chat.messages[index]:
            # A template that never names a field cannot use it.
            if key not in known and (key not in source or self._has_no_effect(chat, last, text, [key], at=index)):
                self.unused[key] += 1

    def _has_no_effect(self, chat: Chat, last: int, text: str, keys: Sequence[str], at: int | None = None) -> bool:
        """Return whether the template writes the same without some fields of a message, and with another content.

        Args:
            chat: The conversation.
            last: Index of the last message that is rendered.
            text: The conversation rendered through that message.
            keys: The fields.
            at: Index of the message; `last` by default.
        """
        index = last if at is None else at
        changed = {key: value for key, value in chat.messages[index].items() if key not in keys or key == "content"}
        changed["content"] = PROBE if "content" in keys else changed.get("content", "")
        messages = [*chat.messages[:index], changed, *chat.messages[index + 1 :]]
        return self._is_same(dataclasses.replace(chat, messages=messages), last, text)

    def _is_same(self, changed: Chat, last: int, text: str) -> bool:
        """Return whether a changed conversation is rendered as `text`, not refused for what it lacks."""
        try:
            return self._template.render(changed, last + 1) == text
        except (DataError, ModelError):
            return False


def _lost_words(content: str, text: str) -> list[str]:
    """Return the words of a message that a rendered text does not have, in any case."""
    written = text.casefold()
    words = dict.fromkeys(re.findall(r"[^\W_]+", content))
    return [word for word in words if word.casefold() not in written]


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
