"""A model's chat template: rendered within limits, and examined for what it writes around an answer."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from qat_edge.data.rows import REASONING, WEIGHT, Chat
from qat_edge.data.template_limits import (
    RENDERING_ERRORS,
    TemplateFacts,
    TemplateLimitError,
    check_template,
    limit_rendering,
)
from qat_edge.data.template_sandbox import limit_operations
from qat_edge.errors import DataError, ModelError
from qat_edge.models.tokenizer_check import PROCESSOR_TEMPLATE, TEMPLATE_FILE, encoding_errors
from qat_edge.readers import shorten

MAX_REASON = 300  # characters of a template's error that a message quotes
# Texts that stand for any other, to see what a template writes around them.
PROBE, PROBE_REASONING = "qat-edge probe", "qat-edge reasoning"


@dataclass(frozen=True)
class AroundAnswer:
    """Texts that a template writes around an answer.

    Attributes:
        lead: Between the generation prompt and the answer.
        tail: After the answer.
        after_reasoning: Between reasoning and the answer.
    """

    lead: str
    tail: str
    after_reasoning: str


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._facts: dict[str, TemplateFacts] = {}

    def reads(self, variable: str) -> bool:
        """Return whether a template that was rendered reads a variable or calls a function of this name."""
        return any(variable in facts.variables for facts in self._facts.values())

    def render(self, chat: Chat, count: int, add_generation_prompt: bool = False) -> str:
        """Render the first `count` messages, without a generation prompt unless it is requested."""
        text = self._render(chat, count, add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix(self._fixed_prompt)

    def _render(self, chat: Chat, count: int, add_generation_prompt: bool) -> str:
        """Render the first `count` messages as the chat template writes them."""
        facts = self.facts(chat)
        messages = [{key: value for key, value in m.items() if key != WEIGHT} for m in chat.messages[:count]]
        try:
            with limit_rendering(), limit_operations():
                return str(
                    self.tokenizer.apply_chat_template(
                        messages, tools=chat.tools, documents=chat.documents, chat_template=facts.source,
                        tokenize=False, add_generation_prompt=add_generation_prompt, **chat.template_arguments,
                    )
                )  # fmt: skip
        except TemplateLimitError as error:
            raise ModelError(f"{chat.where}: the chat template was stopped: {error}. Use another model.") from error
        except SyntaxError as error:
            raise ModelError(_unreadable(error)) from error
        except RENDERING_ERRORS as error:
            roles, reason = ", ".join(m["role"] for m in messages), shorten(str(error), MAX_REASON)
            if isinstance(error, jinja2.TemplateError):
                raise DataError(f"{chat.where}: the chat template refuses the roles {roles}: {reason}") from error
            raise DataError(
                f"{chat.where}: the chat template cannot write the messages of {roles} ({type(error).__name__}: "
                f"{reason})."
            ) from error

    def facts(self, chat: Chat) -> TemplateFacts:
        """Return the template for a conversation: some models have one of their own for tools.

        Raises:
            DataError: There is none.
            ModelError: It cannot be used.
        """
        if not self.tokenizer.chat_template:
            unread = Path(str(self.tokenizer.name_or_path)) / PROCESSOR_TEMPLATE
            hint = f"Write the text of 'chat_template' in {unread} into {TEMPLATE_FILE} next to it, use"
            raise DataError(
                f"{chat.where}: the rows have 'messages', but the tokenizer of --model has no chat template. "
                f"{hint if unread.is_file() else 'Use'} an instruction-tuned model, or give --data rows of 'prompt' "
                "and 'completion'."
            )
        try:
            source = self.tokenizer.get_chat_template(tools=chat.tools)
            if source not in self._facts:
                self._facts[source] = check_template(source)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise ModelError(_unreadable(error)) from error
        except TemplateLimitError as error:
            raise ModelError(f"The chat template of the model is refused: {error}. Use another model.") from error
        return self._facts[source]

    def first_prompt(self, chat: Chat, through: str) -> str:
        """Return the prompt of an assistant's message that begins the conversation.

        transformers renders no empty conversation, so the prompt ends with the generation prompt of another one.
        """
        other = dataclasses.replace(chat, messages=[{"role": "user", "content": PROBE}])
        opening = self.render(other, 1, add_generation_prompt=True).removeprefix(self.render(other, 1))
        start = through.find(opening)
        if not opening or start < 0:
            raise DataError(
                f"{chat.where}: message 1 is the assistant's, and the chat template has no prompt for it. Begin with a "
                "message of the user, or give message 1 the weight 0."
            )
        return through[: start + len(opening)]

    def end_token(self, ids: list[int]) -> int | None:
        """Return the control token at the end of an assistant message, before white space; None if there is none."""
        for i in reversed(range(len(ids))):
            if ids[i] in self._control_ids:
                return ids[i] if not str(self.tokenizer.decode(ids[i + 1 :])).strip() else None
        return None

    @property
    def end(self) -> int | None:
        """Return the id of the token that the template writes after an answer; None where it writes none."""
        return self.end_token(encode(self.around.tail, self.tokenizer))

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Special tokens, and added tokens that the template writes after an answer.

        Some tokenizers do not mark the token that ends a turn as special. Others have added tokens, such as
        </tool_call>, that may end the text of an answer but not the turn.
        """
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return frozenset(special | ({*encode(self.around.tail, self.tokenizer)} & added.keys()))

    @cached_property
    def _fixed_prompt(self) -> str:
        """Generation prompt that some templates write after every conversation, even if it is not requested.

        Empty for all others. It is no part of an answer: a turn ends before it.
        """
        question, answer = {"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}
        chat = Chat([question, answer, question], "probe")
        try:
            requested = self._render(chat, 1, add_generation_prompt=True)
            prompt, through, longer = (self._render(chat, count, add_generation_prompt=False) for count in (1, 2, 3))
        except (DataError, ModelError):
            return ""
        before, _, tail = through.rpartition(PROBE)
        after = longer.removeprefix(before + PROBE)
        # Where another message follows, an end of turn stays, and a generation prompt goes.
        if requested != prompt or not through.startswith(prompt) or after == longer or after.startswith(tail):
            return ""

        # The turn ends with its first token that is not text, or with its line.
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        ends = [(tail.find(token), -len(token)) for token in tokens if token in tail]
        start, length = min(ends, default=(_common_start(tail, after).rfind("\n") + 1, 0))
        found = tail[start - length :].lstrip()
        return found if prompt.endswith(found) else ""

    @cached_property
    def around(self) -> AroundAnswer:
        """Texts that the template writes around an answer; empty where it cannot write a plain conversation."""
        question, answer = {"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}
        plain = Chat([question, answer], "probe")
        reasoned = Chat([question, {**answer, REASONING[0]: PROBE_REASONING}], "probe")
        try:
            prompt = self.render(plain, 1, add_generation_prompt=True)
            through = self.render(plain, 2)
            lead, tail = _around_probe(through.removeprefix(prompt))
            reasoning, _ = _around_probe(self.render(reasoned, 2).removeprefix(prompt))
        except (DataError, ModelError):
            return AroundAnswer("", "", "")
        if not through.startswith(prompt):
            return AroundAnswer("", tail, "")
        return AroundAnswer(
            lead, tail, reasoning.rpartition(PROBE_REASONING)[2] if PROBE_REASONING in reasoning else ""
        )

    @cached_property
    def answer_start(self) -> str:
        """Text that ends the part before an answer, such as </think>; empty where the answer comes first."""
        # Where the template writes something before every answer, and where reasoning is given, both end alike.
        plain, reasoned = self.around.lead, self.around.after_reasoning
        both = _common_end(plain, reasoned) if plain.strip() and reasoned.strip() else ""
        return ((both.strip() or plain.strip() or reasoned.strip()).split() or [""])[-1]

    @property
    def empty_reasoning(self) -> str:
        """Text that the template writes between the generation prompt and an answer without reasoning."""
        return self.around.lead

    @property
    def answer_end(self) -> str:
        """Text, in ordinary tokens, that the template writes after an answer."""
        return str(self.tokenizer.decode(encode(self.around.tail, self.tokenizer), skip_special_tokens=True)).strip()


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text without special tokens around it.

    Raises:
        DataError: The tokenizer fails on the text.
    """
    with encoding_errors(text):
        return list(tokenizer.encode(text, add_special_tokens=False))


def _unreadable(error: Exception) -> str:
    return (
        f"The chat template of the model cannot be read ({shorten(str(error), MAX_REASON)}). Correct it in its folder."
    )


def _around_probe(text: str) -> tuple[str, str]:
    """Return the texts before and after the last probe, which a template may have in capitals."""
    starts = [found.start() for found in re.finditer(re.escape(PROBE), text, flags=re.IGNORECASE)]
    return (text[: starts[-1]], text[starts[-1] + len(PROBE) :]) if starts else ("", text)


def _common_start(one: str, other: str) -> str:
    """Return the longest text that both begin with."""
    return _common_end(one[::-1], other[::-1])[::-1]


def _common_end(one: str, other: str) -> str:
    """Return the longest text that both end with."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
