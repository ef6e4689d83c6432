"""Parts that all grammars of a JSON schema share: keywords, which are refused by name otherwise, and limits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from qat_edge.data.answer_schema import AnswerSchema
from qat_edge.data.schema_parts import parts_of
from qat_edge.errors import ExportError
from qat_edge.readers import shorten

# Keywords that say nothing about a value. "format" is one by default in JSON schema.
ANNOTATIONS = frozenset((
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly",
    "writeOnly", "format", "contentEncoding", "contentMediaType", "contentSchema",
    "discriminator", "example", "externalDocs", "xml",  # of OpenAPI
))  # fmt: skip
FLAGS = frozenset(("uniqueItems", "nullable"))  # keywords that permit everything where they are false
# What to write in place of a keyword.
INSTEAD = {
    "nullable": 'write "type": [..., "null"]',
    "additionalItems": 'write "prefixItems" and "items", of draft 2020-12',
}
DEFINITIONS = ("$defs", "definitions")
PRIVATE = "x-"  # begins keywords that tools define for themselves
MOST_DIGITS = 16  # every double of so many digits is written without loss; JavaScript reads no larger integers exactly
LARGEST = 10**MOST_DIGITS - 1  # integer


def require_keywords(schema: dict[str, Any], known: Collection[str], runtime: str) -> None:
    """Require that a grammar can express every keyword of a schema.

    Args:
        schema: that is a valid JSON schema.
        known: keywords that the grammar expresses.
        runtime: what takes the grammar, for the message.

    Raises:
        ExportError: names the place, the keyword and the runtime.
    """
    for place, part in parts_of(schema):
        if isinstance(part, list):  # of older drafts: a schema for each item
            raise refuse(place, "is a list of schemas", runtime, 'write "prefixItems", of draft 2020-12')
        for keyword in part if isinstance(part, dict) else ():
            says_nothing = keyword in ANNOTATIONS or (keyword in FLAGS and part[keyword] is False)
            if keyword not in known and not says_nothing and not keyword.startswith(PRIVATE):
                raise refuse(f"{place}.{shorten(keyword)}", "is a keyword", runtime, INSTEAD.get(keyword, ""))


def with_text_around(answer: AnswerSchema, value: str, quote: Callable[[str], str]) -> str:
    """Return an answer as a part of a rule: its values, with the text around them.

    Args:
        answer: the schema.
        value: name of the rule of one value.
        quote: returns a text as a literal of the grammar.
    """
    lead, before, between, after = (
        quote(text) if text else "" for text in (answer.lead, answer.before, answer.between, answer.after)
    )
    parts = [f"({lead})?" if lead else "", before, value]
    parts += [] if answer.between is None else [f"({between} {value})*"]
    return " ".join(filter(None, [*parts, after]))


def refuse(place: str, what: str, runtime: str, instead: str = "") -> ExportError:
    """Return the error for a part of a schema.

    Args:
        place: inside the schema: "$.properties.name".
        what: it is or does, as a phrase with a verb.
        runtime: that cannot express it.
        instead: what to do there; remove or change it by default.
    """
    return ExportError(
        f"the schema cannot become a grammar: {shorten(place)} {what}, which {runtime} does not express. "
        + (f"There, {instead}" if instead else "Remove or change it there, and let the app check it")
    )
