"""JSON schema of a model's answers: read it, check it, and judge an answer by it.

`export --schema` ships it as schema.json next to an artifact, together with the grammar that its runtime takes. The
file is a plain JSON schema. Answers that call tools have text around the JSON, such as <tool_call>; the keyword
"x-answer", which validators ignore, holds that text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.data.possible_values import PossibleValues
from qat_edge.data.schema_parts import IN_PLACE, parts_of, resolve
from qat_edge.errors import DataError, QatEdgeError
from qat_edge.readers import shorten, show

SCHEMA_FILE = "schema.json"
AROUND = "x-answer"  # keyword that holds the text around the JSON of an answer
AROUND_KEYS = ("lead", "before", "between", "after")
NOTHING = {"lead": "", "before": "", "between": None, "after": ""}  # what an answer without text around it has
# Keywords that say something about a value; all others only describe it.
ASSERTIONS = frozenset((
    "type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "propertyNames",
    "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedProperties", "items", "prefixItems", "additionalItems", "contains", "minContains", "maxContains",
    "minItems", "maxItems", "uniqueItems", "unevaluatedItems", "minLength", "maxLength", "pattern", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "allOf", "oneOf", "not", "if", "then",
    "else", "$ref", "$dynamicRef", "$recursiveRef", "$anchor", "$dynamicAnchor", "$defs", "definitions",
))  # fmt: skip
NOT_JSON = "answer"  # begins the messages about an answer that cannot be read
# Drafts in which "exclusiveMinimum" is a boolean.
OLD_DRAFTS = tuple(f"http://json-schema.org/draft-0{number}/schema{end}" for number in (3, 4) for end in ("", "#"))
MOST_REFERENCES = 50  # that lead from one to the next without a value in between
REASON_CHARACTERS = 120  # of a value that a reason quotes


@dataclass(frozen=True)
class AnswerSchema:
    """Schema of an answer, and the text around its JSON.

    Attributes:
        schema: JSON schema of a value.
        lead: text that may come first, such as an empty block of reasoning; empty for none.
        before: text before the value.
        between: text between two values; None where an answer has exactly one.
        after: text after the last value.
    """

    schema: dict[str, Any]
    lead: str = ""
    before: str = ""
    between: str | None = None
    after: str = ""

    @property
    def text(self) -> str:
        """Return the content of schema.json."""
        around = {key: value for key in AROUND_KEYS if (value := getattr(self, key)) not in (None, NOTHING[key])}
        document = {**self.schema, AROUND: around} if around else self.schema
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def fault(self, answer: str) -> str:
        """Return why an answer is not valid, as a phrase; empty where it is."""
        try:
            values = self._values(answer.strip())
        except DataError as error:
            return str(error)
        return next(filter(None, map(self._fault_of_value, values)), "")

    def _values(self, answer: str) -> list[Any]:
        """Return the JSON values of an answer.

        Raises:
            DataError: the text around them is missing, or they are no JSON.
        """
        before, after = self.before.strip(), self.after.strip()
        answer = answer.removeprefix(self.lead.strip()).strip()
        if not answer.startswith(before):
            raise DataError(f"does not begin with {show(before)}")
        if not answer.endswith(after):
            raise DataError(f"does not end with {show(after)}")
        inner = answer[len(before) : len(answer) - len(after)]
        values: list[Any] = []
        while not values or inner:
            if values and not (self.between is not None and inner.startswith(self.between.strip())):
                raise DataError(f"text after the JSON: {show(inner)}")
            inner = inner.removeprefix((self.between or "").strip() if values else "").strip()
            end = _end_of_value(inner)
            values.append(readers.parse_json(inner[:end], NOT_JSON, _Unreadable))
            inner = inner[end:].strip()
        return values

    def _fault_of_value(self, value: Any) -> str:
        from jsonschema.exceptions import best_match

        try:
            error = best_match(self._validator.iter_errors(value))
        except RecursionError:
            return "nested too deep for a comparison with the schema"
        if error is None:
            return ""
        return f"{shorten(error.json_path)}: {shorten(error.message, REASON_CHARACTERS)}"

    @cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import extend
        from referencing import Registry

        # An empty registry: a reference to another file or address is an error, and nothing is fetched.
        exact = extend(_validator_class(self.schema), {"multipleOf": _check_multiple})
        return exact(self.schema, registry=Registry())


class _Unreadable(DataError):
    """An answer that is no JSON; its message is a phrase."""

    def __init__(self, message: str) -> None:
        super().__init__(message.removeprefix(f"{NOT_JSON}: ").rstrip("."))


def _check_multiple(validator: Any, factor: float, value: Any, _: Any) -> Iterator[Exception]:
    """Compare a number with "multipleOf" as decimals: jsonschema divides floats, where 19.99 is no multiple of 0.01."""
    from jsonschema.exceptions import ValidationError

    if validator.is_type(value, "number") and Fraction(repr(value)) % Fraction(repr(factor)):
        yield ValidationError(f"{value!r} is not a multiple of {factor!r}")


def _end_of_value(text: str) -> int:
    """Return where the JSON value that a text begins with ends; the text's own end where it begins with none."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return len(text)


def read_schema(path: Path, failure: type[QatEdgeError], where: str | None = None) -> AnswerSchema:
    """Read a schema that a user wrote, or schema.json next to an artifact.

    Args:
        path: of the file.
        failure: class of the error to raise.
        where: how messages name it; its path by default.

    Raises:
        QatEdgeError: it cannot be read, is no JSON schema, or refers to something outside of itself.
    """
    where = where or str(path)
    schema = readers.read_object(path, failure, where)
    around = _around(schema.pop(AROUND, {}), where, failure)
    check_schema(schema, where, failure)
    return AnswerSchema(schema, **around)


def check_schema(schema: dict[str, Any], where: str, failure: type[QatEdgeError]) -> None:
    """Check that an object is a JSON schema whose references stay inside it.

    Raises:
        QatEdgeError: names the place inside the schema.
    """
    from jsonschema.exceptions import SchemaError

    draft = schema.get("$schema")
    if draft is not None and (not isinstance(draft, str) or draft in OLD_DRAFTS or _validator_class(schema) is None):
        raise failure(
            f"{where}: $schema is {show(draft)}, no draft of JSON schema from draft-06 on. Write the schema in draft "
            "2020-12, and leave $schema out or correct it."
        )
    try:
        _validator_class(schema).check_schema(schema)
    except SchemaError as error:
        place = f"$.{'.'.join(map(str, error.absolute_path))}" if error.absolute_path else "$"
        raise failure(
            f"{where}: no valid JSON schema: {shorten(place)}: {shorten(error.message, REASON_CHARACTERS)}. Correct it "
            "there; https://json-schema.org has the keywords."
        ) from error
    references, parts = _References(schema), list(parts_of(schema))
    # A part that is none of these, such as a default, was not checked.
    checked = {id(part) for _, part in parts}
    for place, part in parts:
        if not isinstance(part, dict):
            continue
        if "$id" in part and place != "$":
            raise failure(f"{where}: {place}.$id gives a part a name of its own. Remove it: references begin with #/.")
        target = part.get("$ref")
        if target is not None and ((found := resolve(schema, target)) is None or id(found) not in checked):
            raise failure(
                f"{where}: {place}.$ref is {show(target)}, and no schema of a value is there. Write the schema into "
                "the file, below $defs, and refer to it as #/$defs/NAME."
            )
        if target is not None and references.is_too_long(target):
            raise failure(
                f"{where}: {place}.$ref leads to another reference, and so on, more than {MOST_REFERENCES} times. "
                "Refer to the last one."
            )
        if target is not None and references.leads_back(target):
            raise failure(f"{where}: {place}.$ref leads back to itself without any value in between. Correct it.")
    _check_values(schema, where, failure)


def _check_values(schema: dict[str, Any], where: str, failure: type[QatEdgeError]) -> None:
    """Check that a value fits a schema, and that no reference leads to values without an end.

    Raises:
        QatEdgeError: names the reference.
    """
    possible = PossibleValues(schema)
    for place, target in possible.endless_references():
        raise failure(
            f"{where}: {place}.$ref is {show(target)}, and no finite value fits there: each one holds another. Leave a "
            "property on the way out of 'required', or permit another value, such as null."
        )
    if not possible.fits(schema):
        raise failure(f"{where}: no value fits the schema. Look for required properties that are false or not named.")


class _References:
    """Finds references that lead back to themselves without a value in between."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._is_open: dict[str, bool] = {}  # False: followed to its end

    def is_too_long(self, reference: str) -> bool:
        """Return whether following references, one generation after the other, has no end within the limit."""
        known, generation = {reference}, {reference}
        for _ in range(MOST_REFERENCES):
            generation = {each for one in generation for each in self._next(one)} - known
            if not generation:
                return False
            known |= generation
        return True

    def leads_back(self, reference: str) -> bool:
        """Return whether following a reference, in its schema and in that one's alternatives, comes back to it."""
        if reference in self._is_open:
            return self._is_open[reference]
        self._is_open[reference] = True
        found = any(map(self.leads_back, self._next(reference)))
        self._is_open[reference] = found
        return found

    def _next(self, reference: str) -> list[str]:
        """Return the references that are for the same value."""
        heads, found = [resolve(self._schema, reference)], []
        while heads:
            head = heads.pop()
            if isinstance(head, dict):
                found += [head["$ref"]] if "$ref" in head else []
                heads += [part for key in IN_PLACE for part in head.get(key, ())]
        return found


def _validator_class(schema: dict[str, Any]) -> Any:
    """Return jsonschema's validator for the draft that a schema names; None for an unknown one."""
    from jsonschema.validators import Draft202012Validator, validator_for

    return validator_for(schema, default=None if "$schema" in schema else Draft202012Validator)


def _around(value: Any, where: str, failure: type[QatEdgeError]) -> dict[str, str]:
    """Return the texts around the JSON of an answer.

    Raises:
        QatEdgeError: they are no texts.
    """
    is_known = isinstance(value, dict) and set(value) <= set(AROUND_KEYS)
    if not is_known or not all(isinstance(text, str) for text in value.values()):
        raise failure(
            f"{where}: '{AROUND}' is {show(value)}, expected an object with texts {', '.join(AROUND_KEYS)}: what "
            "stands around the JSON of an answer."
        )
    return dict(value)
