"""doctor on ONNX graphs and folders, of ours and of other tools: where they load, and each kind of damage by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from conftest import export_frozen_llama, make_model, make_tokenizer
from qat_edge.cli import commands
from qat_edge.errors import ArtifactError, UsageError
from qat_edge.manifest import write_manifest
from qat_edge.options import DoctorOptions
from qat_edge.verbs import doctor
from qat_edge_exporters import file_diagnosis
from qat_edge_exporters.file_diagnosis import FileDiagnosis
from qat_edge_exporters.onnx import onnxruntime_probe
from qat_edge_exporters.onnx.onnxruntime_probe import Loaded
from qat_edge_exporters.targets import GENAI, ONNXRUNTIME

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH = 288, 8, 2, 4
ALL = DoctorOptions()


def examine(path: Path, *runtimes: str) -> FileDiagnosis:
    found = doctor.doctor(path, DoctorOptions(runtime=runtimes))
    assert isinstance(found, FileDiagnosis)
    return found


def run(*arguments: object) -> Any:
    return CliRunner().invoke(commands.main, ["doctor", *map(str, arguments)])


# --- files of other tools -----------------------------------------------------------------------------------


def value(name: str, kind: int, shape: Sequence[int | str]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def graph_of(nodes: list[Any], tensors: Sequence[Any] = (), opset: int = 20, domains: Sequence[str] = ()) -> Any:
    """A graph from x to y, float32 [1]."""
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])], list(tensors)
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    return model


def write(folder: Path, model: Any, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def decoder() -> Any:
    """A decoder of one layer in the names of optimum and onnxruntime-genai, which writes its cache only."""

    def sizes(length: str) -> list[int | str]:
        return ["batch", HEADS, length, HEAD_WIDTH]

    rng = np.random.default_rng(0)
    table = numpy_helper.from_array(rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32), "table")
    head = numpy_helper.from_array(rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32), "head")
    shape = numpy_helper.from_array(np.array([0, 0, HEADS, HEAD_WIDTH]), "shape")
    caches = [(f"past_key_values.0.{kind}", f"present.0.{kind}") for kind in ("key", "value")]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
            helper.make_node("Reshape", ["hidden", "shape"], ["heads"]),
            helper.make_node("Transpose", ["heads"], ["states"], perm=[0, 2, 1, 3]),
            *(helper.make_node("Concat", [past, "states"], [present], axis=2) for past, present in caches),
        ],
        "decoder",
        [
            value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            *(value(past, TensorProto.FLOAT, sizes("past")) for past, _ in caches),
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", "tokens", VOCABULARY]),
            *(value(present, TensorProto.FLOAT, sizes("total")) for _, present in caches),
        ],
        [table, head, shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="another tool")
    model.ir_version = 10
    return model


def genai_config(**changes: Any) -> dict[str, Any]:
    return {
        "model": {
            "bos_token_id": 1, "context_length": 64, "eos_token_id": 2, "pad_token_id": 2, "type": "llama",
            "vocab_size": VOCABULARY,
            "decoder": {
                "filename": "model.onnx", "head_size": HEAD_WIDTH, "hidden_size": WIDTH, "num_attention_heads": HEADS,
                "num_hidden_layers": 1, "num_key_value_heads": HEADS,
                "inputs": {
                    "input_ids": "input_ids", "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": 64, "past_present_share_buffer": False},
        **changes,
    }  # fmt: skip


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder for onnxruntime-genai that another tool wrote."""
    write(tmp_path, decoder())
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "genai_config.json").write_text(json.dumps(genai_config()))
    return tmp_path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runtimes that load everything; returns what they were given."""
    given: list[Path] = []

    def load(path: Path) -> Loaded:
        given.append(path)
        return Loaded("")

    monkeypatch.setattr(onnxruntime_probe, "load_graph", load)
    monkeypatch.setattr(onnxruntime_probe, "run_folder", load)
    return given


# --- runtimes, for real -------------------------------------------------------------------------------------


def test_our_own_export_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_frozen_llama("onnx", tmp_path, 32)

    found = examine(folder)
    assert [(check.runtime, check.loads, check.tried) for check in found.runtimes] == [
        (ONNXRUNTIME, True, True),
        (GENAI, True, True),
    ]
    assert (found.faults, found.notes) == ([], [])
    doctor.require_loadable(found, DoctorOptions(runtime=(ONNXRUNTIME, GENAI)))
    assert [(each.bits, each.accuracy_level, each.count) for each in found.contents.matrices] == [(4, 4, 7), (8, 4, 1)]
    assert (found.contents.context_length, found.contents.end_tokens) == (32, [2])
    assert sum(found.contents.size_bytes.values()) == sum(
        (folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")
    )

    write_manifest(folder, "export", options={"context_length": 64, "kv_cache": "float32"})
    monkeypatch.setattr(onnxruntime_probe, "load_graph", lambda path: Loaded(""))
    faults = examine(folder, ONNXRUNTIME).faults
    assert faults[0].startswith(
        "manifest.json: 'options.context_length' is 64, but model.context_length of genai_config"
    )


def test_a_folder_of_the_builder_with_float_inputs_loads_with_a_note(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", "model", "-o", "built", "-p", "int4"]
    options = ["-e", "cpu", "-c", "cache", "--extra_options", "accuracy_level=1"]
    subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True)
    result = run(tmp_path / "built")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].endswith("model.onnx loads in onnxruntime, onnxruntime-genai.")
    assert [line for line in lines if line.startswith("note") and "accuracy_level 1: inputs stay in float" in line]
    assert not [line for line in lines if line.startswith("fault")]
    assert [line for line in lines if line.startswith("text       context of 512 tokens; generation ends with 2")]


def test_a_graph_of_torch_needs_no_tokenizer(tmp_path: Path) -> None:
    torch.onnx.export(
        torch.nn.Linear(4, 2).eval(), (torch.ones(1, 4),), tmp_path / "linear.onnx", dynamo=True, verbose=False
    )
    found = examine(tmp_path)
    assert found.path == tmp_path / "linear.onnx"
    assert [(check.runtime, check.loads) for check in found.runtimes] == [(ONNXRUNTIME, True)]
    assert (found.faults, found.notes, found.tokenizer) == ([], [], None)
    assert found.contents.producer.startswith("pytorch")
    named = run(tmp_path, "--runtime", GENAI)
    assert named.exit_code == 1
    assert "was not tried in onnxruntime-genai" in named.stdout
    assert "onnxruntime-genai cannot load it: not tried: there is no genai_config.json that names" in named.stderr


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (
            lambda: graph_of([helper.make_node("Foo", ["x"], ["y"], domain="my.domain")], domains=["my.domain"]),
            "it lacks my.domain::Foo",
        ),
        (lambda: graph_of([helper.make_node("Fourier", ["x"], ["y"])]), "it lacks Fourier"),
        (
            lambda: graph_of([helper.make_node("Add", ["x", "y"], ["a"]), helper.make_node("Abs", ["a"], ["y"])]),
            "This is an invalid model. Error: the graph is not acyclic",
        ),
        (lambda: graph_of([helper.make_node("Abs", ["nowhere"], ["y"])]), "Invalid model. Node input 'nowhere'"),
    ],
    ids=["domain", "operator", "cycle", "value"],
)
def test_why_onnxruntime_refuses_a_graph_is_named(tmp_path: Path, model: Callable[[], Any], wanted: str) -> None:
    result = run(write(tmp_path, model()))
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "model.onnx loads in no requested runtime." in result.stdout
    assert f"onnxruntime cannot load it: {wanted}" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({"ir_version": 99}, "IR version 99 is newer than the 1"), ({}, "opset 99 is newer than the 2")],
)
def test_versions_that_onnxruntime_does_not_read_are_named(
    tmp_path: Path, changes: dict[str, int], wanted: str
) -> None:
    model = graph_of([helper.make_node("Abs", ["x"], ["y"])], opset=20 if changes else 99)
    model.ir_version = changes.get("ir_version", 10)
    (check,) = examine(write(tmp_path, model)).runtimes
    assert check.reason.startswith(wanted) and "install a newer onnxruntime" in check.reason


def test_a_configuration_that_the_graph_does_not_meet_is_seen_in_a_run(foreign: Path) -> None:
    """onnxruntime-genai loads such a folder; that a cache is missing shows when a token is generated."""
    (check,) = examine(foreign, GENAI).runtimes
    assert check.loads, check.reason
    model = decoder()
    del model.graph.output[1:]
    write(foreign, model)
    (check,) = examine(foreign, GENAI).runtimes
    assert not check.loads and "present.0.key" in check.error


def test_a_folder_that_onnxruntime_genai_cannot_load_is_an_error(
    foreign: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor.require_loadable(examine(foreign), ALL)
    monkeypatch.setattr(onnxruntime_probe, "run_folder", lambda path: Loaded("no such operator"))
    found = examine(foreign)
    with pytest.raises(ArtifactError, match="problems found: 1\n  onnxruntime-genai cannot load it: no such operator"):
        doctor.require_loadable(found, ALL)
    doctor.require_loadable(examine(foreign, ONNXRUNTIME), DoctorOptions(runtime=(ONNXRUNTIME,)))


def test_a_crash_of_a_runtime_is_a_result(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, sys; print('half', end=''); sys.stderr.write('native trouble'); sys.stderr.flush(); os.abort()"
    monkeypatch.setattr(file_diagnosis, "utf8_command", lambda *given: [sys.executable, "-c", crash])
    found = examine(foreign)
    assert [check.error for check in found.runtimes] == ["it ended the process (-6): native trouble"] * 2
    with pytest.raises(ArtifactError, match="problems found: 2"):
        doctor.require_loadable(found, ALL)
    # A process that ends early without an error has not loaded the graph either.
    monkeypatch.setattr(file_diagnosis, "utf8_command", lambda *given: [sys.executable, "-c", ""])
    assert {check.error for check in examine(foreign).runtimes} == {"it ended the process (0)"}


def test_a_runtime_that_does_not_end_is_a_result(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(file_diagnosis, "utf8_command", lambda *given: command)
    monkeypatch.setattr(file_diagnosis, "LOADING_S", 0.2)
    assert examine(foreign, GENAI).runtimes[0].error == "it did not load within 0.2 s"


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number", "wanted"),
    [
        (TensorProto.FLOAT, np.nan, "1 number of the tensor 'table' is no number (NaN)"),
        (TensorProto.FLOAT16, np.inf, "1 number of the tensor 'table' is infinite"),
        (TensorProto.BFLOAT16, np.nan, "1 number of the tensor 'table' is no number (NaN)"),
        (TensorProto.BFLOAT16, -np.inf, "1 number of the tensor 'table' is infinite"),
        (TensorProto.DOUBLE, np.inf, "1 number of the tensor 'table' is infinite"),
        (TensorProto.BFLOAT16, 1.0, ""),
        (TensorProto.DOUBLE, 1e300, ""),
    ],
)
@pytest.mark.parametrize("where", ["in the graph", "in a data file"])
def test_numbers_that_are_not_finite_are_faults(
    foreign: Path, loads: list[Path], kind: int, number: float, wanted: str, where: str
) -> None:
    model = decoder()
    values = np.zeros((VOCABULARY, WIDTH))
    values[5, 3] = number
    table = helper.make_tensor("table", kind, values.shape, values.ravel())
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table), "table"))
    raw = model.graph.initializer[0].raw_data
    if where == "in a data file":
        stored(model, "weights.bin", offset=4096, length=len(raw))
        (foreign / "weights.bin").write_bytes(bytes(4096) + raw)
    write(foreign, model)
    faults = examine(foreign).faults
    advice = "Convert it again with the tool that wrote it, or copy the file again."
    assert faults == ([f"model.onnx: {wanted}. {advice}"] if wanted else [])
    # Only a folder of our own can be exported again.
    (foreign / "manifest.json").write_text("{}")
    assert [fault for fault in examine(foreign).faults if "Export again, or copy the file" in fault] == (
        [f"model.onnx: {wanted}. Export again, or copy the file again."] if wanted else []
    )


def test_a_garbled_adapter_of_another_tool_has_advice_for_its_users(foreign: Path, loads: list[Path]) -> None:
    (foreign / "other.onnx_adapter").write_bytes(b"no adapter")
    (fault,) = examine(foreign).faults
    assert "Convert it again with the tool that wrote it, or copy the file again" in fault


@pytest.mark.parametrize(
    ("operator", "dtype", "is_fault"),
    [
        ("MatMul", np.float32, True),
        ("Add", np.float32, False),
        ("Gather", np.float32, False),
        ("MatMul", np.float64, False),
    ],
)
def test_numbers_whose_products_overflow_are_faults(
    foreign: Path, loads: list[Path], operator: str, dtype: type, is_fault: bool
) -> None:
    model = decoder()
    values = np.ones((4, 4), dtype)
    values[1, 2] = -3e38
    model.graph.initializer.append(numpy_helper.from_array(values, "scales"))
    model.graph.node.append(helper.make_node(operator, ["scales", "scales"], ["unused"]))
    write(foreign, model)
    expected = "model.onnx: 1 number of the tensor 'scales' is above 1e+32: products overflow float32."
    assert [fault.startswith(expected) for fault in examine(foreign).faults] == [True] * is_fault


def test_a_grammar_without_its_schema_is_named(foreign: Path, loads: list[Path]) -> None:
    (foreign / "grammar.lark").write_text('start: "a"\n')
    found = examine(foreign)
    assert found.faults == [] and [note for note in found.notes if note.startswith("grammar.lark: there is no schema")]


def test_infinite_numbers_of_a_mask_are_right(foreign: Path, loads: list[Path]) -> None:
    model = decoder()
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    model.graph.node.append(helper.make_node("Add", ["mask", "mask"], ["unused"]))
    write(foreign, model)
    assert examine(foreign).faults == []


# --- data files ---------------------------------------------------------------------------------------------


def stored(model: Any, location: str, **entries: object) -> Any:
    """The model with its first tensor in a data file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    return model


SIZE = VOCABULARY * WIDTH * 4


def test_a_data_file_that_holds_its_tensors_is_right(foreign: Path, loads: list[Path]) -> None:
    write(foreign, stored(decoder(), "weights.bin", offset=64, length=SIZE))
    (foreign / "weights.bin").write_bytes(bytes(64 + SIZE))
    found = examine(foreign)
    assert found.faults == [] and len(loads) == 2
    assert found.contents.size_bytes["weights.bin"] == 64 + SIZE
    (foreign / "weights.bin").write_bytes(bytes(63 + SIZE))
    (fault,) = examine(foreign).faults
    assert fault.startswith(
        f"weights.bin: the tensor 'table' should be at bytes 64 to {64 + SIZE}, but the file has {63 + SIZE}"
    )


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../weights.bin", "a/../../b", "C:\\weights.bin", "\\\\host\\x", ""]
)
def test_a_data_file_outside_of_the_folder_is_never_loaded(foreign: Path, loads: list[Path], location: str) -> None:
    write(foreign, stored(decoder(), location))
    found = examine(foreign)
    assert loads == [] and {check.untried for check in found.runtimes} == {
        "not tried, because the graph names files outside of its folder"
    }
    (fault,) = found.faults
    assert f"the tensor 'table' is in {location!r}, which is not a file inside the folder" in fault
    assert run(foreign).exit_code == 1


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ({}, "weights.bin: missing, and 1 tensor of the graph should be in it. Copy it with the graph"),
        ({"offset": "-1"}, "has the offset '-1', which is no number of bytes"),
        ({"offset": "1" * 30}, "which is no number of bytes"),
        ({"length": 5}, f"has 5 bytes, and its shape [288, 8] needs {SIZE}"),
    ],
)  # fmt: skip
def test_a_garbled_description_of_a_tensor_is_named(
    foreign: Path, loads: list[Path], entries: dict[str, Any], wanted: str
) -> None:
    write(foreign, stored(decoder(), "weights.bin", **entries))
    (fault,) = examine(foreign).faults
    assert wanted in fault


def test_huge_and_negative_shapes_are_faults(foreign: Path, loads: list[Path]) -> None:
    for sizes, wanted in (([2**62, 2**62], f"should be at bytes 0 to {2**126}"), ([-1, 8], "which no tensor has")):
        model = stored(decoder(), "weights.bin")
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(sizes)
        write(foreign, model)
        (foreign / "weights.bin").write_bytes(b"")
        assert wanted in examine(foreign).faults[0]


# --- genai_config.json --------------------------------------------------------------------------------------


def edit(folder: Path, path: str, new: Any) -> None:
    """Set a value of genai_config.json, or remove it for None."""
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    *outer, key = path.split(".")
    found = config
    for name in outer:
        found = found[name]
    if new is None:
        del found[key]
    else:
        found[key] = new
    file.write_text(json.dumps(config))


def test_a_foreign_folder_has_neither_faults_nor_notes(foreign: Path, loads: list[Path]) -> None:
    found = examine(foreign)
    assert (found.faults, found.notes) == ([], [])
    assert loads == [foreign / "model.onnx", foreign]


@pytest.mark.parametrize(
    ("key", "new", "wanted"),
    [
        ("model.decoder.inputs.input_ids", "tokens", "names 'tokens', and model.onnx has no such input"),
        ("model.decoder.inputs.past_key_names", "k_%d", "decoder.inputs.past_key_names names 'k_%d'"),
        ("model.decoder.outputs.logits", "scores", "outputs.logits names 'scores', and model.onnx has no such output"),
        ("model.decoder.outputs.present_value_names", "v.%d", "decoder.outputs.present_value_names names 'v.%d'"),
        (
            "model.decoder.outputs",
            {"logits": "logits", "present_key_names": "present.%d.value", "present_value_names": "present.%d.key"},
            "'present.0.value' back as 'past_key_values.0.key', and model.onnx writes that cache to 'present.0.key'",
        ),
        ("model.decoder.head_size", 5, "decoder.head_size is 5, and model.onnx has the input past_key_values.0.key"),
        ("model.context_length", None, "model.context_length is missing"),
        ("model.eos_token_id", None, "eos_token_id is None, so that a generation would never end"),
        ("model.eos_token_id", [2, VOCABULARY], "the end token 288 is none of the 288 tokens of model.onnx"),
        ("model.eos_token_id", 0, "The chat template ends answers with '<|im_end|>' (2), which is not among"),
        ("model.vocab_size", 300, "model.vocab_size is 300, and model.onnx has logits of 288 tokens"),
    ],
)  # fmt: skip
def test_a_configuration_that_contradicts_the_graph_is_a_fault(
    foreign: Path, loads: list[Path], key: str, new: Any, wanted: str
) -> None:
    edit(foreign, key, new)
    faults = examine(foreign).faults
    assert [fault for fault in faults if wanted in fault], faults


@pytest.mark.parametrize(
    ("key", "new", "wanted"),
    [
        ("model.decoder.num_hidden_layers", 3, "num_hidden_layers is 3, and model.onnx has a cache for 1 layer"),
        ("model.decoder.num_key_value_heads", 1, "decoder.num_key_value_heads is 1, and model.onnx has the input"),
        ("search.max_length", 65, "search.max_length 65 is more than model.context_length 64"),
        ("search.do_sample", True, "search.do_sample is on"),
    ],
)  # fmt: skip
def test_what_onnxruntime_genai_does_not_mind_is_a_note(
    foreign: Path, loads: list[Path], key: str, new: Any, wanted: str
) -> None:
    edit(foreign, key, new)
    found = examine(foreign)
    assert found.faults == [] and [note for note in found.notes if wanted in note], found.notes


@pytest.mark.parametrize(
    ("operator", "domain", "first"),
    [("GroupQueryAttention", "com.microsoft", 7), ("RotaryEmbedding", "com.microsoft", 2), ("RotaryEmbedding", "", 1)],
)  # fmt: skip
def test_rotary_tables_that_are_shorter_than_the_context_are_a_fault(
    foreign: Path, loads: list[Path], operator: str, domain: str, first: int
) -> None:
    model = decoder()
    table = numpy_helper.from_array(np.zeros((63, 2), np.float32), "cosines")
    model.graph.initializer.append(table)
    inputs = ["hidden", *[""] * (first - 1), "cosines"]
    model.graph.node.append(helper.make_node(operator, inputs, ["unused"], domain=domain))
    write(foreign, model)
    (fault,) = examine(foreign).faults
    assert "model.context_length is 64, and the rotary tables of model.onnx have 63 rows" in fault


@pytest.mark.parametrize(
    ("key", "new"),
    [
        ("model.decoder.session_options", {"custom_ops_library": "evil.so"}),
        ("model.decoder.session_options", {"provider_options": [{"QNN": {"backend_path": "evil.so"}}]}),
        ("model.decoder.session_options", {"enable_profiling": "/root/.bashrc"}),
        ("model.vision", {"filename": "vision.onnx"}),
    ],
)  # fmt: skip
def test_a_configuration_that_loads_other_code_is_not_run(foreign: Path, loads: list[Path], key: str, new: Any) -> None:
    edit(foreign, key, new)
    result = run(foreign)
    assert result.exit_code == 0, result.output
    assert "loads in onnxruntime; was not tried in onnxruntime-genai." in result.stdout
    assert "not tried, because it may load other code or files: " in result.stdout
    assert loads == [foreign / "model.onnx"]
    assert run(foreign, "--runtime", GENAI).exit_code == 1


def test_a_decoder_of_another_name_is_run(foreign: Path, loads: list[Path]) -> None:
    (foreign / "model.onnx").rename(foreign / "decoder.q4.onnx")
    edit(foreign, "model.decoder.filename", "decoder.q4.onnx")
    found = examine(foreign)
    assert found.path.name == "decoder.q4.onnx" and len(loads) == 2 and found.faults == []


def test_a_graph_that_runs_other_code_is_not_loaded(tmp_path: Path, loads: list[Path]) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/tmp/evil.so")
    (check,) = examine(write(tmp_path, graph_of([node], domains=["com.microsoft"]))).runtimes
    assert check.untried == "not tried, because the operator EPContext runs other code" and loads == []


# --- tokenizer ----------------------------------------------------------------------------------------------


def test_missing_and_broken_tokenizers_are_faults(foreign: Path, loads: list[Path]) -> None:
    (foreign / "tokenizer.json").write_text("{}")
    (fault,) = examine(foreign).faults
    assert "the tokenizer cannot be loaded" in fault and "Copy the tokenizer's files from the model again" in fault
    (foreign / "tokenizer.json").unlink()
    (fault,) = examine(foreign).faults
    assert fault == "tokenizer.json: missing, so that onnxruntime-genai cannot read a prompt. Copy it from the model."
    (foreign / "genai_config.json").unlink()
    (foreign / "tokenizer_config.json").unlink()
    found = examine(foreign)
    assert found.faults == [] and [note for note in found.notes if "There is no tokenizer next to model.onnx" in note]


def test_a_tokenizer_with_more_tokens_than_the_logits_is_a_fault(foreign: Path, loads: list[Path]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(VOCABULARY)])
    tokenizer.save_pretrained(foreign)
    (fault,) = examine(foreign).faults
    assert "the token 554, and model.onnx has embeddings or logits of 288 tokens: it belongs to another model" in fault
    model = decoder()
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "vocabulary"
    write(foreign, model)
    assert examine(foreign).faults == [fault]


def test_a_decoder_without_a_configuration_ends_as_its_checkpoint_says(foreign: Path, loads: list[Path]) -> None:
    """The layout of optimum: config.json and generation_config.json next to the graph."""
    (foreign / "genai_config.json").unlink()
    assert examine(foreign).faults == []
    settings = json.loads((foreign / "tokenizer_config.json").read_text())
    (foreign / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    (fault,) = examine(foreign).faults
    assert "which is not among the end tokens [0]: generation would not stop there" in fault
    (foreign / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    assert examine(foreign).faults == []


def test_a_tokenizer_without_a_chat_template_is_a_note(foreign: Path, loads: list[Path]) -> None:
    (foreign / "chat_template.jinja").unlink()
    assert examine(foreign).notes == ["The tokenizer has no chat template."]


# --- slow graphs --------------------------------------------------------------------------------------------


def test_matrices_that_are_slow_are_notes(tmp_path: Path, loads: list[Path]) -> None:
    codes = numpy_helper.from_array(np.zeros((4, 1, 32), np.uint8), "codes")
    scales = numpy_helper.from_array(np.ones((4, 1), np.float32), "scales")
    sizes = {"K": 32, "N": 4, "bits": 8, "block_size": 32}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **sizes),
        helper.make_node(
            "MatMulNBits", ["x", "codes", "scales"], ["z"], domain="com.microsoft", accuracy_level=4, **sizes
        ),
        helper.make_node("DequantizeLinear", ["int4", "scales"], ["floats"]),
    ]
    int4 = helper.make_tensor("int4", TensorProto.INT4, [4, 1], b"\0\0", raw=True)
    found = examine(write(tmp_path, graph_of(nodes, [codes, scales, int4], domains=["com.microsoft"])))
    assert found.faults == [] and len(found.notes) == 2
    assert found.notes[0].startswith("1 MatMulNBits node of 8 bits with accuracy_level 0: inputs stay in float, and")
    assert "about 70 times as long" in found.notes[0]
    assert found.notes[1].startswith("1 matrix in int4 is read by DequantizeLinear")


def test_a_decoder_without_a_cache_is_a_note(tmp_path: Path, loads: list[Path]) -> None:
    model = decoder()
    del model.graph.input[1:], model.graph.output[1:], model.graph.node[2:]
    found = examine(write(tmp_path, model))
    assert found.notes[0] == "The graph has no inputs for a KV cache: every token computes the whole text again."


# --- files that are no graph, and folders -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "no ONNX graph: 0 bytes without a node"),
        (b"hello, this is no graph", "no readable ONNX graph of 23 bytes"),
        (b"\xff" * 100, "no readable ONNX graph"),
        (None, "no readable ONNX graph"),  # the first half of one
    ],
)  # fmt: skip
def test_a_file_that_is_no_graph_is_one_error(tmp_path: Path, content: bytes | None, wanted: str) -> None:
    path = write(tmp_path, decoder())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    result = run(path)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert wanted in result.stderr and "Copy or download the file again." in result.stderr


def test_things_that_are_no_file_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    for name, wanted in (
        ("folder.onnx", "no .pte, .onnx or .gguf file in it"),
        ("pipe.onnx", "not a file, but a folder"),
        ("gone.onnx", "no such file"),
        ("model.txt", "no such file"),
    ):
        result = run(tmp_path / name)
        assert result.exit_code == 1 and wanted in result.stderr, result.output


def test_a_file_that_may_not_be_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, decoder())

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ArtifactError, match=r"cannot be read \(Permission denied\). Check its permissions"):
        examine(path)


def test_names_that_are_not_utf8_are_shown(tmp_path: Path, loads: list[Path]) -> None:
    data = graph_of([helper.make_node("Abs", ["x"], ["y"])]).SerializeToString().replace(b"Abs", b"A\xffs")
    (tmp_path / "model.onnx").write_bytes(data)
    assert list(examine(tmp_path).contents.operators) == [repr(b"A\xffs")]


def test_a_folder_with_several_files_names_them(foreign: Path, tmp_path: Path) -> None:
    config = foreign / "genai_config.json"
    shutil.copyfile(foreign / "model.onnx", foreign / "model_fp16.onnx")
    assert [
        note
        for note in examine(foreign, ONNXRUNTIME).notes
        if "1 other graph in the folder, such as model_fp16" in note
    ]
    (foreign / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match=r"genai_config.json, and model.gguf as well. Give the file"):
        examine(foreign)
    config.unlink()
    with pytest.raises(ArtifactError, match=r"3 files .*: model.gguf, model.onnx, model_fp16.onnx. Give one of them"):
        examine(foreign)


@pytest.mark.parametrize(
    ("filename", "wanted"),
    [
        ("other.onnx", r"names other.onnx, which is not there.*graphs in the folder: model.onnx"),
        ("../model.onnx", r"filename is '../model.onnx', no name of a graph next to it.*model.onnx"),
        (7, "filename is 7, no name"),
    ],
)  # fmt: skip
def test_a_configuration_that_names_no_graph_is_an_error(foreign: Path, filename: object, wanted: str) -> None:
    edit(foreign, "model.decoder.filename", filename)
    with pytest.raises(ArtifactError, match=wanted):
        examine(foreign)
    (foreign / "genai_config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"genai_config.json: expected a JSON object"):
        examine(foreign)


def test_folders_of_other_kinds_name_the_command_for_them(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no .pte, .onnx or .gguf file in it. Found: nothing"):
        examine(tmp_path)
    (tmp_path / "onnx").mkdir()
    write(tmp_path / "onnx", decoder())
    with pytest.raises(ArtifactError, match=r"Give the folder below it: `qat-edge doctor .*/onnx`"):
        examine(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ArtifactError, match=r"model folder of Hugging Face, which doctor does not examine: `qat-edge ver"
    ):
        examine(tmp_path)
    (tmp_path / "exports" / "onnx").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"It is a run: give a folder of its exports \(exports.onnx\)"):
        examine(tmp_path)


def test_a_runtime_of_another_format_is_refused_by_name(foreign: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--runtime android-app loads ExecuTorch, and the file is ONNX. Its runtimes: onn"
    ):
        examine(foreign, "android-app")
    assert run(foreign, "--runtime", "llama.cpp").exit_code == 2


def test_the_result_as_json(foreign: Path, loads: list[Path]) -> None:
    found = json.loads(run(foreign, "--json").stdout)
    assert found["format"] == "onnx" and found["path"] == str(foreign / "model.onnx")
    assert [check["runtime"] for check in found["runtimes"]] == [ONNXRUNTIME, GENAI]
    assert found["contents"]["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "tokens"]}
    assert found["tokenizer"] == {"size": 267, "has_chat_template": True}
