"""The one place that decides what the chat template and the tokenizer make of a conversation.

    training     `ChatFormat.turns`: each assistant message with the prompt before it, and the token that ends it
    generation   `ChatFormat.prompt` and `text_prompt`: the same token ids as before a trained message
    evaluation   `Turn.expected` and `AnswerReader`: the answer alone, without an empty block of reasoning before it
    artifacts    `ChatFormat.ends` and `ChatFormat.template_end`: tokens that end a generation
    doctor       `template_faults`: the template of a folder compared with its end tokens

The prompt of a message is the conversation up to it, rendered with the template's generation prompt. Everything that
the template writes after that, such as an empty <think></think> block, is part of the message and has a loss.

Fields of a row are used if the template writes something else with them than without them. Where tools, calls,
reasoning or a message have no effect the row is refused; other fields are counted, and `ChatFormat.notes` reports them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from os.path import commonprefix
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from qat_edge.data.rows import REASONING, WEIGHT, Chat, Message, is_trained
from qat_edge.data.template_limits import (
    RENDERING_ERRORS,
    TemplateFacts,
    TemplateLimitError,
    check_template,
    limit_rendering,
)
from qat_edge.errors import DataError, ModelError
from qat_edge.readers import shorten

USED = ("role", "content", "tool_calls", WEIGHT, *REASONING)  # keys of messages that are refused, not counted
MAX_REASON = 300  # characters of a template's error that a message quotes
# Texts that stand for any other, to see what a template writes around them.
PROBE, PROBE_REASONING = "qat-edge probe", "qat-edge reasoning"
CLOCK = "strftime_now"  # a function of transformers for templates


@dataclass(frozen=True)
class Prompt:
    """A prompt for generation.

    Attributes:
        text: For runtimes that take text; its token ids there have to be `ids`.
        ids: As training saw them.
    """

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Turn:
    """An assistant message that is trained on.

    Attributes:
        prompt_ids: Token ids before the message, as in generation.
        ids: Token ids of the message: its text, its end, and white space that the template writes after that.
        trained: Number of `ids` with a loss; the others follow the end.
        continues: The prompt begins with all ids of the turn before.
        expected: Text of the answer, for exact match.
    """

    prompt_ids: list[int]
    ids: list[int]
    trained: int
    continues: bool
    expected: str


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before any text: a beginning-of-sequence token, or nothing."""
    # The tokens around an empty text; an end token alone does not count.
    first = tokenizer("").input_ids[:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the id that ends a completion or a text, or nothing where the tokenizer has no end token."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def text_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return a text without a chat template as a prompt, as training sees the prompt of a completion."""
    lead = leading_ids(tokenizer)
    return Prompt((tokenizer.bos_token if lead else "") + text, lead + encode(text, tokenizer))


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text without special tokens around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def extend_ids(ids: list[int], text: str, longer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a longer text so that the result begins with the ids of its beginning.

    If a token would span the end of `text`, the rest is tokenized on its own, as in generation.

    Args:
        ids: Token ids of `text`.
        text: Beginning of `longer`.
        longer: The text to tokenize.
        tokenizer: The model's tokenizer.
    """
    lead = leading_ids(tokenizer)
    # A rendered chat template brings its own beginning-of-sequence token; a bare prompt got it before its text.
    start = lead if lead and ids[:1] == lead and not text.startswith(tokenizer.bos_token) else []
    whole = start + encode(longer, tokenizer)
    if whole[: len(ids)] == ids:
        return whole
    return ids + encode(longer.removeprefix(text), tokenizer)


# --- one conversation --------------------------------------------------------------------------------------


class ChatFormat:
    """The chat template and the tokenizer of one model.

    Attributes:
        tokenizer: The model's tokenizer.
        ends: Ids of the tokens that ended the turns so far, in the order of their first use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ends: dict[int, None] = {}
        self._facts: dict[str, TemplateFacts] = {}
        # What `notes` reports.
        self._unused: Counter[str] = Counter()
        self._unanswered = self._closed = self._open = 0

    def turns(self, chat: Chat) -> list[Turn]:
        """Return the messages of a conversation that are trained on, each with its prompt.

        Raises:
            DataError: The template cannot write the conversation, or leaves a part of it out.
            ModelError: The template cannot be used at all.
        """
        last = max(i for i, message in enumerate(chat.messages) if is_trained(message))
        self._unanswered += any(message["role"] != "assistant" for message in chat.messages[last + 1 :])
        self._check_arguments(chat)
        chat = self._as_read(chat, last)

        found: list[Turn] = []
        ids: list[int] = []
        text = ""  # the rendered conversation that `ids` stands for
        for i, message in enumerate(chat.messages):
            if not is_trained(message):
                continue

            # Render the conversation up to this message and through it. Training has to continue the same prompt as
            # generation does.
            through = self._render(chat, i + 1)
            prompt = self._render(chat, i, add_generation_prompt=True) if i else self._first_prompt(chat, through)
            if not through.startswith(prompt):
                raise DataError(
                    f"{chat.where}: the chat template does not render message {i + 1} after its own generation prompt, "
                    "so training would differ from generation. Give 'prompt' and 'completion' rows instead."
                )
            self._check_message(chat, i, through)

            # An earlier turn was rendered differently, or ended with a token that the template does not write: this
            # turn has a prompt of its own.
            continues = bool(ids) and prompt.startswith(text)
            if not continues:
                ids, text = [], ""
            prompt_ids = extend_ids(ids, text, prompt, self.tokenizer)
            whole = extend_ids(prompt_ids, prompt, through, self.tokenizer)
            turn = self._turn(message, prompt_ids, whole[len(prompt_ids) :], continues)
            found.append(turn)
            ids, text = (whole, through) if len(whole) == len(prompt_ids) + len(turn.ids) else ([], "")

        self._check_context(chat, last, through)
        return found

    def prompt(self, messages: list[Message], template_arguments: Mapping[str, Any] | None = None) -> Prompt:
        """Return the prompt of the assistant's next message.

        Raises:
            DataError: The template cannot write these messages.
            ModelError: The template cannot be used at all.
        """
        chat = Chat(messages, "prompt", template_arguments=dict(template_arguments or {}))
        self._check_arguments(chat)
        text = self._render(chat, len(messages), add_generation_prompt=True)
        return Prompt(text, encode(text, self.tokenizer))

    def template_end(self) -> int | None:
        """Return the id of the token that the template writes after an answer; None where it writes none."""
        return self._end_token(encode(self._around.tail, self.tokenizer))

    def notes(self) -> list[str]:
        """Return what was left out of the conversations so far, and how answers end where the template says nothing."""
        lines = []
        if self._unused:
            fields = ", ".join(f"'{shorten(key)}' in {count}" for key, count in self._unused.most_common(10))
            lines.append(f"Fields of messages that the chat template does not use: {fields} messages")
        if self._unanswered:
            lines.append(f"{self._unanswered} rows end with a message that no answer follows; it is not used")
        if self._closed:
            end = self.tokenizer.eos_token
            lines.append(
                f"The chat template writes no token at the end of an answer. Answers are trained to end with {end}, the "
                "tokenizer's end token, so that generation ends there"
            )
        if self._open:
            lines.append(
                "Neither the chat template nor the tokenizer has a token that ends an answer: generation will run to "
                "its limit. Set eos_token in the model's tokenizer_config.json"
            )
        if any(CLOCK in facts.variables for facts in self._facts.values()):
            lines.append(
                "The chat template writes the current date into prompts: a run that is resumed on another day has other "
                "data. Where the template takes a date, fix it in 'chat_template_kwargs'"
            )
        return lines

    # --- rendering -----------------------------------------------------------------------------------------

    def _render(self, chat: Chat, count: int, add_generation_prompt: bool = False) -> str:
        """Render the first `count` messages with the chat template."""
        facts = self._template(chat)
        messages = [{key: value for key, value in m.items() if key != WEIGHT} for m in chat.messages[:count]]
        try:
            with limit_rendering():
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

    def _template(self, chat: Chat) -> TemplateFacts:
        """Return the template for a conversation: some models have one of their own for tools.

        Raises:
            DataError: There is none.
            ModelError: It cannot be used.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{chat.where}: the rows have 'messages', but the tokenizer of --model has no chat template. Use an "
                "instruction-tuned model, or give --data rows of 'prompt' and 'completion'."
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

    def _first_prompt(self, chat: Chat, through: str) -> str:
        """Return the prompt of an assistant's message that begins the conversation.

        transformers renders no empty conversation, so the prompt ends with the generation prompt of another one.
        """
        other = dataclasses.replace(chat, messages=[{"role": "user", "content": PROBE}])
        opening = self._render(other, 1, add_generation_prompt=True).removeprefix(self._render(other, 1))
        start = through.find(opening)
        if not opening or start < 0:
            raise DataError(
                f"{chat.where}: message 1 is the assistant's, and the chat template has no prompt for it. Begin with a "
                "message of the user, or give message 1 the weight 0."
            )
        return through[: start + len(opening)]

    def _as_read(self, chat: Chat, last: int) -> Chat:
        """Return the conversation in the form that the template reads.

        Templates differ in two points: arguments of calls are an object or its JSON text, and messages that only call
        tools have no content or an empty one.
        """
        if all("content" in m and "tool_calls" not in m for m in chat.messages):
            return chat
        failure: DataError | None = None
        for as_text, fill in product((False, True), repeat=2):
            candidate = dataclasses.replace(chat, messages=[_in_form(m, as_text, fill) for m in chat.messages])
            try:
                text = self._render(candidate, last + 1)
            except DataError as error:
                failure = failure or error
                continue
            if not any(_is_python(arguments, text) for arguments in _arguments(candidate.messages)):
                return candidate
        raise failure or DataError(
            f"{chat.where}: the chat template does not write arguments of tool calls as JSON. Write the calls into "
            "'content', as the model should answer, or use a model with tools in its template."
        )

    # --- the end of a turn ---------------------------------------------------------------------------------

    def _turn(self, message: Message, prompt_ids: list[int], ids: list[int], continues: bool) -> Turn:
        """Return the turn of a message, which ends with the tokenizer's end token where the template writes none."""
        trained, end = self._turn_length(ids), self._end_token(ids)
        expected = message.get("content", "")
        if "tool_calls" in message:
            expected = str(self.tokenizer.decode(ids[:trained], skip_special_tokens=True)).strip()

        if end is None and self.tokenizer.eos_token_id is not None:
            end = int(self.tokenizer.eos_token_id)
            ids = [*ids, end]
            trained = len(ids)
            self._closed += 1
        elif end is None:
            self._open += 1
        if end is not None:
            self.ends[end] = None
        return Turn(prompt_ids, ids, trained, continues, expected)

    def _turn_length(self, ids: list[int]) -> int:
        """Return the number of tokens of an assistant message up to its end-of-turn token.

        White space that a template adds after that token has no loss.
        """
        # The last special token ends the turn, unless text follows it.
        special = set(self.tokenizer.all_special_ids)
        last = max((i for i, token in enumerate(ids) if token in special), default=len(ids) - 1)
        rest = self.tokenizer.decode(ids[last + 1 :])
        return len(ids) if rest.strip() else last + 1

    def _end_token(self, ids: list[int]) -> int | None:
        """Return the control token at the end of an assistant message, before white space; None if there is none."""
        for i in reversed(range(len(ids))):
            if ids[i] in self._control_ids:
                return ids[i] if not str(self.tokenizer.decode(ids[i + 1 :])).strip() else None
        return None

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Special tokens, and added tokens that the template writes after an answer.

        Some tokenizers do not mark the token that ends a turn as special. Others have added tokens, such as
        </tool_call>, that may end the text of an answer but not the turn.
        """
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return frozenset(special | ({*encode(self._around.tail, self.tokenizer)} & added.keys()))

    @cached_property
    def _around(self) -> _Around:
        """Texts that the template writes around an answer; empty where it cannot write a plain conversation."""
        question, answer = {"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}
        plain, reasoned = Chat([question, answer], "probe"), Chat([question, {**answer, REASONING[0]: ""}], "probe")
        reasoned.messages[1][REASONING[0]] = PROBE_REASONING
        try:
            prompt = self._render(plain, 1, add_generation_prompt=True)
            lead, _, tail = self._render(plain, 2).removeprefix(prompt).rpartition(PROBE)
            reasoning = self._render(reasoned, 2).removeprefix(prompt).rpartition(PROBE)[0]
        except (DataError, ModelError):
            return _Around("", "", "")
        return _Around(lead, tail, reasoning.rpartition(PROBE_REASONING)[2] if PROBE_REASONING in reasoning else "")

    @cached_property
    def answer_start(self) -> str:
        """Text that ends the part before an answer, such as </think>; empty where the answer comes first."""
        # Where the template writes something before every answer, and where reasoning is given, both end alike.
        plain, reasoned = self._around.lead, self._around.after_reasoning
        both = commonprefix([plain[::-1], reasoned[::-1]])[::-1] if plain.strip() and reasoned.strip() else ""
        return ((both.strip() or plain.strip() or reasoned.strip()).split() or [""])[-1]

    @property
    def empty_reasoning(self) -> str:
        """Text that the template writes between the generation prompt and an answer without reasoning."""
        return self._around.lead

    @property
    def answer_end(self) -> str:
        """Text, in ordinary tokens, that the template writes after an answer."""
        return str(self.tokenizer.decode(encode(self._around.tail, self.tokenizer), skip_special_tokens=True)).strip()

    # --- nothing is left out -------------------------------------------------------------------------------

    def _check_arguments(self, chat: Chat) -> None:
        """Check that the template reads each argument that the row gives to it."""
        if not chat.template_arguments:
            return
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters
        variables = self._template(chat).variables
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

    def _check_message(self, chat: Chat, index: int, text: str) -> None:
        """Check that the template writes the calls and the reasoning of a message that is trained on."""
        message = chat.messages[index]
        calls = [key for key in ("tool_calls",) if key in message]
        reasoning = [key for key in REASONING if message.get(key)]
        if calls and self._has_no_effect(chat, index, text, calls):
            raise DataError(
                f"{chat.where}: message {index + 1}: 'tool_calls' have no effect: the chat template leaves them out. Use "
                "a model with tools in its template, or write the call into 'content', as the model should answer."
            )
        if reasoning and self._has_no_effect(chat, index, text, reasoning):
            raise DataError(
                f"{chat.where}: message {index + 1}: '{reasoning[0]}' has no effect: the chat template leaves reasoning "
                "out. Write it into 'content', as the model should answer, or remove it."
            )
        content = message.get("content", "")
        if content.strip() and content.strip() not in text and self._has_no_effect(chat, index, text, ["content"]):
            raise DataError(
                f"{chat.where}: the chat template leaves out the text of message {index + 1} (role 'assistant')."
            )

    def _check_context(self, chat: Chat, last: int, text: str) -> None:
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
            is_context = message["role"] != "assistant"
            if is_context and found < 0 and self._has_no_effect(chat, last, text, ["content"], at=i):
                raise DataError(
                    f"{chat.where}: the chat template leaves out message {i + 1} (role '{message['role']}'). Remove it, "
                    "or use a model whose template has this role."
                )
            self._count_fields(chat, last, text, i)

        for tool in chat.tools or ():
            if tool["function"]["name"] not in text:
                raise DataError(
                    f"{chat.where}: 'tools' have no effect: the chat template leaves out '{tool['function']['name']}'. "
                    "Use a model with tools in its template, or describe them in a message of the system."
                )
        if chat.documents and self._render(dataclasses.replace(chat, documents=None), last + 1) == text:
            raise DataError(
                f"{chat.where}: 'documents' have no effect: the chat template leaves them out. Write them into a message."
            )

    def _count_fields(self, chat: Chat, last: int, text: str, index: int) -> None:
        """Count the further fields of a message that the template does not use."""
        source = self._template(chat).source
        for key in chat.messages[index]:
            # A template that never names a field cannot use it.
            if key not in USED and (key not in source or self._has_no_effect(chat, last, text, [key], at=index)):
                self._unused[key] += 1

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
        try:
            return self._render(dataclasses.replace(chat, messages=messages), last + 1) == text
        except DataError:
            return False  # a template that needs the field uses it


@dataclass(frozen=True)
class _Around:
    """Texts that a template writes around an answer.

    Attributes:
        lead: Between the generation prompt and the answer.
        tail: After the answer.
        after_reasoning: Between reasoning and the answer.
    """

    lead: str
    tail: str
    after_reasoning: str


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


def _unreadable(error: Exception) -> str:
    return (
        f"The chat template of the model cannot be read ({shorten(str(error), MAX_REASON)}). Correct it in its folder."
    )


# --- answers and artifacts ---------------------------------------------------------------------------------


class AnswerReader:
    """Takes the answer out of a generated text: without special tokens, and without reasoning before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        has_template = bool(tokenizer.chat_template)
        template = ChatFormat(tokenizer)
        self._start = template.answer_start if has_template else ""
        self._end = template.answer_end if has_template else ""
        self._special = sorted(
            {*tokenizer.all_special_tokens, *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)}
        )

    def from_ids(self, ids: Sequence[int]) -> str:
        """Return the answer in generated token ids."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        if self._start:
            whole = str(self._tokenizer.decode(ids, skip_special_tokens=False))
            if self._start in whole:
                text = whole
        return self.from_text(text)

    def from_text(self, text: str) -> str:
        """Return the answer in a generated text."""
        if self._start and self._start in text:
            text = text.partition(self._start)[2]
            for token in self._special:
                text = text.replace(token, "")
        return text.strip().removesuffix(self._end) if self._end else text


def template_faults(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], trained: Sequence[int] | None
) -> list[str]:
    """Compare the chat template of a folder with the end tokens of an artifact; one sentence for each fault.

    Args:
        tokenizer: Of the folder.
        ends: Ids of the tokens that end a generation.
        trained: Ids of the tokens that ended the turns in training; None where they are not known.
    """
    lost = [token for token in trained or () if token not in ends]
    faults = [
        f"Training ended answers with {tokenizer.convert_ids_to_tokens(token)!r} ({token}), which is not among the end "
        f"tokens {list(ends)}: generation would not stop there."
        for token in lost
    ]
    # A run without conversations has no use for the template.
    if not tokenizer.chat_template or (trained is not None and not trained):
        return faults

    template = ChatFormat(tokenizer)
    try:
        prompt = template.prompt([{"role": "user", "content": PROBE}])
    except (DataError, ModelError) as error:
        return [*faults, f"The chat template cannot be used: {error}"]
    end = template.template_end()
    if end is not None and end not in ends and end not in lost:
        faults.append(
            f"The chat template ends answers with {tokenizer.convert_ids_to_tokens(end)!r} ({end}), which is not among "
            f"the end tokens {list(ends)}: generation would not stop there."
        )
    if prompt.ids[:2] == [tokenizer.bos_token_id] * 2:
        faults.append(f"The chat template begins prompts with {tokenizer.bos_token} twice.")
    return faults
