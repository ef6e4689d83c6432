"""Infer the schema of answers that call tools from training rows.

The tools of all rows give the calls: {"name": NAME, "arguments": {...}}, one alternative for each tool. How a call is
written is a matter of the chat template, such as <tool_call> before it; the first rows that call tools are rendered to
find it out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from qat_edge import progress
from qat_edge.data.answer_schema import ASSERTIONS, AnswerSchema, check_schema
from qat_edge.data.chat_template import ChatTemplate
from qat_edge.data.conversation import ChatFormat
from qat_edge.data.rows import Chat, Row, is_trained
from qat_edge.data.schema_parts import IN_PLACE, NAMED, parts_of
from qat_edge.errors import DataError
from qat_edge.readers import counted, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALLING_ROWS = 64  # rows with calls that are rendered
ARGUMENTS = ("arguments", "parameters")  # keys that templates write them under
DEFINITIONS_OF_TOOLS = ("#/$defs/", "#/definitions/")  # begins of references that can be moved
# Keywords whose schemas are for the same object as the one that has them.
SAME_OBJECT = (*IN_PLACE, "if", "then", "else", "not", "dependentSchemas", "dependencies")
USE_A_FILE = "Give --schema FILE with a schema of your own."


class WrittenCall(NamedTuple):
    """Form in which a chat template writes calls.

    Attributes:
        before: text before the first value.
        after: text after the last one.
        keys: of a call, in their order: "name", and that of the arguments.
        is_list: all calls of an answer are one list.
    """

    before: str
    after: str
    keys: tuple[str, ...]
    is_list: bool


def schema_of_tools(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, source: str) -> AnswerSchema:
    """Return the schema of answers that call the tools of rows.

    Args:
        rows: training rows.
        tokenizer: of the model.
        source: of the rows, for messages.

    Raises:
        DataError: no row has tools, or none calls one; a tool has no valid schema, or requires a property that it
            does not declare; or calls are not written as JSON with the same text around them.
    """
    tools: dict[str, list[Any]] = {}  # schemas of the arguments by name, each once
    calling: list[Chat] = []
    for row in rows:
        if not isinstance(row, Chat):
            continue
        for tool in row.tools or ():
            function = tool["function"]
            known, parameters = tools.setdefault(function["name"], []), function.get("parameters") or {}
            known += [] if parameters in known else [parameters]
        if len(calling) < CALLING_ROWS and any(is_trained(m) and m.get("tool_calls") for m in row.messages):
            calling.append(row)
    if not tools or not calling:
        lacking = "rows with 'tools'" if not tools else "answers with 'tool_calls'"
        raise DataError(f"--schema tools: {source} has no {lacking}. {USE_A_FILE}")

    lead = ChatTemplate(tokenizer).empty_reasoning if tokenizer.chat_template else ""
    texts = list(_calling_texts(calling, tokenizer))
    form, between = _form_of(texts, lead)
    calls, definitions = _calls(tools, form, source)
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if form.is_list:
        schema = {"type": "array", "items": schema, "minItems": 1}
    schema |= {"$defs": definitions} if definitions else {}
    answer = AnswerSchema(schema, lead, form.before, between, form.after)
    _report(answer, tools, texts, source)
    return answer


def _report(answer: AnswerSchema, tools: Mapping[str, Any], texts: list[tuple[str, str]], source: str) -> None:
    """Report what the schema consists of, and how many calls of the rows it does not permit."""
    progress.info(f"Schema of the answers: calls of {counted(len(tools), 'tool')} in {source}")
    faults = [(where, fault) for where, text in texts if (fault := answer.fault(text))]
    if faults:
        progress.warn(
            f"{len(faults)} of the first {len(texts)} answers with calls are not valid by the schemas of their tools; "
            f"the first: {faults[0][0]}: {faults[0][1]}. A constrained model cannot give them"
        )


# --- how calls are written ---------------------------------------------------------------------------------


def _calling_texts(rows: Iterable[Chat], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each answer that calls tools, as it is trained, without its end token.

    Raises:
        DataError: a special token is part of it, which no grammar writes in the same way everywhere.
    """
    chat_format = ChatFormat(tokenizer)
    for row in rows:
        trained = [message for message in row.messages if is_trained(message)]
        for message, turn in zip(trained, chat_format.turns(row), strict=True):
            if not message.get("tool_calls"):
                continue
            ids = turn.ids[: turn.trained]
            ids = ids[:-1] if ids and ids[-1] in chat_format.ends else ids
            special = [token for token in ids if token in tokenizer.all_special_ids]
            if special:
                raise DataError(
                    f"--schema tools: {row.where}: the chat template writes the special token "
                    f"{tokenizer.convert_ids_to_tokens(special[0])!r} into calls, which the grammars do not express. "
                    "Export without --schema; the app has to check the calls."
                )
            yield row.where, str(tokenizer.decode(ids))


def _form_of(texts: Iterable[tuple[str, str]], lead: str) -> tuple[WrittenCall, str | None]:
    """Return how calls are written, and the text between two of them; None where no answer has two.

    Raises:
        DataError: an answer has no calls in JSON, or another form than the first one.
    """
    first: tuple[str, WrittenCall] | None = None
    between: str | None = None
    for where, text in texts:
        body = text.removeprefix(lead)
        found = list(_call_values(body))
        if not found:
            raise DataError(
                f"--schema tools: {where}: the chat template writes this call, which is no JSON object with 'name' "
                f"and 'arguments': {show(body)}. {USE_A_FILE}"
            )
        value, begin, _ = found[0]
        call = value[0] if isinstance(value, list) else value
        form = WrittenCall(body[:begin], body[found[-1][2] :], tuple(call), isinstance(value, list))
        gaps = {body[one[2] : other[1]] for one, other in pairwise(found)} | ({between} - {None})
        first = first or (where, form)
        if form != first[1] or len(gaps) > 1:
            raise DataError(
                f"--schema tools: {where}: the text around the calls differs from that in {first[0]}: {show(body)}. "
                f"A grammar needs the same in every answer that calls tools. {USE_A_FILE}"
            )
        between = next(iter(gaps), None)
    assert first is not None  # there are rows with calls
    return first[1], between


def _call_values(text: str) -> Iterator[tuple[Any, int, int]]:
    """Yield the JSON of each call in a text, or of each list of calls, with its begin and end."""
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        if text[position] not in "{[":
            position += 1
            continue
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1  # a bracket of the text
            continue
        calls = value if isinstance(value, list) else [value]
        if not calls or not all(map(_is_call, calls)):
            return
        yield value, position, end
        position = end


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and any(set(value) == {"name", key} for key in ARGUMENTS)


# --- the schema of calls -----------------------------------------------------------------------------------


def _calls(
    tools: Mapping[str, list[Any]], form: WrittenCall, source: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the schema of a call of each tool, and the definitions that they refer to.

    Raises:
        DataError: the arguments of a tool have no valid schema, or require a property that it does not declare.
    """
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    dropped: Counter[str] = Counter()
    for name, schemas in tools.items():
        for index, parameters in enumerate(schemas):
            where = f"--schema tools: {source}: 'parameters' of the tool {show(name)}"
            if not isinstance(parameters, dict):
                raise DataError(f"{where}: expected a JSON schema, found {show(parameters)}.")
            check_schema(parameters, where, DataError)
            _require_movable(parameters, where)
            prefix = f"{name}.{index}." if len(schemas) > 1 else f"{name}."
            arguments = _strict({"type": "object", **(parameters or {"properties": {}})}, prefix, dropped)
            _require_declared(arguments, where)
            for key in ("$defs", "definitions"):
                definitions |= {prefix + inner: part for inner, part in arguments.pop(key, {}).items()}
            parts = {key: {"const": name} if key == "name" else arguments for key in form.keys}
            calls.append(
                {"type": "object", "properties": parts, "required": list(form.keys), "additionalProperties": False}
            )
    if dropped:
        listed = ", ".join(f"{key} ({count})" for key, count in dropped.most_common(5))
        progress.info(f"Schema of the answers: not used, since they constrain nothing: {listed}")
    return calls, definitions


def _require_declared(arguments: dict[str, Any], where: str) -> None:
    """Require that objects without further properties declare those that they require: no value fits otherwise.

    Raises:
        DataError: names the property.
    """
    for place, part in parts_of(arguments):
        if not isinstance(part, dict) or part.get("additionalProperties") is not False or "patternProperties" in part:
            continue
        undeclared = [name for name in part.get("required", ()) if name not in part.get("properties", {})]
        if undeclared:
            raise DataError(
                f"{where}: {place}.required has {show(undeclared[0])}, which {place}.properties does not declare, so "
                f"that no call would be valid. Declare it in the rows, or remove it from 'required'. {USE_A_FILE}"
            )


def _require_movable(parameters: dict[str, Any], where: str) -> None:
    """Require that all references of a tool's schema lead to its definitions, which are moved to the root.

    Raises:
        DataError: names the reference.
    """
    for place, part in parts_of(parameters):
        if isinstance(part, dict) and "$ref" in part and not part["$ref"].startswith(DEFINITIONS_OF_TOOLS):
            raise DataError(
                f"{where}: {place}.$ref is {show(part['$ref'])}, and only definitions below $defs can be used. Move "
                f"the schema there. {USE_A_FILE}"
            )


def _strict(schema: Any, prefix: str, dropped: Counter[str], closes: bool = True) -> Any:
    """Return a schema without descriptions, whose objects have no properties beyond those that it names.

    Args:
        schema: of arguments, or a part of it.
        prefix: of the names of its definitions, which are moved to the root.
        dropped: counts keywords that are left out.
        closes: forbid further properties of the object itself; False where another schema names some of them.
    """
    if isinstance(schema, list):
        return [_strict(part, prefix, dropped, closes) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closes = closes and not _names_properties_twice(schema)
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref":
            kept[key] = _moved(value, prefix)
        elif key in ("enum", "const", "required", "dependentRequired"):
            kept[key] = value
        elif key in (*NAMED, "dependentSchemas", "dependencies"):
            is_closed = key not in SAME_OBJECT
            kept[key] = {name: _strict(part, prefix, dropped, is_closed) for name, part in value.items()}
        elif key in ASSERTIONS:
            is_closed = closes if key in IN_PLACE else key not in SAME_OBJECT
            kept[key] = _strict(value, prefix, dropped, is_closed)
        else:
            dropped[key] += 1
    if closes and (kept.get("type") == "object" or "properties" in kept) and "allOf" not in kept:
        kept.setdefault("additionalProperties", "properties" not in kept)
    return kept


def _names_properties_twice(schema: dict[str, Any]) -> bool:
    """Return whether an object has properties, and further ones in alternatives: each would forbid the others."""
    parts = [part for key in IN_PLACE for part in schema.get(key, ())]
    return "properties" in schema and any(
        isinstance(part, dict) and part.keys() & {"properties", "$ref"} for part in parts
    )


def _moved(reference: str, prefix: str) -> str:
    """Return a reference to a definition of a tool as one to the definitions of the whole schema."""
    start = next(start for start in DEFINITIONS_OF_TOOLS if reference.startswith(start))
    escaped = prefix.replace("~", "~0").replace("/", "~1").replace("%", "%25")
    return f"#/$defs/{escaped}{reference.removeprefix(start)}"
