"""Keywords of JSON schema that a grammar can express; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qat_edge.data.answer_schema import parts_of
from qat_edge.errors import ExportError
from qat_edge.readers import shorten

# Keywords that say nothing about a value. "format" is one by default in JSON schema.
ANNOTATIONS = frozenset((
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly",
    "writeOnly", "format",
))  # fmt: skip
DEFINITIONS = ("$defs", "definitions")
PRIVATE = "x-"  # begins keywords that tools define for themselves


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
            raise refuse(place, "is a list of schemas", runtime)
        for keyword in part if isinstance(part, dict) else ():
            if keyword not in known and keyword not in ANNOTATIONS and not keyword.startswith(PRIVATE):
                raise refuse(f"{place}.{shorten(keyword)}", "is a keyword", runtime)


def refuse(place: str, what: str, runtime: str) -> ExportError:
    """Return the error for a part of a schema.

    Args:
        place: inside the schema: "$.properties.name".
        what: it is or does, as a phrase with a verb.
        runtime: that cannot express it.
    """
    return ExportError(
        f"the schema cannot become a grammar: {shorten(place)} {what}, which {runtime} does not express. Remove or "
        "change it there, and let the app check it"
    )
