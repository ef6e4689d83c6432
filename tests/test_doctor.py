"""doctor: the runtimes that load a .pte, missing parts of the LLM runner's contract, and files that are no .pte."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import executorch.kernels.portable
import executorch.kernels.quantized
import pytest
import torch
import yaml
from click.testing import CliRunner
from packaging.version import Version
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import make_tokenizer
from qat_edge.cli import commands
from qat_edge.errors import ArtifactError, RunError, UsageError
from qat_edge.manifest import library_version, write_manifest
from qat_edge.options import RUNTIMES, DoctorOptions, ExportOptions
from qat_edge.quant import frozen, scheme
from qat_edge.run import Run, Variant
from qat_edge.verbs import doctor
from qat_edge.verbs import export as exporting
from qat_edge_exporters import targets
from qat_edge_exporters.executorch import known_runtimes, runner_tokenizer, runtime_probe
from qat_edge_exporters.executorch.export_pte import export
from qat_edge_exporters.executorch.pte import runner_contract
from qat_edge_exporters.executorch.pte.delegates import open_pte
from qat_edge_exporters.executorch.pte.program_info import MethodInfo, ProgramInfo, TensorInfo
from qat_edge_exporters.executorch.runtime_probe import Probed

CONTEXT, VOCABULARY, WIDTH = 32, 288, 64
CUSTOM = ["llama::custom_sdpa.out", "llama::update_cache.out", "quantized_decomposed::embedding_byte.out"]
ALL = DoctorOptions()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export folders of one tiny model, with ExecuTorch's LLM operators and without."""
    root = tmp_path_factory.mktemp("doctor")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    chosen = scheme.choose_scheme(model, 32)
    frozen.freeze(model, chosen)
    model.save_pretrained(root / "frozen")
    make_tokenizer().save_pretrained(root / "frozen")
    write_manifest(root / "frozen", "quantized", scheme=frozen.scheme_metadata(chosen))
    folders = {"custom": root / "custom", "portable": root / "portable"}
    for name, folder in folders.items():
        folder.mkdir()
        export(root / "frozen", folder, CONTEXT, portable=name == "portable")
        write_manifest(folder, "export")
    return folders


@pytest.fixture(scope="module")
def probed(made: dict[str, Path]) -> dict[str, Probed]:
    """Load both in the installed runtime, once for all tests."""
    found = {}
    for name, folder in made.items():
        tokenizer = folder / runner_tokenizer.TOKENIZER
        found[name] = runtime_probe.probe(folder / "model.pte", tokenizer, runner_tokenizer.probe_texts(tokenizer))
    return found


@pytest.fixture
def folder(made: dict[str, Path], probed: dict[str, Probed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the program with custom operators, to be damaged; the runtime reports on the original."""
    shutil.copytree(made["custom"], tmp_path / "copy")
    monkeypatch.setattr(runtime_probe, "probe", lambda *given: probed["custom"])
    return tmp_path / "copy"


def faults(path: Path) -> list[str]:
    return doctor.doctor(path, ALL).faults


def test_the_installed_runtime_loads_both(probed: dict[str, Probed]) -> None:
    for found in probed.values():
        assert found["error"] == "" and found["tokenizer"] is not None and found["tokenizer"]["error"] == ""
        assert {"llama::custom_sdpa.out", "aten::index_put_"} <= set(found["operators"])
        assert "XnnpackBackend" in found["backends"]


def test_custom_operators_load_everywhere_except_in_the_minimal_runtime(folder: Path) -> None:
    found = doctor.doctor(folder, ALL)
    assert [check.runtime for check in found.runtimes if check.loads] == list(RUNTIMES[:-1])
    assert found.runtimes[-1].missing_operators == CUSTOM
    assert found.faults == [] and found.path == folder / "model.pte"
    first = doctor.lines(found)[0]
    assert first.endswith("loads in python-wheel, android-app, android-vulkan-app, ios-app; not in minimal.")
    doctor.require_loadable(found, ALL)
    named = DoctorOptions(runtime=("minimal",))
    with pytest.raises(ArtifactError, match=r"minimal cannot load it: it lacks llama.*--portable"):
        doctor.require_loadable(doctor.doctor(folder, named), named)


def test_a_portable_program_loads_everywhere(
    made: dict[str, Path], probed: dict[str, Probed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_probe, "probe", lambda *given: probed["portable"])
    named = DoctorOptions(runtime=RUNTIMES)
    found = doctor.doctor(made["portable"] / "model.pte", named)
    doctor.require_loadable(found, named)
    assert not [name for name in found.program.operators if not name.startswith("aten::")]
    assert found.program.constants["use_sdpa_with_kv_cache"] is False


def test_contents_of_the_file(folder: Path) -> None:
    found = doctor.doctor(folder, ALL)
    program = found.program
    assert str(program.forward) == f"forward(int64 [1, <={CONTEXT}], int64 [1]) -> float32 [1, 1, {VOCABULARY}]"
    sizes = program.size_bytes
    assert sum(sizes.values()) == (folder / "model.pte").stat().st_size
    assert (sizes["embedding"], sizes["head"]) == (VOCABULARY * (WIDTH + 4), 0)  # int8, a float32 scale a row
    assert [line for line in doctor.lines(found) if line.endswith("in total; embedding and head share 19.6 kB")]
    linears = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * WIDTH
    assert (sizes["linears"], sizes["scales"]) == (linears // 2, linears // 32 * 2)
    assert program.operators["llama::update_cache.out"] == 2
    assert program.memory_bytes >= 2 * CONTEXT * (WIDTH // 2) * 4


def test_options_that_only_the_manifest_has_are_faults(folder: Path) -> None:
    write_manifest(folder, "export", options={"context_length": CONTEXT, "kv_cache": "float32", "portable": False})
    assert faults(folder) == []
    write_manifest(folder, "export", options={"context_length": 2 * CONTEXT, "kv_cache": "int8", "portable": True})
    assert [fault.partition(",")[0] for fault in faults(folder)] == [
        *["manifest.json: 'options.context_length' is 64"] * 3,
        "manifest.json: 'options.kv_cache' is 'int8'",
        "manifest.json: 'options.portable' is True",
    ]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("get_max_seq_len", "get_max_seq_len: missing: the runner refuses"),
        ("enable_dynamic_shape", "enable_dynamic_shape: missing: prompts are computed token by token"),
        ("get_eos_ids", "get_eos_ids: missing"),
        ("forward", "There is no method forward"),
    ],
)
def test_a_missing_method_is_named(folder: Path, name: str, wanted: str) -> None:
    other = name[:-1] + "_"
    data = (folder / "model.pte").read_bytes()
    (folder / "model.pte").write_bytes(data.replace(b"\0" + name.encode() + b"\0", b"\0" + other.encode() + b"\0"))
    assert [fault for fault in faults(folder) if fault.startswith(wanted)]


def program(**constants: Any) -> ProgramInfo:
    """Return a language model for 8 tokens of a vocabulary of 10."""
    tokens, start = TensorInfo("int64", (1, 8), True), TensorInfo("int64", (1,))
    logits = TensorInfo("float32", (1, 1, 10))
    valid = {
        "get_max_seq_len": 8, "get_max_context_len": 8, "enable_dynamic_shape": True, "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True, "get_eos_ids": [1, 2], "get_vocab_size": 10, "get_bos_id": 0,
    }  # fmt: skip
    method = MethodInfo("forward", (tokens, start), (logits,))
    return ProgramInfo([method], valid | constants, {}, {"XnnpackBackend": 1}, 1, {"program": 1}, 0)


def problems(program: ProgramInfo) -> list[str]:
    return [entry.name for entry in runner_contract.entries(program) if entry.problem]


@pytest.mark.parametrize(
    "constants",
    [
        {"get_max_seq_len": 9}, {"get_max_seq_len": 0}, {"get_max_context_len": 7}, {"use_kv_cache": False},
        {"get_eos_ids": []}, {"get_eos_ids": [10]}, {"get_eos_ids": 2}, {"get_vocab_size": 11}, {"get_bos_id": -1},
        {"get_bos_id": [1]}, {"enable_dynamic_shape": "yes"},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_values_are_problems(constants: dict[str, Any]) -> None:
    assert problems(program()) == []
    assert set(constants) <= set(problems(program(**constants)))


def test_inputs_that_the_runner_does_not_pass() -> None:
    whole = program()
    assert runner_contract.forward_problems(whole) == []
    assert whole.forward is not None
    static = replace(whole.forward, inputs=(TensorInfo("int64", (1, 8)), whole.forward.inputs[1]))
    assert problems(replace(whole, methods=[static])) == ["enable_dynamic_shape"]
    one = replace(whole.forward, inputs=whole.forward.inputs[:1])
    assert problems(replace(whole, methods=[one])) == ["use_kv_cache"]
    assert "two int64 inputs" in runner_contract.forward_problems(replace(whole, methods=[one]))[0]
    image = MethodInfo("forward", (TensorInfo("float32", (1, 3, 8, 8)),), (TensorInfo("float32", (1, 10)),))
    assert not replace(whole, methods=[image], constants={}).is_language_model


def test_a_backend_that_an_app_lacks_is_named() -> None:
    other = replace(program(), delegates={"CoreMLBackend": 3})
    checks = known_runtimes.check_runtimes(other, ("android-app", "ios-app"), None)
    assert [(check.loads, check.missing_backends) for check in checks] == [(False, ["CoreMLBackend"]), (True, [])]
    assert checks[0].reason == "it lacks backend CoreMLBackend"


def test_operator_lists_are_those_of_the_installed_version() -> None:
    table = tomllib.loads(known_runtimes.TABLE.read_text(encoding="utf-8"))
    assert set(table["runtimes"]) | {known_runtimes.WHEEL} == set(RUNTIMES)
    assert Version(table["version"]) <= Version(library_version("executorch"))
    files = {
        "portable": Path(executorch.kernels.portable.__path__[0]) / "functions.yaml",
        "quantized": Path(executorch.kernels.quantized.__path__[0]) / "quantized.yaml",
    }
    for library, file in files.items():
        listed = [entry.get("op") or entry["func"].partition("(")[0] for entry in yaml.safe_load(file.read_text())]
        full = {name if "::" in name else f"aten::{name}" for name in listed}
        assert set(table["libraries"][library]["operators"]) == full


def test_a_missing_tokenizer_is_a_fault(
    folder: Path, probed: dict[str, Probed], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(runtime_probe, "probe", lambda *given: {**probed["custom"], "tokenizer": None})
    assert [fault for fault in faults(folder) if "tokenizer.json is not next to the program" in fault]


def test_an_end_token_that_the_program_lacks_is_a_fault(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert "get_eos_ids is [2], and the model also ends with [7]: generation would not stop there." in faults(folder)


def test_a_tokenizer_that_splits_differently_is_a_fault(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (fault,) = [fault for fault in faults(folder) if "splits" in fault]
    assert "splits 'Set an alarm for seven.' and " in fault and "the first difference at token" in fault
    assert "--target onnx" in fault and "settings" not in fault


@pytest.mark.parametrize("setting", runner_tokenizer.IGNORED_SETTINGS)
def test_settings_of_tokens_that_executorch_ignores_are_named(
    made: dict[str, Path], tmp_path: Path, setting: str
) -> None:
    """Its library is run for real, so a version that reads them will fail here."""
    folder = tmp_path / "copy"
    shutil.copytree(made["custom"], folder)
    assert runner_tokenizer.tokenizer_faults(folder) == []
    path = folder / runner_tokenizer.TOKENIZER
    document = json.loads(path.read_text())
    (token,) = [token for token in document["added_tokens"] if token["content"] == "<|im_end|>"]
    token[setting] = True
    path.write_text(json.dumps(document))
    (fault,) = runner_tokenizer.tokenizer_faults(folder)
    assert f"It ignores the settings {setting} of the token '<|im_end|>'. Set them to false in the base" in fault
    assert "train again. The runtime of `qat-edge export --target onnx`" in fault


@pytest.mark.usefixtures("stand_in_exports")
def test_export_warns_of_prompts_that_apps_read_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    variant = Variant(tmp_path)
    variant.quantized.mkdir()
    (variant.quantized / "config.json").write_text('{"model_type": "llama"}')
    write_manifest(variant.quantized, "quantized")
    monkeypatch.setattr(targets, "load", lambda entry: lambda *given, **options: None)
    monkeypatch.setattr(targets.Target, "tokenizer_faults", lambda self, folder: [f"read in {folder.name}"])
    exporting.export_one(variant, targets.target_named("executorch"), ExportOptions())
    assert f"{variant.exports / 'executorch'}: read in executorch" in messages


def test_the_prompt_of_the_chat_template_is_compared(folder: Path) -> None:
    (text,) = runner_tokenizer.probe_texts(folder / "tokenizer.json")[len(runner_tokenizer.TEXTS) + 3 :]
    assert text.count("<|im_end|>") == 3 and text.count("<|im_start|>") == 4


def test_versions_are_reported(folder: Path) -> None:
    line = doctor.lines(doctor.doctor(folder, ALL))[-1]
    assert f"executorch {library_version('executorch')}" in line and line.endswith("the same are installed")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["libraries"]["executorch"] = "0.9.9"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    line = doctor.lines(doctor.doctor(folder, ALL))[-1]
    assert "written by qat-edge" in line and "executorch 0.9.9" in line and "installed: executorch" in line
    (folder / "manifest.json").unlink()
    assert "not recorded in the file" in doctor.lines(doctor.doctor(folder, ALL))[-1]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("text.pte", lambda data: b"hello", "no ExecuTorch program"),
        ("cut.pte", lambda data: data[: len(data) // 2], "cut short: .* bytes. Export again, or copy"),
        ("empty.pte", lambda data: b"", "no ExecuTorch program|damaged"),
        ("old.pte", lambda data: data[:4] + b"ET11" + data[8:], "in format ET11, and the .* reads ET12"),
        ("nowhere.pte", None, "nowhere.pte: not there"),
    ],
)  # fmt: skip
def test_files_that_are_no_program_are_errors(folder: Path, name: str, damage: Any, message: str) -> None:
    if damage is not None:
        (folder / name).write_bytes(damage((folder / "model.pte").read_bytes()))
    result = CliRunner().invoke(commands.main, ["doctor", str(folder / name)])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert re.search(message, result.output), result.output


def test_a_pipe_is_not_called_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pte")
    with pytest.raises(ArtifactError, match="not a file, but a folder, pipe or device"):
        open_pte(tmp_path / "model.pte")


def test_a_folder_that_no_target_writes_is_named(tmp_path: Path) -> None:
    targets.require_known(tmp_path / "exports" / "onnx")
    with pytest.raises(RunError, match=r"exports/foo: 'foo' is not the name of a target\. Known: executorch"):
        targets.require_known(tmp_path / "exports" / "foo")


def test_a_program_is_known_by_its_content(folder: Path) -> None:
    (folder / "model.pte").rename(folder / "model.bin")
    assert doctor.doctor(folder / "model.bin", ALL).path == folder / "model.bin"
    (folder / "model.bin").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=r"model.bin: no .pte, .onnx or .gguf file"):
        doctor.doctor(folder / "model.bin", ALL)


def test_a_runtime_of_another_format_is_refused(folder: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--runtime llama.cpp loads GGUF, and the file is ExecuTorch. Its runtimes: pyth"
    ):
        doctor.doctor(folder, DoctorOptions(runtime=("ios-app", "llama.cpp")))


def test_why_the_runtime_refuses_a_program_is_reported(made: dict[str, Path], tmp_path: Path) -> None:
    data = (made["custom"] / "model.pte").read_bytes()
    assert data.count(b"XH00")
    (tmp_path / "model.pte").write_bytes(data.replace(b"XH00", b"XH99"))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = runtime_probe.probe(tmp_path / "model.pte", tmp_path / "tokenizer.json", [])
    assert "XNNPACK" in found["error"]
    assert found["tokenizer"] is not None and found["tokenizer"]["error"]


def test_the_command_prints_and_exits_by_the_verdict(folder: Path) -> None:
    result = CliRunner().invoke(commands.main, ["doctor", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [check["runtime"] for check in found["runtimes"]] == list(RUNTIMES)
    assert found["program"]["constants"]["get_max_seq_len"] == CONTEXT
    result = CliRunner().invoke(commands.main, ["doctor", str(folder), "--runtime", "minimal", "--runtime", "ios-app"])
    assert result.exit_code == 1
    assert "model.pte loads in ios-app; not in minimal" in result.stdout
    assert "minimal cannot load it" in result.stderr
    assert CliRunner().invoke(commands.main, ["doctor", str(folder), "--runtime", "watch"]).exit_code == 2


@pytest.mark.usefixtures("stand_in_exports")
def test_portable_is_for_executorch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--portable is for --target executorch"):
        exporting.export(Run(tmp_path), ExportOptions(target=("onnx",), portable=True))
    given: dict[str, dict[str, Any]] = {}

    def exporter(checkpoint: Path, out: Path, context_length: int, **extras: Any) -> None:
        given[out.name.split(".")[1]] = extras

    variant, options = Variant(tmp_path), ExportOptions(portable=True)
    variant.quantized.mkdir()
    (variant.quantized / "config.json").write_text('{"model_type": "llama"}')
    write_manifest(variant.quantized, "quantized")
    monkeypatch.setattr(targets, "load", lambda entry: exporter)
    for target in options.target:
        exporting.export_one(variant, targets.target_named(target), options)
    assert given == {"executorch": {"portable": True}, "onnx": {}}
    for target, kept in (("executorch", False), ("onnx", True)):
        record = targets.target_named(target)
        assert exporting._is_current(variant.exports / target, record, options)
        assert exporting._is_current(variant.exports / target, record, ExportOptions()) == kept
