"""doctor on GGUF files, of ours and of other tools: whether llama.cpp loads them, and each kind of damage by name."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from conftest import CHAT_TEMPLATE, MERGES, SPECIAL_TOKENS, export_frozen_llama, make_tokenizer
from qat_edge.cli import commands
from qat_edge.errors import ArtifactError
from qat_edge.manifest import write_manifest
from qat_edge.options import DoctorOptions
from qat_edge.verbs import doctor
from qat_edge_exporters import file_diagnosis
from qat_edge_exporters.file_diagnosis import FileDiagnosis
from qat_edge_exporters.gguf import gguf_diagnosis, gguf_scan, llama_probe
from qat_edge_exporters.gguf.llama_probe import LoadedWeights
from qat_edge_exporters.targets import LLAMA_CPP

WIDTH, ROWS, CONTEXT = 64, 267, 32
LINEARS = {"attn_q": WIDTH, "attn_k": WIDTH, "attn_v": WIDTH, "attn_output": WIDTH, "ffn_gate": WIDTH, "ffn_up": WIDTH}
NORMS = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0


def examine(path: Path, *runtimes: str) -> FileDiagnosis:
    found = doctor.doctor(path, DoctorOptions(runtime=runtimes))
    assert isinstance(found, FileDiagnosis)
    return found


def run(*arguments: object) -> Any:
    return CliRunner().invoke(commands.main, ["doctor", *map(str, arguments)])


def metadata() -> dict[str, Any]:
    """Metadata of a llama with the tokenizer of conftest.py, as another tool would write it."""
    tokenizer = make_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    return {
        "general.name": "Tiny",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def tensors() -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]:
    """Tensors of one layer: a table in F16, matrices in Q4_0, one in Q8_0, norms in F32."""
    rng = np.random.default_rng(0)

    def matrix(kind: gguf.GGMLQuantizationType) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        return gguf.quants.quantize(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), kind), kind

    return {
        "token_embd.weight": (rng.normal(size=(ROWS, WIDTH)).astype(np.float16), None),
        **{f"blk.0.{name}.weight": matrix(Q4_0) for name in LINEARS},
        "blk.0.ffn_down.weight": matrix(Q8_0),
        **{f"{name}.weight": (np.ones(WIDTH, np.float32), None) for name in NORMS},
    }


def write(path: Path, values: dict[str, Any], stored: dict[str, Any], architecture: str = "llama") -> Path:
    """Write a file with the package that other tools use."""
    writer = gguf.GGUFWriter(path, architecture)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in values.items():
        adders[type(value)](key, value)
    for name, (data, kind) in stored.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny-q4_0.gguf", metadata(), tensors())


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama.cpp that loads everything."""
    monkeypatch.setattr(llama_probe, "load_file", lambda path: LoadedWeights("", [2]))


# --- llama.cpp, for real ------------------------------------------------------------------------------------


def test_our_own_export_has_no_fault(tmp_path: Path) -> None:
    folder = export_frozen_llama("gguf", tmp_path, CONTEXT)

    found = examine(folder)
    assert found.path == folder / "model.gguf"
    assert [(check.runtime, check.tried, check.loads) for check in found.runtimes] == [(LLAMA_CPP, True, True)]
    assert (found.faults, found.notes) == ([], [])
    doctor.require_loadable(found, DoctorOptions(runtime=(LLAMA_CPP,)))
    contents = found.contents
    assert [(each.name, each.count) for each in contents.types] == [("Q8_0", 1), ("Q4_0", 7), ("F32", 3)]
    assert (contents.architecture, contents.context_length, contents.tied) == ("llama", CONTEXT, True)
    assert (contents.vocabulary, contents.rows) == (288, 288)

    write_manifest(folder, "export", options={"context_length": 2 * CONTEXT, "kv_cache": "float32"})
    (fault,) = examine(folder).faults
    assert fault.startswith(
        "manifest.json: 'options.context_length' is 64, but llama.context_length of model.gguf is 32"
    )


def test_a_file_of_another_tool_loads(foreign: Path) -> None:
    result = run(foreign.parent)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{foreign} loads in llama.cpp."
    assert "format     GGUF version 3; architecture llama, Tiny" in lines
    # llama.cpp knows <|endoftext|>, token 0, by its text.
    assert "text       context of 32 tokens; generation ends with 0, 2" in lines
    assert "rope       rope.freq_base = 5000.0" in lines
    assert [line for line in lines if line.startswith("tensors    F16 x1 34.2 kB, Q4_0 x6 13.8 kB, Q8_0 x1 4.4 kB")]
    assert not [line for line in lines if line.startswith(("fault", "note"))]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"architecture": "lama"}, "unknown model architecture: 'lama'"),
        ({"tokenizer.ggml.pre": "my rule"}, "unknown pre-tokenizer type: 'my rule'"),
    ],
)  # fmt: skip
def test_why_llama_cpp_refuses_a_file_is_named(tmp_path: Path, change: dict[str, str], wanted: str) -> None:
    architecture = change.pop("architecture", "llama")
    path = write(tmp_path / "model.gguf", metadata() | change, tensors(), architecture)
    (check,) = examine(path, LLAMA_CPP).runtimes
    assert not check.loads and wanted in check.error


def test_without_llama_cpp_the_file_is_examined_and_not_loaded(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_diagnosis, "find_spec", lambda name: None)
    result = run(foreign)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == f"{foreign} was not tried in llama.cpp."
    assert "not tried: pip install 'qat-edge[gguf]'" in result.stdout
    named = run(foreign, "--runtime", LLAMA_CPP)
    assert named.exit_code == 1 and "llama.cpp cannot load it: not tried: pip install" in named.stderr


def test_another_interface_of_llama_cpp_is_not_a_fault_of_the_file(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        def __init__(self) -> None:
            raise ModuleNotFoundError("xllamacpp with another interface", name="xllamacpp")

    reports: list[Any] = []
    monkeypatch.setattr(llama_probe, "WeightsLoader", Other)
    monkeypatch.setattr(llama_probe, "print_report", reports.append)
    monkeypatch.setattr(sys, "argv", ["llama_probe", str(foreign)])
    llama_probe.main()
    monkeypatch.setattr(llama_probe, "run_probe", lambda *given: (reports, ""))
    (check,) = examine(foreign).runtimes
    assert (check.tried, check.error) == (False, "")
    assert check.untried == "not tried: pip install 'qat-edge[gguf]'  (found: xllamacpp with another interface)"


def test_a_crash_of_llama_cpp_is_a_result(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_diagnosis, "utf8_command", lambda *_: [sys.executable, "-c", "import os; os.abort()"])
    assert [check.error for check in examine(foreign).runtimes] == ["it ended the process (-6)"]


# --- tensors ------------------------------------------------------------------------------------------------


def test_a_truncated_file_names_its_last_tensors(foreign: Path, loads: None) -> None:
    size = foreign.stat().st_size
    foreign.write_bytes(foreign.read_bytes()[: size - 1000])
    faults = examine(foreign).faults
    assert len(faults) == 4 and f"but the file has {size - 1000}. Copy or download the file again." in faults[0]
    assert faults[0].startswith("tiny-q4_0.gguf: the tensor blk.0.ffn_down.weight should be at bytes")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.0.attn_q.weight", "Q4_0"), ("blk.0.ffn_down.weight", "Q8_0"), ("token_embd.weight", "F16"),
        ("output_norm.weight", "F32"),
    ],
)  # fmt: skip
def test_scales_that_are_no_numbers_are_faults(tmp_path: Path, loads: None, name: str, kind: str, bad: float) -> None:
    stored = tensors()
    data = stored[name][0]
    if data.dtype == np.uint8:
        width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        blocks = data.reshape(-1, width)
        blocks[5, :2] = np.array([bad], np.float16).view(np.uint8)
    else:
        data.reshape(-1)[5] = bad
    (fault,) = examine(write(tmp_path / "model.gguf", metadata(), stored)).faults
    what = "value" if kind.startswith("F") else "scale"
    assert fault.startswith(f"model.gguf: the tensor {name} ({kind}) has 1 {what} that is infinite or no number")


@pytest.mark.parametrize("name", ["output_norm.weight", "rope_freqs.weight"])
def test_values_whose_products_overflow_are_faults(tmp_path: Path, loads: None, name: str) -> None:
    values = np.ones(WIDTH, np.float32)
    values[[3, 5, 7]] = 3e38, -3e38, 1e30
    faults = examine(write(tmp_path / "model.gguf", metadata(), tensors() | {name: (values, None)})).faults
    expected = (
        f"model.gguf: the tensor {name} (F32) has 2 values of more than 1e+32: products with them overflow float32."
    )
    # Factors of frequencies may be as large.
    assert [fault.startswith(expected) for fault in faults] == ([] if name.startswith("rope") else [True])


def test_large_scales_of_other_types_are_counted() -> None:
    numbers = np.array([1.0, 3e38, -3e38, np.inf, np.nan, 1e30], np.float32)
    raw = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    assert gguf_scan._count_too_large(gguf_scan.ScannedTensor("t", (6,), "BF16", 0, 12), raw) == 2
    kind = gguf.GGMLQuantizationType.MXFP4
    blocks = gguf.quants.quantize(np.ones((3, 32), np.float32), kind)
    blocks[1, 0] = 254  # 2^127
    tensor = gguf_scan.ScannedTensor("t", (3, 32), "MXFP4", 0, blocks.size)
    assert gguf_scan._count_too_large(tensor, blocks.ravel()) == 1
    with np.errstate(over="ignore"):
        assert np.abs(gguf.quants.dequantize(blocks, kind)[1]).max() > file_diagnosis.LARGEST_FACTOR


def test_a_base_without_a_rotary_embedding_is_no_fault(tmp_path: Path, loads: None) -> None:
    values = metadata() | {"llama.rope.dimension_count": 0, "llama.rope.freq_base": 0.0}
    assert examine(write(tmp_path / "model.gguf", values, tensors())).faults == []


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_grammar_without_its_schema_is_named(foreign: Path, loads: None, is_ours: bool) -> None:
    (foreign.parent / "grammar.gbnf").write_text('root ::= "a"\n')
    if is_ours:
        (foreign.parent / "manifest.json").write_text("{}")
    found = examine(foreign)
    named = [
        text for text in (found.faults if is_ours else found.notes) if text.startswith("grammar.gbnf: there is no")
    ]
    assert len(named) == 1 and "schema.json" in named[0] and (is_ours or found.faults == [])


@pytest.mark.parametrize("kind", sorted(gguf_scan.SCALES))
def test_the_places_of_scales_are_those_of_ggml(kind: str) -> None:
    """A block whose scale alone is NaN has no finite weight."""
    number = gguf.GGMLQuantizationType[kind]
    width, size_bytes = gguf.GGML_QUANT_SIZES[number]
    for offset in gguf_scan.SCALES[kind]:
        block = np.zeros((1, size_bytes), np.uint8)
        block[0, offset : offset + 2] = np.array([np.nan], np.float16).view(np.uint8)
        with np.errstate(invalid="ignore"):
            assert np.isnan(gguf.quants.dequantize(block, number)).all() or kind == "F16"
        tensor = gguf_scan.ScannedTensor("t", (1, width), kind, 0, size_bytes)
        assert gguf_scan._count_not_finite(tensor, block.ravel()) == 1


def test_bfloat16_is_checked() -> None:
    raw = np.array([0x3F80, 0x7F80, 0x7FC0, 0xFF80, 0x7F00], np.uint16).view(np.uint8)
    tensor = gguf_scan.ScannedTensor("t", (5,), "BF16", 0, 10)
    assert gguf_scan._count_not_finite(tensor, raw) == 3


def test_a_tensor_that_is_there_twice_is_a_fault(foreign: Path, loads: None) -> None:
    foreign.write_bytes(foreign.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
    assert [fault for fault in examine(foreign).faults if "the tensor blk.0.attn_q.weight is there twice" in fault]


def test_unknown_types_and_shapes_are_faults(foreign: Path, loads: None) -> None:
    data = foreign.read_bytes()
    name = b"blk.0.ffn_down.weight"
    kind = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and two sizes
    assert struct.unpack_from("<I", data, kind) == (Q8_0,)
    foreign.write_bytes(data[:kind] + struct.pack("<I", 99) + data[kind + 4 :])
    (fault,) = examine(foreign).faults
    assert "the tensor blk.0.ffn_down.weight has type 99 and the shape [64, 64], which gguf" in fault
    foreign.write_bytes(data[: kind - 16] + struct.pack("<Q", 2**62) + data[kind - 8 :])
    assert "the tensor blk.0.ffn_down.weight should be at bytes" in examine(foreign).faults[0]


# --- metadata -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "new", "wanted"),
    [
        ("llama.context_length", None, "llama.context_length is None: llama.cpp needs a number"),
        ("llama.rope.freq_base", float("nan"), "llama.rope.freq_base is nan, no finite number"),
        ("llama.rope.freq_base", 0.0, "llama.rope.freq_base is 0, not above 0: the angles of the rotary embedding"),
        ("llama.rope.freq_base", -1e4, "llama.rope.freq_base is -10000, not above 0"),
        ("llama.rope.freq_base_swa", 0.0, "llama.rope.freq_base_swa is 0, not above 0"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, "llama.attention.layer_norm_rms_epsilon is 0, not above"),
        ("llama.attention.layer_norm_rms_epsilon", -1e-5, "llama.attention.layer_norm_rms_epsilon is -1e-05, not"),
        ("llama.block_count", "many", "llama.block_count is 'many': llama.cpp needs a number"),
        ("llama.block_count", 3, "llama.block_count is 3, and layer 1 has no tensor"),
        ("tokenizer.ggml.model", None, "no tokenizer in it (tokenizer.ggml.model, tokenizer.ggml.tokens)"),
        ("tokenizer.ggml.tokens", None, "no tokenizer in it"),
        ("tokenizer.ggml.pre", None, "tokenizer.ggml.pre is missing: llama.cpp splits texts by a rule that no model"),
        ("tokenizer.ggml.eos_token_id", None, "no key names an end token (tokenizer.ggml.eos_token_id)"),
        ("tokenizer.ggml.eos_token_id", ROWS, "tokenizer.ggml.eos_token_id is 267, none of the 267 tokens"),
        ("tokenizer.ggml.bos_token_id", "one", "tokenizer.ggml.bos_token_id is 'one', none of the 267 tokens"),
        ("tokenizer.ggml.tokens", ["a", "b"], "tokenizer.ggml.tokens has 2 tokens, and token_embd.weight 267 rows"),
    ],
)  # fmt: skip
def test_metadata_that_is_missing_or_wrong_is_a_fault(
    tmp_path: Path, loads: None, key: str, new: Any, wanted: str
) -> None:
    values = metadata()
    values.pop(key, None)
    if new is not None:
        values[key] = new
    faults = examine(write(tmp_path / "model.gguf", values, tensors())).faults
    assert [fault for fault in faults if fault.startswith(f"model.gguf: {wanted}")], faults


def test_a_file_without_an_embedding_is_a_fault(tmp_path: Path, loads: None) -> None:
    stored = tensors()
    del stored["token_embd.weight"]
    found = examine(write(tmp_path / "model.gguf", metadata(), stored))
    assert [fault for fault in found.faults if "there is no tensor token_embd.weight" in fault]
    assert found.contents.rows is None and not found.contents.tied


def test_a_head_of_its_own_is_seen(tmp_path: Path, loads: None) -> None:
    stored = tensors()
    assert examine(write(tmp_path / "model.gguf", metadata(), stored)).contents.tied
    stored["output.weight"] = stored["token_embd.weight"]
    assert not examine(write(tmp_path / "model.gguf", metadata(), stored)).contents.tied


def test_a_template_that_ends_otherwise_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: None
) -> None:
    path = write(tmp_path / "model.gguf", metadata() | {"tokenizer.ggml.eos_token_id": 0}, tensors())
    assert examine(path).faults == []  # llama.cpp knows the token by its text
    monkeypatch.setattr(llama_probe, "load_file", lambda path: LoadedWeights("", [0]))
    (fault,) = examine(path).faults
    assert fault.startswith(
        "The chat template ends answers with '<|im_end|>' (2), which is not among the end tokens [0]"
    )
    monkeypatch.setattr(llama_probe, "load_file", lambda path: LoadedWeights("no memory"))
    found = examine(path)
    assert found.faults == [] and found.notes == [fault]


def test_what_is_no_fault_is_a_note(tmp_path: Path, loads: None) -> None:
    values = metadata() | {"general.type": "adapter"}
    del values["tokenizer.chat_template"]
    renamed = {key.replace("llama.", "other."): value for key, value in values.items()}
    found = examine(write(tmp_path / "model.gguf", renamed, tensors(), "other"))
    assert found.faults == []
    assert [note.partition(",")[0].partition(" is not")[0] for note in found.notes] == [
        "The architecture other",
        "general.type is 'adapter': the file is no model on its own.",
        "The file has no chat template: apps have to bring one",
    ]


def test_parts_of_a_model_are_looked_for(tmp_path: Path, loads: None) -> None:
    values = metadata() | {"split.count": 2, "split.no": 0, "split.tensors.count": 99}
    first = write(tmp_path / "tiny-00001-of-00002.gguf", values, tensors())
    (fault,) = examine(tmp_path).faults
    assert fault == "tiny-00002-of-00002.gguf: missing. Copy all files of the model."
    (tmp_path / "tiny-00002-of-00002.gguf").write_bytes(first.read_bytes())
    found = examine(tmp_path)
    assert (found.path, found.faults) == (first, [])
    assert found.notes == ["The model has 2 files, of which this one was examined."]
    first.rename(tmp_path / "alone.gguf")
    assert "llama.cpp finds the others by names such as" in examine(tmp_path / "alone.gguf").faults[0]


# --- files that are none ------------------------------------------------------------------------------------


def header(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "no GGUF file: it has 0 bytes"),
        (b"hello, world", "no GGUF file: it begins with b'hell', not with b'GGUF'"),
        (b"GGUF", "a damaged GGUF file of 4 bytes: it ends at byte 4, before byte 8"),
        (header(1), "it is of version 1, and llama.cpp reads versions 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
        (header(tensors=2**60), "it ends at byte 24"),
        (header(keys=2**60), "it ends at byte 24"),
        (header(keys=1) + struct.pack("<Q", 2**63), "it ends at byte 32"),
        (header(keys=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**60), "a list of 11529215"),
        (header(keys=1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77), "a value of type 77"),
        (header(keys=2) + (struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 0)) * 2, "the key a twice"),
        (header(tensors=1) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31), "the tensor t with 214"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_gguf_is_one_error(tmp_path: Path, content: bytes, wanted: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    result = run(tmp_path / "model.gguf")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert wanted in result.stderr and "Copy or download the file again." in result.stderr


def test_a_file_is_known_by_its_first_bytes(foreign: Path, loads: None) -> None:
    other = foreign.rename(foreign.with_suffix(".bin"))
    assert examine(other).format == "gguf"


def test_an_empty_model_has_faults_and_no_traceback(tmp_path: Path, loads: None) -> None:
    (tmp_path / "model.gguf").write_bytes(header())
    result = run(tmp_path)
    assert result.exit_code == 1 and "general.architecture is None, no name of a model's graph" in result.stdout


def test_several_files_in_a_folder_are_named(foreign: Path) -> None:
    (foreign.parent / "tiny-q8_0.gguf").write_bytes(foreign.read_bytes())
    with pytest.raises(
        ArtifactError, match=r"2 files that could be examined: tiny-q4_0.gguf, tiny-q8_0.gguf. Give one"
    ):
        examine(foreign.parent)


def test_the_result_as_json(foreign: Path, loads: None) -> None:
    found = json.loads(run(foreign, "--json").stdout)
    assert found["format"] == "gguf" and found["contents"]["types"][0] == {
        "name": "F16",
        "count": 1,
        "size_bytes": ROWS * WIDTH * 2,
    }
    assert found["contents"]["rope"] == {"llama.rope.freq_base": 5000.0}
    assert util.find_spec("xllamacpp") is not None and found["installed"]["xllamacpp"] != "none"
