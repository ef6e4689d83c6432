"""Write a JSON schema as GBNF, the grammar that every llama.cpp takes.

llama.cpp's C interface, which apps use, has no other constraint; its programs take the file with --grammar-file.
The grammar permits nothing that the schema forbids. It permits less in these points, so that a text ends and its form
is settled by the schema:

    objects     properties in the order of the schema, and no others where the schema names some
    spaces      at most a space, or a line break with up to 20 spaces or tabs
    numbers     at most 16 digits before the decimal point and 16 after it, and no exponent, as in `lark_grammar`
    texts       no halves of surrogate pairs, which are no characters

What the grammar cannot express is refused by the name of the keyword.

Format: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from qat_edge.data.answer_schema import AnswerSchema
from qat_edge.data.exclusive_schemas import are_exclusive
from qat_edge.data.possible_values import TYPES, PossibleValues
from qat_edge.data.schema_parts import resolve
from qat_edge.readers import show
from qat_edge_exporters.gguf.digit_ranges import integers_between
from qat_edge_exporters.schema_keywords import (
    ANNOTATIONS,
    DEFINITIONS,
    LARGEST,
    MOST_DIGITS,
    refuse,
    require_keywords,
    with_text_around,
)

RUNTIME = "llama.cpp's grammar"
MOST_REPEATS = 1000  # of an item or a character; llama.cpp refuses more than 2000
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
KEYWORDS = frozenset((
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
    "minLength", "maxLength", "anyOf", "oneOf", "$ref", *BOUNDS, *DEFINITIONS,
))  # fmt: skip
# A character of a text as it is: those of Unicode without controls, quotation mark, backslash and surrogates. llama.cpp
# compares code points that it reads from bytes, and a class of the others would permit bytes that are no UTF-8.
CHARACTER = r"[ !#-\[\]-~\x80-\uD7FF\uE000-\U0010FFFF]"
# Rules that every grammar may use.
SHARED = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    # Each is one character of the value, as lengths count them.
    "char": CHARACTER + r' | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CeEfF] hex | [dD] [0-7]) hex hex)',
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "digits": f'"0" | [1-9] [0-9]{{0,{MOST_DIGITS - 1}}}',
    "integer": '"-"? digits',
    "number": f'"-"? digits ("." [0-9]{{1,{MOST_DIGITS}}})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "array": '"[" ws (value (ws "," ws value)*)? ws "]"',
    "object": '"{" ws (string ws ":" ws value (ws "," ws string ws ":" ws value)*)? ws "}"',
    "value": "object | array | string | number | boolean | null",
}


def grammar(answer: AnswerSchema) -> str:
    """Return the grammar of an answer.

    Raises:
        ExportError: the schema has what the grammar cannot express; the message names it.
    """
    require_keywords(answer.schema, KEYWORDS, RUNTIME)
    # The schema has values: without 'type', they may be of a type that the grammar does not write.
    for place, _ in PossibleValues(answer.schema, _types_without_type).endless_references():
        raise refuse(f"{place}.$ref", "leads to a value without an end, unless 'type' is given there", RUNTIME)
    return _Grammar(answer.schema).text(answer)


class _Grammar:
    """The rules of one grammar."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._references: dict[str, str] = {}  # names of their rules
        self._pending: list[str] = []  # references whose rules are not written yet

    def text(self, answer: AnswerSchema) -> str:
        """Return all rules, the first one first."""
        value = self._rule("answer", self._expression(self._schema, "$"))
        # One after the other: hundreds of definitions may refer to one another.
        while self._pending:
            reference = self._pending.pop()
            self._rules[self._references[reference]] = self._expression(resolve(self._schema, reference), reference)
        rules = {"root": with_text_around(answer, value, quoted), **self._rules, **SHARED}
        return "".join(f"{name} ::= {body}\n" for name, body in rules.items())

    def _rule(self, name: str, body: str) -> str:
        """Add a rule and return its name."""
        while name in self._rules or name in SHARED:
            name = f"{name}-{len(self._rules)}"
        self._rules[name] = body
        return name

    def _expression(self, schema: Any, place: str) -> str:
        """Return what a value of a schema is, as part of a rule."""
        if schema is False:
            raise refuse(place, "permits no value", RUNTIME)
        keywords = set() if schema is True else _constraining(schema)
        if not keywords:
            return "value"

        # A reference and alternatives stand alone: a grammar has no intersection.
        for alone in ("$ref", "anyOf", "oneOf"):
            if alone in keywords and len(keywords) > 1:
                others = ", ".join(sorted(keywords - {alone}))
                raise refuse(place, f"has '{alone}' together with {others}", RUNTIME)
        if "$ref" in keywords:
            return self._reference(schema["$ref"])
        for key in keywords & {"anyOf", "oneOf"}:
            if key == "oneOf" and not are_exclusive(self._schema, schema[key]):
                raise refuse(f"{place}.{key}", "has schemas that one value may fit", RUNTIME, 'write "anyOf"')
            parts = [self._expression(part, f"{place}.{key}[{i}]") for i, part in enumerate(schema[key])]
            return _alternatives(parts)
        if "enum" in keywords or "const" in keywords:
            nested = sorted(keywords & {"properties", "items", "additionalProperties"})
            if nested:
                raise refuse(place, f"has values together with {', '.join(nested)}", RUNTIME)
            return _values(schema, place)

        types = schema.get("type") or _implied_types(keywords)
        types = [types] if isinstance(types, str) else list(types)
        return _alternatives([self._of_type(name, schema, place) for name in types])

    def _reference(self, reference: str) -> str:
        """Return the name of the rule of a part of the schema, which may contain itself."""
        if reference not in self._references:
            self._references[reference] = self._rule(f"ref-{len(self._references)}", "")
            self._pending.append(reference)
        return self._references[reference]

    def _of_type(self, name: str, schema: dict[str, Any], place: str) -> str:
        if name == "object":
            return self._object(schema, place)
        if name == "array":
            return self._array(schema, place)
        if name == "string":
            return _string(schema, place)
        if name == "integer":
            return _integer(schema, place)
        if name == "number" and any(key in schema for key in BOUNDS):
            bound = next(key for key in BOUNDS if key in schema)
            raise refuse(f"{place}.{bound}", "limits numbers with a decimal point", RUNTIME)
        return name

    # --- objects and arrays ------------------------------------------------------------------------------------

    def _object(self, schema: dict[str, Any], place: str) -> str:
        """Return an object: each property is one rule, which goes on with the next one."""
        required = list(schema.get("required", ()))
        properties = dict(schema.get("properties", {}))
        further = schema.get("additionalProperties", True)
        if not properties and not required:
            return self._map(further, place)
        for missing in [name for name in required if name not in properties]:
            properties[missing] = further
        pairs = [
            (name, f"{place}.properties.{name}", part, name in required)
            for name, part in properties.items()
            if part is not False or name in required
        ]
        return self._rule("object", f'"{{" ws {self._pairs(pairs)} ws "}}"')

    def _pairs(self, pairs: Sequence[tuple[str, str, Any, bool]]) -> str:
        """Return the pairs of an object, in order; the last value of each says whether it is required."""
        # From the last one on: the rules of what follows, if nothing has been written yet and if something has.
        first, later = "", ""
        for name, place, part, is_required in reversed(pairs):
            key = quoted(json.dumps(name, ensure_ascii=False))
            pair = self._rule("pair", f'{key} ws ":" ws {self._expression(part, place)}')
            after = later
            first = self._with_rest(pair, after, first, is_required)
            later = self._with_rest(f'ws "," ws {pair}', after, after, is_required)
        return first

    def _with_rest(self, pair: str, after: str, without: str, is_required: bool) -> str:
        """Return a pair and what follows it; where it may be left out, or what follows then."""
        both = f"{pair} {after}".strip()
        if is_required:
            return self._rule("pairs", both)
        return self._rule("pairs", f"{both} | {without}" if without else f"({both})?")

    def _map(self, further: Any, place: str) -> str:
        """Return an object with any names."""
        if further is False:
            return '"{" ws "}"'
        value = self._expression(further, f"{place}.additionalProperties")
        pair = f'string ws ":" ws {value}'
        return f'"{{" ws ({pair} (ws "," ws {pair})*)? ws "}}"'

    def _array(self, schema: dict[str, Any], place: str) -> str:
        least, most = _limits(schema, "minItems", "maxItems", place)
        items = schema.get("items", True)
        if items is False or most == 0:
            if least:
                raise refuse(place, "permits no value", RUNTIME)
            return '"[" ws "]"'
        # A rule of its own: llama.cpp multiplies repetitions that are inside one another in a rule, and limits them.
        item = self._rule("item", self._expression(items, f"{place}.items"))
        upper = "" if most is None else most - 1
        inner = f'{item} (ws "," ws {item}){{{max(least - 1, 0)},{upper}}}'
        return f'"[" ws {inner} ws "]"' if least else f'"[" ws ({inner})? ws "]"'


def quoted(text: str) -> str:
    """Return a text as a literal of GBNF."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'


def _constraining(schema: dict[str, Any]) -> set[str]:
    """Return the keywords of a schema that say something about a value."""
    return {key for key in schema if key in KEYWORDS and key not in DEFINITIONS and key not in ANNOTATIONS}


def _types_without_type(schema: dict[str, Any]) -> tuple[str, ...]:
    """Return the types of the values that the grammar writes for a schema without 'type'."""
    keywords = _constraining(schema)
    return _implied_types(keywords) if keywords else TYPES


def _implied_types(keywords: set[str]) -> tuple[str, ...]:
    """Return the types of a schema without 'type': that of its keywords, since they say nothing about other types."""
    if keywords & {"properties", "required", "additionalProperties"}:
        return ("object",)
    if keywords & {"items", "minItems", "maxItems"}:
        return ("array",)
    return ("string",) if keywords & {"minLength", "maxLength"} else ("integer",)


def _values(schema: dict[str, Any], place: str) -> str:
    """Return the values of 'enum' or 'const' that the rest of the schema permits."""
    values = [schema["const"]] if "const" in schema else schema["enum"]
    judge = AnswerSchema({key: value for key, value in schema.items() if key in _constraining(schema)})
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    permitted = [text for text in dict.fromkeys(texts) if not judge.fault(text)]
    if not permitted:
        raise refuse(place, "permits no value", RUNTIME)
    return _alternatives([quoted(text) for text in permitted])


def _string(schema: dict[str, Any], place: str) -> str:
    least, most = _limits(schema, "minLength", "maxLength", place)
    if not least and most is None:
        return "string"
    return rf'"\"" char{{{least},{"" if most is None else most}}} "\""'


def _integer(schema: dict[str, Any], place: str) -> str:
    bounds = [key for key in BOUNDS if key in schema]
    if not bounds:
        return "integer"
    lowest = max(
        [-LARGEST, *(math.ceil(schema[key]) for key in bounds if key == "minimum")]
        + [math.floor(schema[key]) + 1 for key in bounds if key == "exclusiveMinimum"]
    )
    highest = min(
        [LARGEST, *(math.floor(schema[key]) for key in bounds if key == "maximum")]
        + [math.ceil(schema[key]) - 1 for key in bounds if key == "exclusiveMaximum"]
    )
    if lowest > highest:
        raise refuse(place, f"permits no integer ({', '.join(bounds)}) of up to {MOST_DIGITS} digits", RUNTIME)
    return _alternatives(integers_between(lowest, highest))


def _limits(schema: dict[str, Any], least_key: str, most_key: str, place: str) -> tuple[int, int | None]:
    """Return the least and the greatest length of a string or an array."""
    least, most = int(schema.get(least_key, 0)), schema.get(most_key)
    for key, value in ((least_key, least), (most_key, most)):
        if value is not None and value > MOST_REPEATS:
            raise refuse(f"{place}.{key}", f"is {show(value)}, more than {MOST_REPEATS}", RUNTIME)
    if most is not None and most < least:
        raise refuse(place, f"permits no value: {least_key} is {least}, {most_key} is {show(most)}", RUNTIME)
    return least, None if most is None else int(most)


def _alternatives(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"
