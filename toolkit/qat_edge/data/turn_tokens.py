"""Texts of a conversation that spell tokens.

A tokenizer reads `<|im_end|>` in the text of a message as the token, as if the chat template had written it: the
message ends there, and the text after it can begin a turn of the system. Texts with tokens that begin or end messages
are refused. Other special tokens, such as <|python_tag|>, may be meant; they are counted.

Rows of 'text', 'prompt' and 'completion' are not checked: they are given to the tokenizer as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from qat_edge.data.chat_template import PROBE, ChatTemplate, encode
from qat_edge.data.rows import WEIGHT, Chat
from qat_edge.errors import DataError, ModelError
from qat_edge.readers import counted, shorten, show, texts_in

SHOWN_TOKENS = 5  # that a note names
# Conversations that show what a template writes before, between and after messages.
PROBES = (("user", "assistant", "user"), ("system", "user", "assistant"), ("user", "assistant"), ("user",))


class TurnTokens:
    """Checks that no text of a conversation spells a token that begins or ends messages."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._tokenizer = template.tokenizer
        # Numbers that `note` reports.
        self._texts = 0
        self._spelled: Counter[str] = Counter()

    def check(self, chat: Chat, count: int) -> None:
        """Check the first `count` messages, the tools and the further values of a conversation.

        Raises:
            DataError: A text spells a token that begins or ends messages.
        """
        for place, value in _parts(chat, count):
            found: set[int] = set()
            for text in texts_in(value):
                found |= self._ids_spelled(text)
            for token in sorted(found & self._boundaries):
                if self._is_written(chat, count, token):
                    raise DataError(
                        f"{chat.where}: {place} spells {show(self._names[token])}, a token with which the chat "
                        "template begins or ends messages, so that the model would read another conversation. Remove "
                        "it from the text, or render the conversation yourself, in rows of 'text' or of 'prompt' and "
                        "'completion' (`generate --raw`), whose tokens are read as written."
                    )
            others = found - self._boundaries
            self._texts += bool(others)
            self._spelled.update(self._names[token] for token in others)

    def note(self) -> list[str]:
        """Return a sentence about the other special tokens, or nothing where no text spells one."""
        if not self._texts:
            return []
        names = [shorten(name) for name, _ in self._spelled.most_common(SHOWN_TOKENS)]
        more = ", ..." if len(self._spelled) > SHOWN_TOKENS else ""
        shown = ", ".join(names) + more
        return [
            f"{counted(self._texts, 'text of a message spells', 'texts of messages spell')} special tokens ({shown}), "
            "read as such"
        ]

    def _ids_spelled(self, text: str) -> set[int]:
        """Return the tokens that a text spells."""
        # Tokenizing is slow, and nearly no text has any.
        if self._pattern is None or not (
            self._pattern.search(text) or (self._normalize and self._pattern.search(self._normalize(text)))
        ):
            return set()
        return self._names.keys() & set(encode(text, self._tokenizer))

    def _is_written(self, chat: Chat, count: int, token: int) -> bool:
        """Return whether the template writes the token where the texts spell it: some fields are not used."""

        def without(text: str) -> str:
            return PROBE if token in self._ids_spelled(text) else text

        changed = dataclasses.replace(
            chat,
            messages=_mapped(chat.messages, without), tools=_mapped(chat.tools, without),
            documents=_mapped(chat.documents, without), template_arguments=_mapped(chat.template_arguments, without),
        )  # fmt: skip
        numbers = []
        for each in (chat, changed):
            try:
                numbers.append(encode(self._template.render(each, count), self._tokenizer).count(token))
            except (DataError, ModelError):
                return True
        return numbers[0] != numbers[1]

    @cached_property
    def _names(self) -> dict[int, str]:
        """Special tokens, and tokens that begin or end messages, by id."""
        added = self._tokenizer.added_tokens_decoder
        special = {*self._tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return {i: token.content for i, token in added.items() if i in special | self._boundaries}

    @cached_property
    def _boundaries(self) -> frozenset[int]:
        """Ids of the tokens that begin or end messages."""
        tokens = self._tokenizer.added_tokens_decoder.items()
        added = {i for i, token in tokens if token.content.strip() and (token.special or _is_marker(token.content))}
        lead = set(encode(self._template.around.lead, self._tokenizer))
        found = {self._tokenizer.eos_token_id, *encode(self._template.around.tail, self._tokenizer)}
        for roles in PROBES:
            for role, between in self._between_messages(roles):
                # Before an answer, and in prompts of the template's own, there are blocks of reasoning and tools.
                ids = _without_blocks([i for i in encode(between, self._tokenizer) if i in added], self._closing)
                if role == "assistant":
                    ids = [i for i in ids if i not in lead and i not in self._closing]
                found.update(ids)
        return frozenset(found & added)

    @cached_property
    def _closing(self) -> dict[int, int]:
        """Tokens such as <think> with the token that closes them, </think>."""
        ids = {token.content: i for i, token in self._tokenizer.added_tokens_decoder.items()}
        closed = ((i, ids.get(f"{name[:1]}/{name[1:]}")) for name, i in ids.items())
        return {i: end for i, end in closed if end is not None}

    def _between_messages(self, roles: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Yield each role of a conversation and the text that the template writes between it and the message before."""
        contents = [f"{PROBE} {number}." for number in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        try:
            text = self._template.render(Chat(messages, "probe"), len(messages))
        except (DataError, ModelError):
            return  # some templates have no system role
        for index, (role, content) in enumerate(zip(roles, contents, strict=True)):
            before, found, text = text.partition(content)
            if not found:
                return
            # The first text has the beginning of the sequence, and often a system prompt, in front of the role.
            yield role, before if index else before.replace(self._tokenizer.bos_token or "\0", "", 1)

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        """Matches every text that spells a token of `_names`, and few others."""
        names = sorted({name for name in self._names.values() if name.strip()}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def _normalize(self) -> Callable[[str], str] | None:
        """The tokenizer's normalizer, where tokens are looked for in normalized text."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer if self._tokenizer.is_fast else None
        added = self._tokenizer.added_tokens_decoder
        if normalizer is None or not any(added[i].normalized for i in self._names):
            return None
        return normalizer.normalize_str


def _is_marker(name: str) -> bool:
    """Return whether a token's text marks something: some tokenizers have added tokens for words or white space."""
    name = name.strip()
    return len(name) > 2 and not name[0].isalnum() and not name[-1].isalnum() and any(map(str.isalnum, name))


def _without_blocks(ids: list[int], closing: dict[int, int]) -> list[int]:
    """Return ids without pairs such as <think> and a later </think>."""
    blocks = {
        pair
        for position, token in enumerate(ids)
        if closing.get(token) in ids[position + 1 :]
        for pair in (token, closing[token])
    }
    return [token for token in ids if token not in blocks]


def _parts(chat: Chat, count: int) -> Iterator[tuple[str, Any]]:
    """Yield the values of a conversation that a template can write, each with a name for messages."""
    for number, message in enumerate(chat.messages[:count], start=1):
        for key, value in message.items():
            if key != WEIGHT:
                yield f"message {number} (role '{shorten(message['role'])}'), '{shorten(key)}',", value
    yield "'tools'", chat.tools
    yield "'documents'", chat.documents
    yield "'chat_template_kwargs'", chat.template_arguments


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with its texts changed, and the keys of its objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value
