"""Write a JSON schema as the grammar that onnxruntime-genai takes: `set_guidance("lark_grammar", TEXT)`.

onnxruntime-genai has the library llguidance built in, which reads the schema itself; the grammar adds the text around
the JSON. It permits less in two points, without which a model may write spaces or digits up to the longest answer, or a
number that no float holds, such as 1e400:

    spaces      at most a space, or a line break with up to 20 spaces or tabs
    numbers     at most 16 digits before the decimal point, where the schema has no bounds, and no exponent, which
                guidance writes for no number with bounds

guidance itself permits no escapes but those that JSON requires, and no negative multiples.

The keywords were tried in onnxruntime-genai 0.18.0. Whether it takes the values of the keywords, such as a
regular expression, shows when the exported folder is tried.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qat_edge.data.answer_schema import AnswerSchema
from qat_edge.data.exclusive_schemas import are_exclusive
from qat_edge.data.possible_values import TYPES
from qat_edge.data.schema_parts import IN_PLACE, LISTED, NAMED, SINGLE, parts_of
from qat_edge.readers import show
from qat_edge_exporters.onnx.guidance_patterns import for_guidance, has_escaped_character
from qat_edge_exporters.schema_keywords import (
    DEFINITIONS,
    FLAGS,
    LARGEST,
    MOST_DIGITS,
    refuse,
    require_keywords,
    with_text_around,
)

RUNTIME = "onnxruntime-genai's guidance"
KEYWORDS = frozenset((
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf", "oneOf", "$ref", *DEFINITIONS,
))  # fmt: skip
LOWEST, HIGHEST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
# Keywords whose values guidance takes as integers only: 2.0 is one in JSON schema.
COUNTS = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
# Any value whose numbers have bounds: guidance would permit any number in a value without a schema.
ANY_NAME = "qat-edge-any-value"
ANY = {"$ref": f"#/$defs/{ANY_NAME}"}
# Keyword of llguidance for its own settings.
SETTINGS, SPACES = "x-guidance", {"whitespace_pattern": r"( |\n[ \t]{0,20})?"}
# Where the grammar leaves one text, guidance splits it into tokens itself, and fails inside a character of three tokens
# or more, which has as many bytes. A regular expression may contain one as an escape.
LONG_CHARACTER = re.compile(r"[^\0-\u07ff]|\\\\[uUx]")
NO_FORCED_TOKENS = '%llguidance {"no_forcing": true}\n'


def grammar(answer: AnswerSchema) -> str:
    """Return the grammar of an answer.

    Raises:
        ExportError: the schema has what guidance does not express; the message names it.
    """
    require_keywords(answer.schema, KEYWORDS, RUNTIME)
    for place, part in parts_of(answer.schema):
        if isinstance(part, dict):
            _require_numbers(part, place)
            _require_patterns(part, place)

    schema = {**_bounded_schema(answer.schema), SETTINGS: SPACES}
    start = with_text_around(answer, "answer", lambda text: json.dumps(text, ensure_ascii=False))
    text = f"start: {start}\nanswer: %json {json.dumps(schema, ensure_ascii=False)}\n"
    return NO_FORCED_TOKENS + text if LONG_CHARACTER.search(text) else text


def _require_numbers(part: dict[str, Any], place: str) -> None:
    """Require that a part permits numbers that guidance writes.

    Raises:
        ExportError: names the keyword.
    """
    lowest = {key: part[key] for key in LOWEST if key in part}
    highest = {key: part[key] for key in HIGHEST if key in part}
    has_both = bool(lowest and highest) and "number" not in _types(part)
    for key, bound in {**lowest, **{key: -bound for key, bound in highest.items()}}.items():
        if bound > LARGEST and not has_both:
            raise refuse(f"{place}.{key}", f"permits only numbers of more than {MOST_DIGITS} digits", RUNTIME)
    if "multipleOf" in part and min(highest.values(), default=0) < 0:
        raise refuse(f"{place}.multipleOf", "permits negative numbers only", RUNTIME)


def _require_patterns(part: dict[str, Any], place: str) -> None:
    """Require that guidance follows the regular expressions of a part.

    Raises:
        ExportError: names the one.
    """
    places = {f"{place}.pattern": part["pattern"]} if "pattern" in part else {}
    places |= {f"{place}.patternProperties.{pattern}": pattern for pattern in part.get("patternProperties", ())}
    for where, pattern in places.items():
        if has_escaped_character(pattern):
            raise refuse(where, "has a quotation mark or a backslash outside of classes", RUNTIME)
    for pattern in part.get("patternProperties", ()):
        # guidance would ignore the pattern there.
        twice = next((name for name in part.get("properties", ()) if re.search(pattern, name)), None)
        if twice is not None:
            where = f"{place}.patternProperties.{pattern}"
            raise refuse(where, f"is for the property {show(twice)} as well", RUNTIME)


def _bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose numbers have bounds and whose formats are left out, at any depth.

    guidance would let "format" decide, which is a description in JSON schema.
    """
    # Where two schemas hold for one value, guidance cannot intersect the references to ANY.
    names_any = not any(map(_is_intersection, (part for _, part in parts_of(schema))))
    writer = _GuidanceSchema(schema, names_any)
    bounded: dict[str, Any] = writer.bounded(schema)
    if names_any and ANY["$ref"] in json.dumps(bounded):
        bounded["$defs"] = {**bounded.get("$defs", {}), ANY_NAME: writer.bounded({})}
    return bounded


class _GuidanceSchema:
    """Writes the parts of a schema for guidance.

    Args:
        schema: the whole one.
        names_any: refer to ANY where any value is permitted, so that numbers have bounds there as well.
    """

    def __init__(self, schema: dict[str, Any], names_any: bool) -> None:
        self._schema, self._names_any = schema, names_any

    def bounded(self, part: Any) -> Any:
        """Return a part of the schema with bounds."""
        if part is True and self._names_any:
            return ANY
        if not isinstance(part, dict):
            return part
        kept = {key: self._keyword(key, value) for key, value in part.items() if key != "format" and key not in FLAGS}
        if "oneOf" in kept and "anyOf" not in kept and are_exclusive(self._schema, part["oneOf"]):
            kept["anyOf"] = kept.pop("oneOf")  # guidance compares no references

        # Values are what they are, and the other parts have bounds of their own.
        if part.keys() & {"$ref", "enum", "const"} or ("type" not in part and part.keys() & {*IN_PLACE}):
            return kept
        types = _types(part)
        if "number" in types or "integer" in types:
            _add_bounds(kept, types)
        if self._names_any and "object" in types:
            kept.setdefault("additionalProperties", ANY)
        if self._names_any and "array" in types:
            kept.setdefault("items", ANY)
        return kept

    def _keyword(self, key: str, value: Any) -> Any:
        """Return the value of a keyword, with bounds in the schemas that it holds."""
        if key == "patternProperties":
            return {for_guidance(name): self.bounded(each) for name, each in value.items()}
        if key in NAMED:
            return {name: self.bounded(each) for name, each in value.items()}
        if key in LISTED:
            return [self.bounded(each) for each in value]
        if key in SINGLE:
            return self.bounded(value)
        if key == "pattern":
            return for_guidance(value)
        return int(value) if key in COUNTS else value


def _add_bounds(part: dict[str, Any], types: list[str]) -> None:
    """Give numbers the bounds that they lack, and "number" no larger ones, which guidance cannot compute with."""
    if "number" in types:
        for key in (*LOWEST, *HIGHEST):
            if abs(part.get(key, 0)) > LARGEST:
                del part[key]
    # Exclusive: guidance reads bounds of numbers as doubles, and that of 16 nines is 10^16.
    if not part.keys() & {*LOWEST}:
        part["exclusiveMinimum"] = -LARGEST - 1
    if not part.keys() & {*HIGHEST}:
        part["exclusiveMaximum"] = LARGEST + 1


def _types(part: dict[str, Any]) -> list[str]:
    """Return the types that a part permits."""
    types = part.get("type", list(TYPES))
    return [types] if isinstance(types, str) else list(types)


def _is_intersection(part: Any) -> bool:
    """Return True for a schema that has alternatives or a reference together with other keywords, or 'allOf'."""
    if not isinstance(part, dict):
        return False
    keywords = {key for key in part if key in KEYWORDS and key not in DEFINITIONS}
    return "allOf" in keywords or (len(keywords) > 1 and bool(keywords & {"$ref", *IN_PLACE}))
