"""Rows of training and evaluation data, one class for each shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXPECTED = (
    "'messages' (a list of {role, content}), 'prompt' and 'completion', or 'text'; for an encoder 'text' and 'label', "
    "'text_a', 'text_b' and 'score', or 'anchor' and 'positive'"
)

WEIGHT = "weight"  # of a message: 0 is context without loss
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates and data sets give to it

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation. Every assistant message is trained on, unless its weight is 0.

    Attributes:
        messages: Messages with "role", "content" (absent where a message only calls tools), and the further keys of
            the row, such as "tool_calls" and "weight".
        where: File and line, for error messages.
        tools: JSON schemas of the tools that the assistant may call.
        documents: Documents for templates that quote them.
        template_arguments: Further arguments of the chat template, such as enable_thinking.
    """

    messages: list[Message]
    where: str
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """A prompt without a chat template, and the text that follows it.

    Attributes:
        prompt: Passed to the model as it is.
        completion: The part that is trained on.
        where: File and line, for error messages.
    """

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class NamedLabel:
    """A label that a data set stores as the number of its name.

    Attributes:
        index: Its number in the data set, from 0 on. Models order their labels in their own way.
        names: All labels of the data set, in the order of their numbers.
    """

    index: int
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[self.index]


@dataclass(frozen=True)
class Text:
    """Running text, trained on in windows; or the labelled text of a classifier.

    Attributes:
        text: The text, or the first of two.
        where: File and line, for error messages.
        label: The label as it is in the row, a `NamedLabel` where the data set names it; checked where a classifier
            is trained.
        pair: The second text, for a classifier of pairs.
    """

    text: str
    where: str
    label: Any = None
    pair: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two texts for a sentence encoder.

    Attributes:
        text_a: First text, or the anchor.
        text_b: Second text, or the positive.
        score: The cosine to train for, -1 to 1; None for a pair that belongs together.
        where: File and line, for error messages.
    """

    text_a: str
    text_b: str
    score: float | None
    where: str


Row = Chat | Completion | Text | Pair


def is_trained(message: Message) -> bool:
    """Return whether a message of a conversation has a loss."""
    return bool(message["role"] == "assistant" and message.get(WEIGHT, 1) != 0)
