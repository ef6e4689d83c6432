"""The one place that decides what the chat template and the tokenizer make of a conversation.

    training     `ChatFormat.turns`: each assistant message with the prompt before it, and the token that ends it
    generation   `ChatFormat.prompt` and `text_prompt`: the same token ids as before a trained message
    evaluation   `Turn.expected` and `AnswerReader`: the answer alone, without an empty block of reasoning before it
    artifacts    `ChatFormat.ends`: the tokens that end a generation
    doctor       `template_faults`: the template of a folder compared with its end tokens

The prompt of a message is the conversation up to it, rendered with the template's generation prompt. Everything that
the template writes after that, such as an empty <think></think> block, is part of the message and has a loss.

`chat_template` renders the template within limits, `template_use` checks that it leaves nothing out, and `turn_tokens`
that no text of a message ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from qat_edge.data.chat_template import PROBE, ChatTemplate, encode
from qat_edge.data.rows import WEIGHT, Chat, Message, is_trained
from qat_edge.data.template_use import TemplateUse
from qat_edge.data.turn_tokens import TurnTokens
from qat_edge.errors import DataError, ModelError
from qat_edge.readers import counted, shorten

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
        expected: Text of the answer as it is trained, for exact match.
        is_rewritten: The template changes more than white space in the text of the row.
    """

    prompt_ids: list[int]
    ids: list[int]
    trained: int
    continues: bool
    expected: str
    is_rewritten: bool


class Lead(NamedTuple):
    """Tokens that a tokenizer puts before any text: a beginning-of-sequence token, or none, or several."""

    ids: list[int]
    text: str


@lru_cache(maxsize=4)
def lead_of(tokenizer: PreTrainedTokenizerBase) -> Lead:
    """Return what a tokenizer puts before any text, found once: nothing changes a tokenizer that is in use."""
    whole, plain = list(tokenizer(PROBE).input_ids), encode(PROBE, tokenizer)
    lengths = range(len(whole) - len(plain) + 1)
    ids = next((whole[:i] for i in lengths if whole[i : i + len(plain)] == plain), [])
    return Lead(ids, "".join(tokenizer.convert_ids_to_tokens(ids)))


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the id that ends a completion or a text, or nothing where the tokenizer has no end token."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def ended_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a completion or a text with the end token after them.

    Where the text spells the end token at its end, it gets no second one, and white space after it is left out.
    """
    end = end_ids(tokenizer)
    if not end or end[0] not in ids:
        return ids + end
    last = len(ids) - ids[::-1].index(end[0])
    return ids + end if str(tokenizer.decode(ids[last:])).strip() else ids[:last]


def text_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return a text without a chat template as a prompt, as training sees the prompt of a completion.

    A text that spells the beginning-of-sequence token at its beginning gets no second one.
    """
    lead, ids = lead_of(tokenizer), encode(text, tokenizer)
    if ids[: len(lead.ids)] == lead.ids:
        return Prompt(text, ids)
    return Prompt(lead.text + text, lead.ids + ids)


def extend_ids(ids: list[int], text: str, longer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a longer text so that the result begins with the ids of its beginning.

    If a token would span the end of `text`, the rest is tokenized on its own, as in generation.

    Args:
        ids: Token ids of `text`.
        text: Beginning of `longer`.
        longer: The text to tokenize.
        tokenizer: The model's tokenizer.
    """
    lead = lead_of(tokenizer)
    # A rendered chat template brings its own beginning-of-sequence token; a bare prompt got it before its text.
    start = lead.ids if ids[: len(lead.ids)] == lead.ids and not text.startswith(lead.text) else []
    whole = start + encode(longer, tokenizer)
    if whole[: len(ids)] == ids:
        return whole
    return ids + _inner_ids(longer.removeprefix(text), tokenizer)


def _inner_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a text that other text precedes: some tokenizers put a space before every text that they are given."""
    ids = encode(text, tokenizer)
    if tokenizer.decode(encode("a", tokenizer) + encode("b", tokenizer)) == "ab":
        return ids
    for before in ("\n", ".", "a"):
        known, both = encode(before, tokenizer), encode(before + text, tokenizer)
        if both[: len(known)] == known:
            return both[len(known) :]
    return ids


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
        self._template = ChatTemplate(tokenizer)
        self._use = TemplateUse(self._template)
        self._turn_tokens = TurnTokens(self._template)
        # Counts that `notes` reports: rows with an unused last message, and turns that the template does not end.
        self._unanswered = self._closed = self._open = 0

    def turns(self, chat: Chat) -> list[Turn]:
        """Return the messages of a conversation that are trained on, each with its prompt.

        Raises:
            DataError: The template cannot write the conversation, or leaves a part of it out, or a text of it spells a
                token that begins or ends messages.
            ModelError: The template cannot be used at all.
        """
        last = max(i for i, message in enumerate(chat.messages) if is_trained(message))
        self._unanswered += last + 1 < len(chat.messages)
        self._use.check_arguments(chat)
        chat = self._use.as_read(chat, last)
        self._turn_tokens.check(chat, last + 1)

        found: list[Turn] = []
        ids: list[int] = []
        text = ""  # the rendered conversation that `ids` stands for
        for i, message in enumerate(chat.messages):
            if not is_trained(message):
                continue

            # Render the conversation up to this message and through it. Training has to continue the same prompt as
            # generation does.
            through = self._template.render(chat, i + 1)
            if i == 0:
                prompt = self._template.first_prompt(chat, through)
            else:
                prompt = self._template.render(chat, i, add_generation_prompt=True)
            if not through.startswith(prompt):
                raise DataError(
                    f"{chat.where}: the chat template does not render message {i + 1} after its own generation prompt, "
                    "so training would differ from generation. Give 'prompt' and 'completion' rows instead."
                )
            is_rewritten = self._use.check_message(chat, i, prompt, through)

            # Continue the example of the turn before, unless that turn was rendered differently or ended with a token
            # that the template does not write.
            continues = bool(ids) and prompt.startswith(text)
            if not continues:
                ids, text = [], ""
            prompt_ids = extend_ids(ids, text, prompt, self.tokenizer)
            whole = extend_ids(prompt_ids, prompt, through, self.tokenizer)
            turn = self._turn(message, prompt_ids, whole[len(prompt_ids) :], continues, is_rewritten)
            found.append(turn)
            ids, text = (whole, through) if len(whole) == len(prompt_ids) + len(turn.ids) else ([], "")

        self._use.check_context(chat, last, through)
        return found

    def prompt(
        self,
        messages: list[Message],
        template_arguments: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        where: str = "prompt",
    ) -> Prompt:
        """Return the prompt of the assistant's next message.

        Args:
            messages: The conversation so far.
            template_arguments: Further arguments of the chat template.
            tools: JSON schemas of the tools that the assistant may call; see `takes_tools`.
            where: How error messages name the conversation.

        Raises:
            DataError: The template cannot write these messages, or leaves one or the tools out, or a text of them
                spells a token that begins or ends messages.
            ModelError: The template cannot be used at all.
        """
        # Earlier answers are context here: with weight 0 they are checked as such, and the template never sees it.
        context = [{**message, WEIGHT: 0} if message["role"] == "assistant" else message for message in messages]
        chat = Chat(context, where, tools, template_arguments=dict(template_arguments or {}))
        last = len(messages) - 1
        self._use.check_arguments(chat)
        chat = self._use.as_read(chat, last)
        self._turn_tokens.check(chat, len(messages))
        self._use.check_context(chat, last, self._template.render(chat, len(messages)))
        text = self._template.render(chat, len(messages), add_generation_prompt=True)
        return Prompt(text, encode(text, self.tokenizer))

    def takes_tools(self, tools: list[dict[str, Any]]) -> bool:
        """Return whether the template writes tools into a prompt."""
        messages = [{"role": "user", "content": PROBE}]
        try:
            text = self._template.render(Chat(messages, "probe", tools), 1, add_generation_prompt=True)
        except (DataError, ModelError):
            return False
        return all(tool["function"]["name"] in text for tool in tools)

    def notes(self) -> list[str]:
        """Return what was left out of the conversations so far, and how answers end where the template says nothing."""
        lines = []
        if self._use.unused:
            fields = ", ".join(f"'{shorten(key)}' in {count}" for key, count in self._use.unused.most_common(10))
            lines.append(f"Fields of messages that the chat template does not use: {fields} messages")
        if self._use.rewritten:
            lines.append(
                f"The chat template changes the text of {counted(self._use.rewritten, 'message')} of the assistant: "
                "training takes the text as the template writes it, and evaluation expects it so"
            )
        if self._use.changed_context:
            lines.append(
                f"The chat template changes or shortens the text of {counted(self._use.changed_context, 'message')} "
                f"without loss (the first: {self._use.first_change}): the model reads the text as the template writes "
                "it"
            )
        lines += self._turn_tokens.note()
        if self._unanswered:
            lines.append(
                f"{counted(self._unanswered, 'row ends', 'rows end')} with a message that no answer follows; it is not "
                "used"
            )
        if self._closed:
            end = self.tokenizer.eos_token
            lines.append(
                f"The chat template writes no token at the end of an answer. Answers are trained to end with {end}, "
                "the tokenizer's end token, so that generation ends there"
            )
        if self._open:
            lines.append(
                "Neither the chat template nor the tokenizer has a token that ends an answer: generation will run to "
                "its limit. Set eos_token in the model's tokenizer_config.json"
            )
        if self._template.reads(CLOCK):
            lines.append(
                "The chat template writes the current date into prompts: a run that is resumed on another day has "
                "other data. Where the template takes a date, fix it in 'chat_template_kwargs'"
            )
        return lines

    def _turn(
        self, message: Message, prompt_ids: list[int], ids: list[int], continues: bool, is_rewritten: bool
    ) -> Turn:
        """Return the turn of a message, which ends with the tokenizer's end token where the template writes none."""
        trained, end = self._turn_length(ids), self._template.end_token(ids)
        expected = message.get("content", "")
        if is_rewritten or "tool_calls" in message:
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
        return Turn(prompt_ids, ids, trained, continues, expected, is_rewritten)

    def _turn_length(self, ids: list[int]) -> int:
        """Return the number of tokens of an assistant message up to its end-of-turn token.

        White space that a template adds after that token has no loss.
        """
        # The last special token ends the turn, unless text follows it.
        special = set(self.tokenizer.all_special_ids)
        last = max((i for i, token in enumerate(ids) if token in special), default=len(ids) - 1)
        rest = self.tokenizer.decode(ids[last + 1 :])
        return len(ids) if rest.strip() else last + 1


# --- answers and artifacts ---------------------------------------------------------------------------------


class AnswerReader:
    """Takes the answer out of a generated text: without special tokens, and without reasoning before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        has_template = bool(tokenizer.chat_template)
        template = ChatTemplate(tokenizer)
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
        if any(token in text for token in self._special):
            text = str(self._tokenizer.decode(encode(text, self._tokenizer), skip_special_tokens=True))
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

    template = ChatTemplate(tokenizer)
    try:
        prompt = template.render(Chat([{"role": "user", "content": PROBE}], "probe"), 1, add_generation_prompt=True)
    except (DataError, ModelError) as error:
        return [*faults, f"The chat template cannot be used: {error}"]
    end = template.end
    if end is not None and end not in ends and end not in lost:
        faults.append(
            f"The chat template ends answers with {tokenizer.convert_ids_to_tokens(end)!r} ({end}), which is not among "
            f"the end tokens {list(ends)}: generation would not stop there."
        )
    if encode(prompt, tokenizer)[:2] == [tokenizer.bos_token_id] * 2:
        faults.append(f"The chat template begins prompts with {tokenizer.bos_token} twice.")
    return faults
