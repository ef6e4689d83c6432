"""Schemas of answers: reading them, judging answers by them, inferring them from rows that call tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.chat_templates import CALLS_AS_TEXT, CHATML, THINKING, tokenizer_for
from qat_edge.data.answer_schema import AnswerSchema, read_schema
from qat_edge.data.possible_values import PossibleValues
from qat_edge.data.rows import Chat, Completion, Message
from qat_edge.data.schema_parts import resolve
from qat_edge.data.tool_schema import schema_of_tools
from qat_edge.errors import DataError, UsageError

PET = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "age": {"type": "integer"}},
    "required": ["kind"],
    "additionalProperties": False,
}
ENDLESS = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}
ENDLESS_A = {"type": "object", "required": ["b"], "properties": {"b": {"$ref": "#/$defs/a"}}}
WRAPPED = AnswerSchema(PET, "<think>\n\n</think>\n\n", "<call>\n", "\n</call>\n<call>\n", "\n</call>")


# --- judging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ['{"kind": "dog"}', '\n{"kind":"cat","age":3} ', '{"age": 3, "kind": "dog"}'])
def test_valid_answers(answer: str) -> None:
    assert AnswerSchema(PET).fault(answer) == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "not JSON"),
        ("a dog", "not JSON"),
        ('{"kind": "cow"}', r"\$\.kind: 'cow'"),
        ('{"kind": "dog", "age": 2.5}', r"\$\.age: 2.5"),
        ('{"age": 3}', "'kind' is a required property"),
        ('{"kind": "dog"} It is a dog.', "text after the JSON: 'It is a dog.'"),
        ('{"kind": "dog"}{"kind": "dog"}', "text after the JSON"),
        ('{"kind": "dog", "kind": "cat"}', "twice"),
        ('{"kind": "dog", "age": NaN}', "NaN"),
        ("[" * 5000, "nested"),
    ],
)
def test_invalid_answers_have_a_reason(answer: str, reason: str) -> None:
    import re

    assert re.search(reason, AnswerSchema(PET).fault(answer))


@pytest.mark.parametrize(
    ("factor", "multiples", "others"),
    [(0.01, ["19.99", "-0.29", "4.35", "0", "1e-2", "1e300"], ["0.295", "1e-3"]), (3, ["9.0", "-3"], ["10", "3.5"])],
)
def test_multiples_are_those_of_decimals(factor: float, multiples: list[str], others: list[str]) -> None:
    """As floats, 19.99 / 0.01 is no integer."""
    answer = AnswerSchema({"multipleOf": factor})
    assert [text for text in multiples if answer.fault(text)] == []
    assert [text for text in others if not answer.fault(text)] == []
    assert answer.fault(others[0]) == f"$: {others[0]} is not a multiple of {factor}"
    assert answer.fault('"a"') == answer.fault("true") == ""


def test_text_around_the_json_belongs_to_the_answer() -> None:
    one, two = '<call>\n{"kind": "dog"}\n</call>', '<call>\n{"kind": "dog"}\n</call>\n<call>\n{"kind": "cat"}\n</call>'
    assert WRAPPED.fault(one) == WRAPPED.fault(two) == WRAPPED.fault("<think>\n\n</think>\n\n" + one) == ""
    assert "does not begin with '<call>'" in WRAPPED.fault('{"kind": "dog"}')
    assert "does not end with '</call>'" in WRAPPED.fault(one[:-3])
    assert "$.kind" in WRAPPED.fault(two.replace("cat", "cow"))
    assert "text after the JSON" in AnswerSchema(PET, "", "<call>\n", None, "\n</call>").fault(two)


def test_a_schema_refers_to_itself_and_fetches_nothing() -> None:
    tree: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    assert AnswerSchema(tree).fault('{"next": {"next": {}}}') == ""
    assert "$.next.next" in AnswerSchema(tree).fault('{"next": {"next": 3}}')


def test_references_are_found_as_validators_find_them(tmp_path: Path) -> None:
    schema = {
        "anyOf": [{"$ref": "#/$defs/a%20b"}, {"$ref": "#/$defs/c~1d"}, {"type": "null"}],
        "$defs": {"a b": {"const": 1}, "a%20b": {"const": 2}, "c/d": {"$ref": "#/anyOf/2"}},
    }
    assert resolve(schema, "#/$defs/a%20b") == {"const": 1}
    assert resolve(schema, "#/anyOf/2") == {"type": "null"} and resolve(schema, "#/anyOf/3") is None
    (tmp_path / "s.json").write_text(json.dumps(schema))
    answer = read_schema(tmp_path / "s.json", UsageError)
    assert [bool(answer.fault(text)) for text in ("1", "2", "null")] == [False, True, False]


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [AnswerSchema(PET), WRAPPED, AnswerSchema(PET, between=""), AnswerSchema({})])
def test_a_schema_survives_its_file(answer: AnswerSchema, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(answer.text)
    assert read_schema(tmp_path / "schema.json", UsageError) == answer


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strnig"}, r"--schema s: no valid JSON schema: \$\.type: 'strnig'"),
        ({"properties": {"a": {"minLength": "2"}}}, r"\$\.properties\.a\.minLength: '2'"),
        ({"properties": {"a": {"pattern": "("}}}, r"\$\.properties\.a\.pattern"),
        ({"items": {"$ref": "https://example.org/s.json"}}, r"\$\.items\.\$ref is 'https://example.org/s.json'"),
        ({"$ref": "#/$defs/pet"}, "no schema of a value is there"),
        # Nothing checks a part that is no schema.
        ({"items": {"$ref": "#/default"}, "default": {"type": "strnig"}}, r"\$\.items\.\$ref is '#/default', and no"),
        ({"$ref": "#/x-defs/a", "x-defs": {"a": {"pattern": "a"}}}, "no schema of a value is there"),
        ({"$ref": "#"}, "leads back to itself"),
        (
            {"$ref": "#/$defs/0", "$defs": {**{str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(900)}, "900": {}}},
            "leads to another reference, and so on, more than 50 times",
        ),
        ({"enum": []}, "no value fits the schema"),
        ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#"}]}}}, "leads back to itself"),
        (
            ENDLESS,
            r"--schema s: \$\.properties\.a\.\$ref is '#', and no finite value fits there: each one holds another",
        ),
        (
            {
                "properties": {"a": {"$ref": "#/$defs/a"}},
                "$defs": {"a": {"type": "array", "minItems": 1, "items": ENDLESS_A}},
            },
            r"\$\.properties\.a\.\$ref is '#/\$defs/a', and no finite",
        ),
        (
            {"type": "object", "required": ["a"], "properties": {"a": {"anyOf": [{"$ref": "#"}, False]}}},
            r"\$\.properties\.a\.anyOf\[0\]\.\$ref is '#', and no finite",
        ),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "no value fits the schema"),
        ({"type": "array", "minItems": 2, "prefixItems": [{}], "items": False}, "no value fits the schema"),
        ({"items": {"$id": "https://example.org/a", "type": "string"}}, r"\$\.items\.\$id gives a part a name"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "no draft of JSON schema from draft-06 on"),
        (
            {"$schema": "https://json-schema.org/draft/2077/schema"},
            "/2077/schema', no draft",
        ),
        ({"$schema": {}}, r"\$schema is dict of 0"),
        ({"x-answer": {"befor": "a"}}, "'x-answer' is dict of 1, expected an object with texts lead, before"),
        ([], r"expected a JSON object, found \[\]"),
    ],
)
def test_what_is_no_schema_is_refused_by_place(schema: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(schema))
    with pytest.raises(UsageError, match=message):
        read_schema(tmp_path / "s.json", UsageError, "--schema s")


@pytest.mark.parametrize(
    "schema",
    [
        {**ENDLESS, "required": []},
        {"properties": ENDLESS["properties"], "required": ["a"]},  # {"a": 1}
        {**ENDLESS, "type": ["object", "null"]},
        {**ENDLESS, "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "object", "patternProperties": {"a": {}}, "required": ["a"], "additionalProperties": False},
        {"type": "object", "required": ["a"], "additionalProperties": {"enum": [{}], "type": "object"}},
        {"type": "array", "minItems": 1, "prefixItems": [{}], "items": False},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/never"}}, "$defs": {"never": False}},
        # Older drafts have a list of schemas there, and ignore what is next to a reference.
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "minItems": 1, "items": [{}]},
        {"$ref": "#/$defs/a", "type": "array", "minItems": 1, "items": False, "$defs": {"a": {}}},
    ],
)
def test_schemas_with_finite_values_are_read(schema: Any, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert read_schema(tmp_path / "s.json", UsageError).schema == schema


def test_a_long_chain_of_references_has_an_end(tmp_path: Path) -> None:
    def link(number: int) -> dict[str, Any]:
        return {"type": "object", "required": ["n"], "properties": {"n": {"$ref": f"#/$defs/{number}"}}}

    count = 5000
    chain: dict[str, Any] = {"$ref": "#/$defs/0", "$defs": {str(i): link(i + 1) for i in range(count)}}
    chain["$defs"][str(count)] = {"type": "null"}
    assert not list(PossibleValues(chain).endless_references()) and PossibleValues(chain).fits(chain)
    chain["$defs"][str(count)] = link(0)
    assert len(list(PossibleValues(chain).endless_references())) == count + 2


# --- tools -------------------------------------------------------------------------------------------------


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "It does.", "parameters": parameters}}


def calling(*calls: tuple[str, dict[str, Any]], tools: list[dict[str, Any]], **keys: Any) -> Chat:
    made = [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in calls]
    messages: list[Message] = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": made, **keys},
    ]
    return Chat(messages, f"f:{len(calls)}", tools=tools)


RAIN = tool("rain", {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}})
LAMP = tool(
    "lamp",
    {
        "properties": {"is_on": {"type": "boolean", "optional": True}, "level": {"$ref": "#/$defs/level"}},
        "required": ["is_on"],
        "$defs": {"level": {"type": "integer", "minimum": 0, "maximum": 9, "title": "Level"}},
    },
)


def test_calls_of_all_tools_with_the_text_of_the_template(messages: list[str]) -> None:
    rows = [
        Chat([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}], "f:1", tools=[LAMP]),
        calling(("rain", {"city": "Oslo"}), ("rain", {"city": "Bergen"}), tools=[RAIN]),
        calling(("rain", {"city": "Oslo"}), tools=[RAIN, tool("stop", None)]),
    ]
    answer = schema_of_tools(rows, tokenizer_for(THINKING), "rows")
    assert answer.lead == "<think>\n\n</think>\n\n"
    assert (answer.before, answer.after) == ("<tool_call>\n", "\n</tool_call>")
    assert answer.between == "\n</tool_call><tool_call>\n"
    by_name = {each["properties"]["name"]["const"]: each for each in answer.schema["anyOf"]}
    assert list(by_name) == ["lamp", "rain", "stop"]
    assert by_name["rain"]["required"] == ["name", "arguments"] and by_name["rain"]["additionalProperties"] is False
    assert by_name["rain"]["properties"]["arguments"] == {
        "type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False,
    }  # fmt: skip
    # Definitions move to the root, and what only describes is left out and counted.
    assert by_name["lamp"]["properties"]["arguments"]["properties"]["level"] == {"$ref": "#/$defs/lamp.level"}
    assert answer.schema["$defs"] == {"lamp.level": {"type": "integer", "minimum": 0, "maximum": 9}}
    assert any("not used" in line and "optional (1)" in line for line in messages)

    def call(name: str, arguments: str) -> str:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'

    assert answer.fault(call("lamp", '{"is_on": true, "level": 9}')) == answer.fault(call("stop", "{}")) == ""
    for name, arguments in {"lamp": '{"is_on": true, "level": 10}', "stop": '{"now": 1}', "snow": "{}"}.items():
        assert answer.fault(call(name, arguments))


def test_odd_names_and_objects_without_a_type_are_closed() -> None:
    parameters = {"properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"properties": {"q": {"const": 1}}}}}
    odd = tool("a/b~c", parameters)
    answer = schema_of_tools([calling(("a/b~c", {"p": {"q": 1}}), tools=[odd])], tokenizer_for(THINKING), "rows")

    def fault(arguments: str) -> str:
        return answer.fault(f'<tool_call>\n{{"name": "a/b~c", "arguments": {arguments}}}\n</tool_call>')

    assert fault('{"p": {"q": 1}}') == "" and fault('{"p": {"q": 2}}')
    assert fault('{"x": 1}') and fault('{"p": {"x": 1}}')


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"type": "object", "properties": {"day": {}}, "required": ["day", "city"]}, r"\$"),
        ({"properties": {}, "required": ["city"]}, r"\$"),
        (
            {"properties": {"a": {"type": "array", "items": {"properties": {"b": {}}, "required": ["city"]}}}},
            r"\$\.properties\.a\.items",
        ),
    ],
)
def test_a_required_property_that_a_tool_does_not_declare_is_named(parameters: Any, place: str) -> None:
    rows = [calling(("rain", {"city": "Oslo"}), tools=[tool("rain", parameters)])]
    message = rf"'parameters' of the tool 'rain': {place}\.required has 'city', which {place}\.properties does not"
    with pytest.raises(DataError, match=message):
        schema_of_tools(rows, tokenizer_for(THINKING), "rows")


def test_required_properties_that_have_no_values_of_their_own_are_permitted() -> None:
    """Further properties are open where a tool opens them, or names none."""
    for parameters in (
        {"type": "object", "required": ["city"]},
        {"type": "object", "properties": {"day": {}}, "required": ["city"], "additionalProperties": {"type": "string"}},
        {"properties": {"city": {}, "day": {}}, "anyOf": [{"required": ["city"]}, {"required": ["day"]}]},
    ):
        rows = [calling(("rain", {"city": "Oslo"}), tools=[tool("rain", parameters)])]
        answer = schema_of_tools(rows, tokenizer_for(THINKING), "rows")
        text = '<tool_call>\n{"name": "rain", "arguments": {"city": "Oslo"}}\n</tool_call>'
        assert answer.fault(text) == ""


def test_schemas_of_the_same_object_do_not_forbid_the_properties_of_one_another() -> None:
    parameters = {
        "properties": {"kind": {"enum": ["a", "b"]}, "inner": {"properties": {"x": {}}}},
        "anyOf": [{"properties": {"b": {"type": "integer"}}, "required": ["b"]}, {"required": ["kind"]}],
        "if": {"properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        "then": {"required": ["b"]},
        "dependentRequired": {"inner": ["b"]},
        "dependentSchemas": {"b": {"properties": {"kind": {"const": "b"}}}},
    }
    answer = schema_of_tools(
        [calling(("go", {"kind": "b", "b": 1}), tools=[tool("go", parameters)])], tokenizer_for(THINKING), "rows"
    )

    def fault(arguments: str) -> str:
        return answer.fault(f'<tool_call>\n{{"name": "go", "arguments": {arguments}}}\n</tool_call>')

    assert fault('{"kind": "b", "b": 1}') == fault('{"kind": "a"}') == ""
    assert fault('{"kind": "b"}') and fault('{"kind": "a", "inner": {}}') and fault('{"kind": "a", "b": 1}')
    assert fault('{"kind": "b", "b": 1, "inner": {"y": 1}}')


@pytest.mark.parametrize("reference", ["#", "#/properties/a"])
def test_a_reference_of_a_tool_to_other_parts_is_named(reference: str) -> None:
    parameters = {"properties": {"a": {"type": "string"}, "b": {"$ref": reference}}}
    rows = [calling(("go", {}), tools=[tool("go", parameters)])]
    message = rf"'parameters' of the tool 'go': \$\.properties\.b\.\$ref is '{reference}', and only definitions"
    with pytest.raises(DataError, match=message):
        schema_of_tools(rows, tokenizer_for(THINKING), "rows")


def test_calls_that_their_own_tools_do_not_permit_are_counted(messages: list[str]) -> None:
    rows = [calling(("rain", {"city": 7}), tools=[RAIN]), calling(("rain", {"city": "Oslo"}), tools=[RAIN])]
    schema_of_tools(rows, tokenizer_for(THINKING), "rows")
    assert any(line.startswith("1 of the first 2 answers with calls are not valid") for line in messages)


def test_one_name_with_two_schemas_gives_two_alternatives() -> None:
    other = tool("rain", {"type": "object", "properties": {"day": {"type": "integer"}}})
    rows = [calling(("rain", {"city": "Oslo"}), tools=[RAIN, RAIN]), calling(("rain", {"day": 2}), tools=[other])]
    answer = schema_of_tools(rows, tokenizer_for(THINKING), "rows")
    assert len(answer.schema["anyOf"]) == 2 and answer.between is None


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([Completion("a", "b", "f:1")], CHATML, "--schema tools: rows has no rows with 'tools'. Give --schema FILE"),
        (
            [Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "f:1", tools=[RAIN])],
            THINKING,
            "has no answers with 'tool_calls'",
        ),
        ([calling(("rain", {"city": "a"}), tools=[RAIN])], CALLS_AS_TEXT, "f:1: .* no JSON object with 'name'"),
        (
            [
                calling(("rain", {"city": "a"}), tools=[RAIN]),
                calling(("rain", {"city": "a"}), ("rain", {}), tools=[RAIN], content="Sure."),
            ],
            THINKING,
            "f:2: the text around the calls differs from that in f:1",
        ),
        (
            [calling(("rain", {"city": "a"}), tools=[tool("rain", {"type": "dict"})])],
            THINKING,
            "'parameters' of the tool 'rain': no valid JSON schema: .*type: 'dict'",
        ),
        (
            [calling(("rain", {"city": "a"}), tools=[RAIN])],
            THINKING.replace("<tool_call>", "<|endoftext|>"),
            r"f:1: the chat template writes the special token '<\|endoftext\|>' into calls",
        ),
    ],
)
def test_rows_without_a_schema_are_refused_by_row(rows: list[Any], template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        schema_of_tools(rows, tokenizer_for(template), "rows")
