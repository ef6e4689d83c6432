"""Write a JSON schema as the grammar that onnxruntime-genai takes: `set_guidance("lark_grammar", TEXT)`.

onnxruntime-genai has the library llguidance built in, which reads the schema itself; the grammar adds the text around
the JSON. It permits less in two points, without which a model may write spaces or digits up to the longest answer, or a
number that no float holds, such as 1e400:

    spaces      at most a space, or a line break with up to 20 spaces or tabs
    numbers     at most 16 digits before the decimal point, where the schema has no bounds, and no exponent, which
                guidance writes for no number with bounds

The keywords were tried in onnxruntime-genai 0.18.0. Whether it takes the values of the keywords, such as a
regular expression, shows when the exported folder is tried.
"""

from __future__ import annotations

import json
from typing import Any

from qat_edge.data.answer_schema import AnswerSchema
from qat_edge.data.possible_values import TYPES
from qat_edge.data.schema_parts import IN_PLACE, LISTED, NAMED, SINGLE, parts_of
from qat_edge_exporters.schema_keywords import DEFINITIONS, LARGEST, require_keywords, with_text_around

RUNTIME = "onnxruntime-genai's guidance"
KEYWORDS = frozenset((
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf", "oneOf", "$ref", *DEFINITIONS,
))  # fmt: skip
# Any value whose numbers have bounds: guidance would permit any number in a value without a schema.
ANY_NAME = "qat-edge-any-value"
ANY = {"$ref": f"#/$defs/{ANY_NAME}"}
# Keyword of llguidance for its own settings.
SETTINGS, SPACES = "x-guidance", {"whitespace_pattern": r"( |\n[ \t]{0,20})?"}


def grammar(answer: AnswerSchema) -> str:
    """Return the grammar of an answer.

    Raises:
        ExportError: the schema has what guidance does not express; the message names it.
    """
    require_keywords(answer.schema, KEYWORDS, RUNTIME)
    schema = {**_bounded_schema(answer.schema), SETTINGS: SPACES}
    start = with_text_around(answer, "answer", lambda text: json.dumps(text, ensure_ascii=False))
    return f"start: {start}\nanswer: %json {json.dumps(schema, ensure_ascii=False)}\n"


def _bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose numbers have bounds and whose formats are left out, at any depth.

    guidance would let "format" decide, which is a description in JSON schema.
    """
    # Where two schemas hold for one value, guidance cannot intersect the references to ANY.
    names_any = not any(map(_is_intersection, (part for _, part in parts_of(schema))))
    bounded: dict[str, Any] = _bounded(schema, names_any)
    if names_any and ANY["$ref"] in json.dumps(bounded):
        bounded["$defs"] = {**bounded.get("$defs", {}), ANY_NAME: _bounded({}, names_any)}
    return bounded


def _bounded(part: Any, names_any: bool) -> Any:
    """Return a part of a schema with bounds.

    Args:
        part: schema of a value.
        names_any: refer to ANY where any value is permitted, so that numbers have bounds there as well.
    """
    if part is True and names_any:
        return ANY
    if not isinstance(part, dict):
        return part
    kept = _inside(part, names_any)

    # Values are what they are, and the other parts have bounds of their own.
    if part.keys() & {"$ref", "enum", "const"} or ("type" not in part and part.keys() & {*IN_PLACE}):
        return kept
    types = part.get("type", TYPES)
    types = [types] if isinstance(types, str) else types
    if "number" in types or "integer" in types:
        # Exclusive: guidance reads bounds of numbers as doubles, and that of 16 nines is 10^16.
        kept |= {} if kept.keys() & {"minimum", "exclusiveMinimum"} else {"exclusiveMinimum": -LARGEST - 1}
        kept |= {} if kept.keys() & {"maximum", "exclusiveMaximum"} else {"exclusiveMaximum": LARGEST + 1}
    if names_any and "object" in types:
        kept.setdefault("additionalProperties", ANY)
    if names_any and "array" in types:
        kept.setdefault("items", ANY)
    return kept


def _inside(part: dict[str, Any], names_any: bool) -> dict[str, Any]:
    """Return the keywords of a schema, with bounds in the schemas that they hold, and without its format."""
    kept: dict[str, Any] = {}
    for key, value in part.items():
        if key in NAMED:
            kept[key] = {name: _bounded(each, names_any) for name, each in value.items()}
        elif key in LISTED:
            kept[key] = [_bounded(each, names_any) for each in value]
        elif key != "format":
            kept[key] = _bounded(value, names_any) if key in SINGLE else value
    return kept


def _is_intersection(part: Any) -> bool:
    """Return True for a schema that has alternatives or a reference together with other keywords, or 'allOf'."""
    if not isinstance(part, dict):
        return False
    keywords = {key for key in part if key in KEYWORDS and key not in DEFINITIONS}
    return "allOf" in keywords or (len(keywords) > 1 and bool(keywords & {"$ref", *IN_PLACE}))
