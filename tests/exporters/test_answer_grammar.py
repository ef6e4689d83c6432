"""Grammars of answers: what they permit is valid, what they cannot express is refused, and runtimes follow them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from conftest import export_frozen_llama, make_tokenizer
from qat_edge.data.answer_schema import AnswerSchema
from qat_edge.data.conversation import text_prompt
from qat_edge.errors import ArtifactError, ExportError
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.agent.llama_grammar import LlamaGrammar
from qat_edge_devices.agent.llama_model import LlamaModel
from qat_edge_devices.agent.model_errors import RequestRejected
from qat_edge_devices.device_errors import RequestRejectedError
from qat_edge_exporters.gguf import gbnf
from qat_edge_exporters.gguf.digit_ranges import integers_between
from qat_edge_exporters.onnx import lark_grammar
from qat_edge_exporters.targets import target_named

PET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["dog", "cat", 'a "fish"', 7]},
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 31},
        "tags": {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
NODE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"const": None}]}},
            "required": ["next"],
        }
    },
}
# A union as pydantic writes it.
UNION: dict[str, Any] = {
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/cat"}},
    "$defs": {
        "cat": {"type": "object", "properties": {"kind": {"const": "cat"}, "age": {"type": "integer"}}},
        "dog": {"type": "object", "properties": {"kind": {"const": "dog"}}},
    },
}
for each in UNION["$defs"].values():
    each["required"] = list(each["properties"])
WRAPPED = AnswerSchema(PET, "<think>\n\n</think>\n\n", "<call>\n", "\n</call>\n<call>\n", "\n</call>")
# A schema whose answers are short, so that a random model ends them.
SHORT = AnswerSchema({"anyOf": [{"enum": ["dog", "a cat"]}, {"type": "integer", "minimum": 0, "maximum": 99}]})

try:
    LlamaModel()
    has_llama = True
except ModuleNotFoundError:
    has_llama = False
runs_llama = pytest.mark.skipif(not has_llama, reason="xllamacpp is not installed (pip install qat-edge[gguf])")


# --- GBNF --------------------------------------------------------------------------------------------------


def test_integers_between_two_bounds_are_all_and_no_others() -> None:
    draw = random.Random(0)
    pairs = [tuple(sorted((draw.randint(-1200, 1200), draw.randint(-1200, 1200)))) for _ in range(40)]
    for low, high in [(0, 0), (-1, 1), (3, 15), (-10, -9), (99, 101), (1000, 1000), *pairs]:
        parts = [part.replace('"', "").replace(" ", "") for part in integers_between(low, high)]
        pattern = re.compile("|".join(f"(?:{part})" for part in parts))
        found = [n for n in range(-1300, 1301) if pattern.fullmatch(str(n))]
        assert found == list(range(low, high + 1)), (low, high)
        assert not pattern.fullmatch("-0") and not pattern.fullmatch("01")


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_frozen_llama("gguf", tmp_path_factory.mktemp("gguf"), 64)


class Judge:
    """Llama.cpp as a judge of texts: a tokenizer of bytes spells any of them."""

    def __init__(self, folder: Path) -> None:
        self.model = LlamaModel()
        self.model.load(folder / "model.gguf", {}, 1)

    def permits(self, grammar: str, text: str) -> bool:
        """Return whether the grammar permits a whole text, and its end."""
        return self.permits_tokens(grammar, self.model.tokenize(text, adds_special=False))

    def permits_bytes(self, grammar: str, data: bytes) -> bool:
        """Return whether the grammar permits bytes, one token each."""
        names, tokenizer = bytes_to_unicode(), make_tokenizer()
        return self.permits_tokens(grammar, [tokenizer.convert_tokens_to_ids(names[byte]) for byte in data])

    def permits_tokens(self, grammar: str, tokens: Sequence[int]) -> bool:
        """Return whether the grammar permits tokens, and the end after them."""
        self.model.constrain(grammar, [2])
        limits: LlamaGrammar | None = self.model.grammar
        assert limits is not None
        for token in tokens:
            if not limits._permitted([token])[0]:
                return False
            self.model._call("llama_sampler_accept", limits._sampler, token)
        return bool(limits._permitted([2])[0])


@pytest.fixture(scope="module")
def judge(gguf_folder: Path) -> Iterator[Judge]:
    yield Judge(gguf_folder)


@runs_llama
@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        (
            AnswerSchema(PET),
            [
                '{"name":"a"}', '{ "name" : "äöü\\"" }', '{"kind":"a \\"fish\\"","name":"ab","age":30}',
                '{\n  "kind": 7,\n  "name": "ab",\n  "tags": [true, null]\n}',
            ],
        ),
        (AnswerSchema(NODE), ['{"next":{"next":null}}']),
        (WRAPPED, ['<call>\n{"name":"a"}\n</call>', '<think>\n\n</think>\n\n<call>\n{"name":"a"}\n</call>']),
        (WRAPPED, ['<call>\n{"name":"a"}\n</call>\n<call>\n{"name":"b"}\n</call>']),
        (AnswerSchema({}), ['{"a":[1,-2.5,"x",{}],"b":null}', "[]", "true", '"\\u00e4\\uD7ff"']),
        (AnswerSchema({"type": "object", "additionalProperties": {"type": "number"}}), ['{"a":1,"b":0.5}', "{}"]),
        (AnswerSchema({"type": "array", "items": {"type": "integer"}}), ["[]", "[1, 2,3]"]),
        (AnswerSchema({"type": "object", "required": ["a"]}), ['{"a":[1]}']),
        (AnswerSchema({"type": "string"}), ['"a\\nb"', '""']),
        (AnswerSchema({"type": "string", "minLength": 2, "maxLength": 2}), ['"\\u00e9\\u001b"', '"é\\n"']),
        (AnswerSchema(UNION), ['{"kind":"cat","age":3}', '{"kind":"dog"}']),
    ],
)  # fmt: skip
def test_valid_texts_are_permitted(answer: AnswerSchema, texts: list[str], judge: Judge) -> None:
    grammar = gbnf.grammar(answer)
    for text in texts:
        assert answer.fault(text) == "", text
        assert judge.permits(grammar, text), text


@runs_llama
@pytest.mark.parametrize(
    "text",
    [
        "{}", '{"kind":"dog"}', '{"name":""}', '{"name":"abcde"}', '{"name":"a","age":31}', '{"name":"a","age":-1}',
        '{"name":"a","age":1.5}', '{"name":"a","tags":[]}', '{"name":"a","tags":[true,true,true]}', '{"name":"a",}',
        '{"kind":"cow","name":"a"}', '{"name":"a","more":1}', '{"name":"a"', '{"name":"a"} ', '["a"]', '{"name":"\n"}',
        '{"age":1,"name":"a"}',
    ],
)  # fmt: skip
def test_other_texts_are_not(text: str, judge: Judge) -> None:
    assert not judge.permits(gbnf.grammar(AnswerSchema(PET)), text)


@runs_llama
@pytest.mark.parametrize("text", ['"\\ud800"', "1e999", "01", "'a'", "nul", "[1,]", '{"a" 1}', "-"])
def test_texts_that_are_no_json_are_not_permitted(text: str, judge: Judge) -> None:
    assert AnswerSchema({}).fault(text) and not judge.permits(gbnf.grammar(AnswerSchema({})), text)


@runs_llama
@pytest.mark.parametrize("schema", [{"type": "string"}, {"type": "string", "maxLength": 4}])
def test_characters_of_unicode_are_permitted_and_other_bytes_are_not(schema: dict[str, Any], judge: Judge) -> None:
    grammar = gbnf.grammar(AnswerSchema(schema))
    for character in "A!]^~\x80é\u20ac\ud7ff\ue000\ufffd\U0001f600\U0010ffff":
        assert judge.permits_bytes(grammar, f'"{character}"'.encode()), character
    # A control, half a surrogate pair, beyond U+10FFFF, a byte of no character, a character that is cut.
    for data in (
        b"\x7f",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf5\x80\x80\x80",
        b"\xff\xbf\xbf\xbf",
        b"\x80",
        b"\xc3",
    ):
        assert not judge.permits_bytes(grammar, b'"' + data + b'"'), data


@runs_llama
def test_repetitions_inside_repetitions_are_within_the_limits_of_llama_cpp(judge: Judge) -> None:
    inner = {"type": "array", "items": {"type": "string", "maxLength": 1000}, "maxItems": 1000}
    grammar = gbnf.grammar(AnswerSchema({"type": "array", "items": inner, "maxItems": 1000}))
    assert judge.permits(grammar, '[["a","b"],[]]')
    with pytest.raises(RequestRejected, match="refused the grammar"):
        judge.model.constrain("root ::= nothing-of-that-name", [2])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "a+"}, r"\$\.pattern is a keyword, which llama.cpp's grammar does not express"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, r"\$\.properties\.a\.uniqueItems"),
        (
            {"oneOf": [{"type": "string"}, {"maxLength": 2}]},
            r"\$\.oneOf has schemas that one value may fit.*There, write \"anyOf\"",
        ),
        ({"type": "string", "nullable": True}, r'\$\.nullable is a keyword.*There, write "type": \[\.\.\., "null"\]'),
        ({"type": "array", "uniqueItems": None}, r"\$\.uniqueItems is a keyword"),
        ({"anyOf": [{"type": "string"}], "minLength": 2}, r"\$ has 'anyOf' together with minLength"),
        ({"type": "number", "minimum": 0}, r"\$\.minimum limits numbers with a decimal point"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "permits no integer"),
        ({"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 3}, "permits no integer"),
        ({"type": "string", "maxLength": 4096}, r"\$\.maxLength is 4096, more than 1000"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems is 3, maxItems is 2"),
        ({"enum": ["a"], "type": "integer"}, "permits no value"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "permits no value"),
        ({"enum": [{}], "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": True}}, "together with properties"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [{}, {}]}, r"\$\.items is a list of schemas"),
        (
            {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            r"\$\.properties\.a\.\$ref leads to a value without an end, unless 'type' is given there, which",
        ),
        ({"type": "string", "minLenght": 2}, r"\$\.minLenght is a keyword"),
    ],
)
def test_what_gbnf_cannot_express_is_refused_by_place(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        gbnf.grammar(AnswerSchema(schema))


def test_definitions_that_refer_to_one_another_by_the_hundred_are_written() -> None:
    def link(number: int) -> dict[str, Any]:
        return {"type": "object", "properties": {"n": {"$ref": f"#/$defs/{number}"}}}

    chain = {"$ref": "#/$defs/0", "$defs": {str(i): link((i + 1) % 2000) for i in range(2000)}}
    text = gbnf.grammar(AnswerSchema(chain))
    assert text.count("\nref-") == 2000 and " ::= \n" not in text


def test_descriptions_and_private_keywords_change_nothing() -> None:
    plain = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    described = {
        **plain, "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "x-order": 3,
        "properties": {"a": {"type": "integer", "description": "one", "default": 2, "examples": [3], "example": 3}},
        "discriminator": {"propertyName": "a"}, "xml": {"name": "t"}, "uniqueItems": False, "nullable": False,
    }  # fmt: skip
    assert gbnf.grammar(AnswerSchema(described)) == gbnf.grammar(AnswerSchema(plain))
    assert "nullable" not in lark_grammar.grammar(AnswerSchema(described))


def test_guidance_has_more_keywords_and_refuses_the_others() -> None:
    schema = {"type": "string", "pattern": "^a+$"}
    text = lark_grammar.grammar(AnswerSchema(schema))
    assert text.startswith("start: answer\nanswer: %json ")
    found = json.loads(text.partition("%json ")[2])
    assert "whitespace_pattern" in found.pop("x-guidance") and found == schema
    assert lark_grammar.grammar(WRAPPED).startswith(
        'start: ("<think>\\n\\n</think>\\n\\n")? "<call>\\n" answer ("\\n</call>\\n<call>\\n" answer)* "\\n</call>"\n'
    )
    with pytest.raises(ExportError, match=r"\$\.items\.not is a keyword, which onnxruntime-genai's guidance"):
        lark_grammar.grammar(AnswerSchema({"type": "array", "items": {"not": {}}}))


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = export_frozen_llama("onnx", tmp_path_factory.mktemp("onnx"), 64)
    make_tokenizer().save_pretrained(folder)
    return folder


class GuidanceJudge:
    """onnxruntime-genai as a judge of texts: it takes the wanted token wherever the grammar permits it."""

    def __init__(self, folder: Path) -> None:
        self.model = onnxruntime_genai.Model(str(folder))
        self.tokenizer = make_tokenizer()

    def permits(self, grammar: str, text: str) -> bool:
        """Return whether the grammar permits a whole text, and its end."""
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=64)
        params.set_guidance("lark_grammar", grammar)
        generator = onnxruntime_genai.Generator(self.model, params)
        generator.append_tokens(np.array([5], np.int32))
        for token in [*self.tokenizer.encode(text), 2]:
            wanted = np.full_like(generator.get_logits(), -1)
            wanted[..., token] = 1e4
            generator.set_logits(wanted)
            generator.generate_next_token()
            if int(generator.get_next_tokens()[0]) != token:
                return False
        return True


@pytest.fixture(scope="module")
def guidance(onnx_folder: Path) -> GuidanceJudge:
    return GuidanceJudge(onnx_folder)


NUMBERS = ["0", "-1", "1.5", "-0.5", "9" * 16, "0." + "3" * 16]
NO_NUMBERS = ["1e400", "1e5", "1E-5", "1" + "0" * 16, "-1" + "0" * 16, "01", "1.", ".5", "+1"]
IN_SCHEMAS: list[tuple[dict[str, Any], str]] = [
    ({"type": "number"}, "{}"),
    ({}, "{}"),
    ({"type": "array"}, "[[{}]]"),
    ({"type": "object"}, '{{"a":[{}]}}'),
    ({"type": "object", "additionalProperties": True}, '{{"a":{{"b":{}}}}}'),
    ({"type": "array", "items": True}, "[{}]"),
    ({"properties": {"a": {"anyOf": [{"type": ["number", "null"]}, {"type": "string"}]}}}, '{{"a":{}}}'),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {}}}}, "[{}]"),
]


@pytest.mark.parametrize(("schema", "text"), IN_SCHEMAS)
def test_guidance_permits_numbers_that_floats_hold(schema: dict[str, Any], text: str, guidance: GuidanceJudge) -> None:
    grammar = lark_grammar.grammar(AnswerSchema(schema))
    assert [number for number in NUMBERS + NO_NUMBERS if guidance.permits(grammar, text.format(number))] == NUMBERS


@runs_llama
@pytest.mark.parametrize(("schema", "text"), IN_SCHEMAS)
def test_llama_cpp_permits_the_same_numbers(schema: dict[str, Any], text: str, judge: Judge) -> None:
    grammar = gbnf.grammar(AnswerSchema(schema))
    assert [number for number in NUMBERS + NO_NUMBERS if judge.permits(grammar, text.format(number))] == NUMBERS


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        (
            {
                "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"type": "number"}}}],
                "$defs": {"a": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
            },
            ['{"a":"x","b":1}', '{"a":"x","b":1e400}'],
        ),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "string"}, "b": {"type": "integer"}},
                "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            },
            ['{"a":"x"}', '{"b":1e400}'],
        ),
        ({"oneOf": [{"type": "string"}, {"type": "number", "minimum": 0}]}, ["7", "1" + "0" * 16]),
    ],
)
def test_guidance_bounds_the_numbers_of_intersections(
    schema: dict[str, Any], texts: list[str], guidance: GuidanceJudge
) -> None:
    grammar = lark_grammar.grammar(AnswerSchema(schema))
    assert [guidance.permits(grammar, text) for text in texts] == [True, False]


@pytest.mark.parametrize(
    ("schema", "valid", "other"),
    [
        # Characters of three bytes or more, which may be several tokens.
        ({"enum": ["\u4e2d\u6587", "a\U0001f600", "\u00fc"]}, ["中文", "a😀", "ü"], ["中", "a"]),
        ({"properties": {"\u4e2d": {}}, "required": ["中"], "maxProperties": 1}, [{"中": 1}], [{"文": 1}]),
        ({"type": "string", "pattern": "^\\u4e2d+$"}, ["中中"], ["", "a"]),
        (UNION, [{"kind": "cat", "age": 3}, {"kind": "dog"}], [{"kind": "cat"}, {"kind": "cow"}]),
        ({"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"const": 1}}}, [1, None], [2]),
        ({"type": "string", "minLength": 1.0, "maxLength": 2.0}, ["a"], ["", "abc"]),
        ({"type": "array", "items": {"enum": [1]}, "uniqueItems": False}, [[1, 1]], [[2]]),
        ({"type": "number", "minimum": -1e30, "maximum": 1e30}, [0.5, -7], [10**17]),
        ({"type": "string", "pattern": r'^[^"\\/]+$'}, ["a", "[1]"], ['a"', "a\\", "a/"]),
        ({"type": "string", "pattern": "^[[:alph&&x]+$"}, ["a:", "&["], ["b", ""]),
        ({"type": "number", "multipleOf": 0.01, "minimum": 0}, [19.99, 0.29, 4.35], [0.295]),
    ],
)
def test_guidance_permits_what_the_schema_does(
    schema: dict[str, Any], valid: list[Any], other: list[Any], guidance: GuidanceJudge
) -> None:
    answer = AnswerSchema(schema)
    grammar = lark_grammar.grammar(answer)
    for value in valid + other:
        text = json.dumps(value, ensure_ascii=False)
        assert guidance.permits(grammar, text) is (value in valid), text
    assert [value for value in valid if answer.fault(json.dumps(value))] == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": r"^C:\\[a-z]+$"}, r"\$\.pattern has a quotation mark or a backslash outside of"),
        (
            {"properties": {"x-a": {}}, "patternProperties": {"^x-": {"type": "integer"}}},
            r"\$\.patternProperties\.\^x- is for the property 'x-a' as well",
        ),
        ({"type": "number", "minimum": 1e17}, r"\$\.minimum permits only numbers of more than 16 digits"),
        ({"type": "integer", "maximum": -(10**17)}, r"\$\.maximum permits only numbers of more than 16 digits"),
        ({"multipleOf": 5, "exclusiveMaximum": -1}, r"\$\.multipleOf permits negative numbers only"),
    ],
)
def test_what_guidance_would_get_wrong_is_refused_by_place(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        lark_grammar.grammar(AnswerSchema(schema))


def test_guidance_gets_neither_formats_nor_settings_of_a_user() -> None:
    """In JSON schema, "format" describes; guidance would exclude values by it."""
    inner = {"format": {"type": "string", "format": "date"}}
    schema = {"x-guidance": {"lenient": True}, "type": "object", "properties": inner, "additionalProperties": False}
    found = json.loads(lark_grammar.grammar(AnswerSchema(schema)).partition("%json ")[2])
    plain = {"type": "object", "properties": {"format": {"type": "string"}}, "additionalProperties": False}
    assert found == {"x-guidance": lark_grammar.SPACES, **plain}


def test_guidance_gets_bounds_for_integers_without() -> None:
    """Without bounds, a model may write digits up to the longest answer."""
    schema = {"properties": {"type": {"const": {"type": "integer"}}, "n": {"type": ["integer", "null"], "minimum": 2}}}
    found = json.loads(lark_grammar.grammar(AnswerSchema(schema)).partition("%json ")[2])
    assert found["properties"]["n"] == {"type": ["integer", "null"], "minimum": 2, "exclusiveMaximum": 10**16}
    assert found["properties"]["type"] == {"const": {"type": "integer"}}


# --- the runtimes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["onnx", pytest.param("gguf", marks=runs_llama)])
def artifact(request: pytest.FixtureRequest) -> Path:
    """A random model that was exported with a schema."""
    if request.param == "gguf":
        folder: Path = request.getfixturevalue("gguf_folder")
    else:
        folder = request.getfixturevalue("onnx_folder")
    target_named(folder.name).write_schema(folder, SHORT)
    return folder


def test_the_runtime_takes_the_grammar_and_no_other(artifact: Path) -> None:
    target = target_named(artifact.name)
    assert target.grammar is not None and target.schema_faults(artifact) == []
    model, path = artifact / target.file, artifact / target.grammar.file
    assert target.grammar.refusal(model) == ""
    text = path.read_text()
    try:
        path.write_text("this is no grammar")
        assert target.grammar.refusal(model)
        assert "not the grammar of schema.json" in target.schema_faults(artifact)[0]
        with pytest.raises(ArtifactError, match=r"not the grammar of schema\.json"):
            target.open_generator(artifact, make_tokenizer(), constrained=True).__enter__()
    finally:
        path.write_text(text)


def test_constrained_text_is_valid_in_every_turn(artifact: Path) -> None:
    tokenizer = make_tokenizer()
    prompt = text_prompt("the other", tokenizer)
    with target_named(artifact.name).open_generator(artifact, tokenizer, constrained=True) as generator:
        for _ in range(2):
            pieces: list[str] = []
            assert generator.generate(prompt, pieces.append, 50)
            assert SHORT.fault("".join(pieces)) == ""


def test_constrained_answers_of_a_device_are_valid(artifact: Path) -> None:
    tokenizer = make_tokenizer()
    prompts = [tokenizer.encode(text) for text in ("hi", "the other")]
    transport = open_transport("local")
    try:
        runtime = open_runtime(artifact.name, transport, 1)
        runtime.prepare(artifact)
        free = runtime.generate(prompts, [2], 50)
        found = runtime.generate(prompts, [2], 50, constrained=True)
    finally:
        transport.close()
    assert [SHORT.fault(tokenizer.decode(each.ids)) for each in found.completions] == ["", ""]
    assert {each.stopped for each in found.completions} == {"eos"}
    assert all(SHORT.fault(tokenizer.decode(each.ids)) for each in free.completions)


def test_a_runtime_without_a_grammar_refuses(tmp_path: Path) -> None:
    transport = open_transport("local")
    try:
        with pytest.raises(RequestRejectedError, match="has no grammar that its runtime takes"):
            open_runtime("executorch", transport, 1).generate([[1]], [2], 3, constrained=True)
    finally:
        transport.close()
    with pytest.raises(ArtifactError, match="ExecuTorch's LLM runner takes no grammar"):
        target_named("executorch").open_generator(tmp_path, make_tokenizer(), constrained=True).__enter__()
