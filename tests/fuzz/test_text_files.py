"""Fuzz the readers of text: rows, configurations, manifests, bits, profiles, measurements, genai_config, templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fuzz_inputs  # noqa: F401  (loads the settings)
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import as_json, mutated_bytes, mutated_document, require_value_or_error

from conftest import make_tokenizer
from qat_edge import config, profiles
from qat_edge.data import tokenization
from qat_edge.data.answer_schema import read_schema
from qat_edge.data.formats import load_rows
from qat_edge.errors import DataError
from qat_edge.manifest import FORMAT, read_manifest
from qat_edge.options import (
    CompareOptions,
    ExportOptions,
    FinetuneOptions,
    QuantizeOptions,
    SensitivityOptions,
    SweepOptions,
    ValidateOptions,
)
from qat_edge.quant.bits_file import load_bits
from qat_edge_exporters.gguf import gbnf
from qat_edge_exporters.onnx import genai_config, lark_grammar

ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "1"}]},
    {"prompt": "say 2 ", "completion": "2"},
    {"text": "three"},
]
SECTIONS: dict[str, type] = {
    "finetune": FinetuneOptions,
    "quantize": QuantizeOptions,
    "export": ExportOptions,
    "validate": ValidateOptions,
    "sensitivity": SensitivityOptions,
    "sweep": SweepOptions,
    "compare": CompareOptions,
}
CONFIGURATION: dict[str, Any] = {
    name: config.plain(cls("m", "d") if cls is FinetuneOptions else cls()) for name, cls in SECTIONS.items()
}
MANIFEST = {
    "format": FORMAT,
    "kind": "adapter",
    "qat_edge": "0.2.0",
    "libraries": {"torch": "2.13"},
    "files": {"a": {"bytes": 1, "sha256": "0"}},
}
BITS = {
    "asked": "--max-size-mb 1",
    "model": {"name": "m", "weights": "ab", "kept_layers": [0, 2]},
    "levels": "seq",
    "bits": {"model.layers.0.mlp.up_proj": 2, "lm_head": 4},
}
ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["dog", 7, None]},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 31},
        "names": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 9}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/next"}, {"const": 3}]},
    },
    "required": ["kind"],
    "additionalProperties": False,
    "$defs": {"next": {"type": ["boolean", "number"], "description": "one"}},
    "x-answer": {"before": "<call>", "after": "</call>"},
}
GENAI: dict[str, Any] = {
    "model": {
        "bos_token_id": 1,
        "context_length": 64,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": 16,
            "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
            "num_hidden_layers": 2,
        },
        "eos_token_id": [2],
    },
    "search": {"max_length": 64, "top_p": 1.0, "do_sample": False},
}
PROFILE = b"# a phone\nthreads = 4\nrepeats = 3\nmax_kl = 0.5\nmin_decode = 10\ntarget = ['onnx']\n"


def written(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def tokenize(path: Path) -> None:
    tokenization.tokenize(load_rows(str(path)), make_tokenizer(), 64)


@given(st.data())
def test_rows(tmp_path: Path, data: st.DataObject) -> None:
    lines = b"".join(as_json(row) + b"\n" for row in data.draw(mutated_document(ROWS)) or [0])
    for name, text in (("rows.jsonl", lines), ("rows.json", as_json(data.draw(mutated_document(ROWS))))):
        path = written(tmp_path, name, text)
        require_value_or_error(lambda path=path: tokenize(path))


@given(st.sampled_from(("rows.jsonl", "rows.json", "rows.csv", "rows.txt")), st.data())
def test_bytes_of_rows(tmp_path: Path, name: str, data: st.DataObject) -> None:
    text = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "rows.json": json.dumps(ROWS),
        "rows.csv": 'prompt,completion\n"say ""1"" ",1\nsay 2,2\n',
        "rows.txt": "some text\nand more, äöü 🙂\n",
    }[name]
    path = written(tmp_path, name, data.draw(mutated_bytes(text.encode())))
    require_value_or_error(lambda: tokenize(path))


@given(mutated_document(CONFIGURATION), st.sampled_from(sorted(SECTIONS)))
def test_configurations(tmp_path: Path, document: Any, section: str) -> None:
    # JSON is YAML; what YAML cannot hold becomes an error.
    path = written(tmp_path, "config.yaml", as_json(document))
    require_value_or_error(lambda: config.load(SECTIONS[section], section, path, {}))


@given(mutated_bytes(yaml.safe_dump(CONFIGURATION).encode()), st.sampled_from(sorted(SECTIONS)))
def test_bytes_of_configurations(tmp_path: Path, data: bytes, section: str) -> None:
    path = written(tmp_path, "config.yaml", data)
    require_value_or_error(lambda: config.load(SECTIONS[section], section, path, {}))


@given(mutated_document(MANIFEST))
def test_manifests(tmp_path: Path, document: Any) -> None:
    written(tmp_path, "manifest.json", as_json(document))
    require_value_or_error(lambda: read_manifest(tmp_path))


@given(mutated_document(BITS), mutated_bytes(yaml.safe_dump(BITS).encode()))
def test_bits(tmp_path: Path, document: Any, data: bytes) -> None:
    for text in (as_json(document), data):
        path = written(tmp_path, "bits.yaml", text)
        require_value_or_error(lambda path=path: load_bits(path))


@given(mutated_bytes(PROFILE))
def test_profiles(tmp_path: Path, data: bytes) -> None:
    path = written(tmp_path, "profile.toml", data)
    require_value_or_error(lambda: profiles.read(str(path)))
    require_value_or_error(lambda: config.load(ValidateOptions, "validate", None, {"profile": str(path)}))


@given(mutated_document(GENAI), mutated_bytes(json.dumps(GENAI).encode()))
def test_genai_configurations(tmp_path: Path, document: Any, data: bytes) -> None:
    for text in (as_json(document), data):
        written(tmp_path, "genai_config.json", text)
        require_value_or_error(lambda: genai_config.check_config(tmp_path))


@given(mutated_document(ANSWER), mutated_bytes(json.dumps(ANSWER).encode()))
def test_schemas_of_answers(tmp_path: Path, document: Any, data: bytes) -> None:
    """Whatever is read becomes grammars, or is refused, and judges an answer."""
    for text in (as_json(document), data):
        path = written(tmp_path, "schema.json", text)
        require_value_or_error(
            lambda path=path: read_schema(path, DataError).fault('<call>{"kind": 7, "age": 3}</call>')
        )
        for grammar in (gbnf.grammar, lark_grammar.grammar):
            require_value_or_error(lambda path=path, grammar=grammar: grammar(read_schema(path, DataError)))
