"""Write a JSON schema as the grammar that onnxruntime-genai takes: `set_guidance("lark_grammar", TEXT)`.

onnxruntime-genai has the library llguidance built in, which reads the schema itself; the grammar adds the text around
the JSON. It permits less in two points, without which a model may write spaces or digits up to the longest answer:

    spaces      at most a space, or a line break with up to 20 spaces or tabs
    integers    at most 16 digits, where the schema has no bounds

The keywords were tried in onnxruntime-genai 0.18.0. Whether it takes the values of the keywords, such as a
regular expression, shows when the exported folder is tried.
"""

from __future__ import annotations

import json
from typing import Any

from qat_edge.data.answer_schema import AnswerSchema
from qat_edge_exporters.schema_keywords import DEFINITIONS, LARGEST, require_keywords, with_text_around

RUNTIME = "onnxruntime-genai's guidance"
KEYWORDS = frozenset((
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf", "oneOf", "$ref", *DEFINITIONS,
))  # fmt: skip
# Keyword of llguidance for its own settings.
SETTINGS, SPACES = "x-guidance", {"whitespace_pattern": r"( |\n[ \t]{0,20})?"}


def grammar(answer: AnswerSchema) -> str:
    """Return the grammar of an answer.

    Raises:
        ExportError: the schema has what guidance does not express; the message names it.
    """
    require_keywords(answer.schema, KEYWORDS, RUNTIME)
    schema = {**_bounded(answer.schema), SETTINGS: SPACES}
    start = with_text_around(answer, "answer", lambda text: json.dumps(text, ensure_ascii=False))
    return f"start: {start}\nanswer: %json {json.dumps(schema, ensure_ascii=False)}\n"


def _bounded(schema: Any) -> Any:
    """Return a schema whose integers have bounds and whose formats are left out, at any depth.

    guidance would let "format" decide, which is a description in JSON schema.
    """
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # Values stay as they are, and so do names of properties, which may be those of keywords.
    kept = {
        key: value if key in ("enum", "const") else _bounded(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str)
    }
    types = schema.get("type")
    if types == "integer" or (isinstance(types, list) and "integer" in types and "number" not in types):
        kept |= {} if "exclusiveMinimum" in kept else {"minimum": kept.get("minimum", -LARGEST)}
        kept |= {} if "exclusiveMaximum" in kept else {"maximum": kept.get("maximum", LARGEST)}
    return kept
