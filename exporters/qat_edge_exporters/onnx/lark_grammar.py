"""Write a JSON schema as the grammar that onnxruntime-genai takes: `set_guidance("lark_grammar", TEXT)`.

onnxruntime-genai has the library llguidance built in, which reads the schema itself; the grammar adds the text around
the JSON. The keywords were tried in onnxruntime-genai 0.18.0. Whether it takes the values of the keywords, such as a
regular expression, shows when the exported folder is tried.
"""

from __future__ import annotations

import json

from qat_edge.data.answer_schema import AnswerSchema
from qat_edge_exporters.schema_keywords import DEFINITIONS, require_keywords

RUNTIME = "onnxruntime-genai's guidance"
KEYWORDS = frozenset((
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf", "oneOf", "$ref", *DEFINITIONS,
))  # fmt: skip


def grammar(answer: AnswerSchema) -> str:
    """Return the grammar of an answer.

    Raises:
        ExportError: the schema has what guidance does not express; the message names it.
    """
    require_keywords(answer.schema, KEYWORDS, RUNTIME)
    further = "" if answer.between is None else f"({_quoted(answer.between)} answer)*"
    lead = f"({_quoted(answer.lead)})?" if answer.lead else ""
    parts = [lead, _quoted(answer.before), "answer", further, _quoted(answer.after)]
    return f"start: {' '.join(filter(None, parts))}\nanswer: %json {json.dumps(answer.schema, ensure_ascii=False)}\n"


def _quoted(text: str) -> str:
    """Return a text as a literal; empty where there is none."""
    return json.dumps(text, ensure_ascii=False) if text else ""
