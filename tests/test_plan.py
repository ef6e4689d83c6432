"""`qat-edge plan`: what it predicts of a model whose weights are not there, and what it refuses."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from transformers import LlamaConfig

import qat_edge
from conftest import in_hub_cache, make_tokenizer, train_run
from qat_edge import config
from qat_edge.cli import commands
from qat_edge.errors import ExportError, ModelError, UsageError
from qat_edge.models.meta_model import model_without_weights
from qat_edge.options import ExportOptions, PlanOptions, ValidateOptions
from qat_edge.verbs import prediction
from qat_edge.verbs.export import export
from qat_edge.verbs.plan import PlanRequest, resolve
from qat_edge.verbs.prediction import MEGABYTE, Plan

QUICK: dict[str, Any] = {"batch_size": 2, "max_length": 32, "ptq_init": "hqq", "context_length": 64}


@pytest.fixture(scope="module")
def planned(tiny_model_folder: Path) -> Plan:
    """The plan of that model."""
    return qat_edge.plan(tiny_model_folder, **QUICK, bandwidth=10)


def without_weights(folder: Path, config: LlamaConfig) -> None:
    """Write a model folder whose file of weights has a header, and a hole in the place of the values."""
    make_tokenizer().save_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model_without_weights(config).state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def test_parameters_are_counted_by_part(planned: Plan) -> None:
    parts = planned.parameters
    # Two layers: q, k, v, o, gate, up, down of 64 to 64, 32, 32, 64, 128, 128 and 128 to 64.
    assert parts.linears == 2 * (64 * (64 + 32 + 32 + 64 + 128 + 128) + 128 * 64)
    assert (parts.embedding, parts.head, parts.tied) == (288 * 64, 0, True)
    assert parts.other == 5 * 64
    assert parts.adapters == 2 * 16 * (6 * 64 + 64 + 32 + 32 + 64 + 128 + 128 + 128 + 64)
    assert parts.scales == parts.linears // 32


def test_every_layer_has_its_bits_and_the_reason_for_others(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=144, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    without_weights(tmp_path, config)
    found = {layer.name: layer for layer in qat_edge.plan(tmp_path, **QUICK, group_size=64).layers}
    down = found["model.layers.0.mlp.down_proj"]
    assert (down.bits, down.group_size) == (8, 144)
    assert "int8 per channel" in down.reason
    assert (found["model.layers.0.mlp.up_proj"].bits, found["model.layers.0.mlp.up_proj"].reason) == (4, "")


def test_no_value_of_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(safe_open, "get_tensor", refuse, raising=False)
    # 1.1 billion parameters, in a file that takes a few kilobytes of disk.
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, eos_token_id=2,
    )  # fmt: skip
    without_weights(tmp_path, config)
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 1e6
    planned = qat_edge.plan(tmp_path, **QUICK | {"method": "full", "steps": 1, "qat_start": 1}, target=["gguf"])
    assert planned.parameters.model == pytest.approx(1.1e9, rel=0.01)
    # Weights, gradients and two averages in float32.
    assert planned.memory.peak_bytes == pytest.approx(16 * planned.parameters.model, rel=0.1)


def test_a_model_on_the_hub_is_planned_without_its_file_of_weights(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_hub_cache(tiny_model_folder, tmp_path)
    next(tmp_path.rglob("model.safetensors")).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    assert qat_edge.plan("someone/tiny", **QUICK).parameters.linears == 73728


def test_speed_is_bandwidth_over_the_bytes_of_a_token(planned: Plan) -> None:
    for each in planned.artifacts:
        # Keys and values of 2 heads, 16 wide, in 2 layers; llama.cpp keeps them in float16.
        assert each.cache_bytes == 64 * 2 * 2 * 2 * 16 * (2 if each.target == "gguf" else 4)
        assert each.most_tokens_per_s == pytest.approx(10e9 / (each.weight_bytes + each.cache_bytes))


def test_artifacts_are_compared_with_the_gates_of_a_profile(planned: Plan) -> None:
    size = planned.artifacts[0].size_bytes
    gates = ValidateOptions(max_size_mb=size / MEGABYTE, max_memory_mb=1e3, target=("executorch",))
    (fit,) = prediction.compare("exact", gates, [a for a in planned.artifacts if a.target == "executorch"])
    assert (fit.size_margin_bytes, fit.fits) == (0, True)
    smaller = ValidateOptions(max_size_mb=size / MEGABYTE / 2)
    assert not prediction.compare("small", smaller, planned.artifacts)[0].fits


def test_all_profiles_are_compared_unless_some_are_named(tiny_model_folder: Path, planned: Plan) -> None:
    assert {fit.profile for fit in planned.fits} == {"laptop", "minimal", "phone-flagship", "phone-midrange", "pi5"}
    assert {fit.profile for fit in qat_edge.plan(tiny_model_folder, **QUICK, profile=["pi5"]).fits} == {"pi5"}


def test_a_run_is_planned_with_its_own_options_and_its_files_are_as_predicted(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    run = train_run(tiny_model_folder, tmp_path)
    targets = ("onnx", "hf")
    export(run, ExportOptions(target=targets, context_length=64, ptq=("none",)))
    planned = qat_edge.plan(run.path)
    assert (planned.context_length, planned.memory.batch_size) == (64, 4)
    assert [each.target for each in planned.artifacts] == list(targets)
    for each in planned.artifacts:
        folder = run.exports / each.target
        written = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
        assert each.files.keys() == written.keys()
        assert each.size_bytes == pytest.approx(sum(written.values()), rel=0.01)


def test_json_has_every_prediction_on_stdout(tiny_model_folder: Path) -> None:
    arguments = [
        str(tiny_model_folder),
        "--batch-size",
        "2",
        "--max-length",
        "32",
        "--ptq-init",
        "hqq",
        "--bandwidth",
        "10",
    ]
    result = CliRunner().invoke(commands.main, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document.keys() == {
        "model", "context_length", "bandwidth_bytes_per_s", "parameters", "layers", "skipped", "rotated",
        "kept_layers", "memory", "artifacts", "fits",
    }  # fmt: skip
    assert {each["target"] for each in document["artifacts"]} == {"executorch", "onnx", "gguf", "hf"}
    assert len(document["layers"]) == 16
    assert "Training memory:" in result.stderr and "phone-midrange" in result.stderr


def resolved(path: Path, **given: Any) -> PlanRequest:
    """Return options from a configuration file and arguments."""
    return resolve(None, config.load(PlanOptions, "plan", None, given), given, path)


def test_options_of_a_file_are_used_and_flags_override_them(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"finetune: {{model: {tiny_model_folder}, batch_size: 3, learning_rate: 0.1}}\nexport: {{target: [hf]}}\n"
    )
    request = resolved(path, max_length=16)
    assert (request.training.batch_size, request.training.max_length) == (3, 16)
    assert request.exporting.target == ("hf",)
    request = resolved(path, batch_size=5, target=("onnx",))
    assert (request.training.batch_size, request.exporting.target) == (5, ("onnx",))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": "nf4", "method": "full", "ptq_init": "hqq"}, UsageError, "--base nf4 and --method full"),
        ({"max_length": 4096}, UsageError, "--max-length 4096: this model has 512 positions"),
        ({"context_length": 4096}, ExportError, "--context-length 4096"),
        ({"keep_layers": 3}, UsageError, "--keep-layers 3: the model has 2 layers"),
        ({"target_modules": ["nowhere"]}, UsageError, "Target modules that are not in this model: nowhere"),
        ({"profile": ["watch"]}, UsageError, "--profile watch: no such profile"),
        ({"bandwidth": 0}, UsageError, "bandwidth: 0.0 is below the least permitted value"),
        ({"distill_top_k": 4}, UsageError, "--distill-top-k 4 and --distill-weight 0"),
        ({"ptq_init": "stored"}, UsageError, "--ptq-init stored and --steps 200"),
    ],
)
def test_bad_input_is_refused_as_by_finetune(
    tiny_model_folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qat_edge.plan(tiny_model_folder, **QUICK | options)


def test_options_without_a_prediction_are_refused_by_name(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ptq-init stored: plan has no prediction"):
        qat_edge.plan(tiny_model_folder, steps=0, ptq_init="stored")
    path = tmp_path / "c.yaml"
    path.write_text(f"finetune: {{model: {tiny_model_folder}}}\nexport: {{portable: true}}\n")
    result = CliRunner().invoke(commands.main, ["plan", "--config", str(path)])
    assert result.exit_code == 2 and "--portable: plan has no prediction" in result.output


def test_quantizing_without_steps_is_planned(tiny_model_folder: Path) -> None:
    memory = qat_edge.plan(
        tiny_model_folder, steps=0, calibration_tokens=256, max_length=32, target=["gguf"], rotate="off"
    ).memory
    assert (memory.phase_1, memory.qat) == (None, None)
    assert memory.initialization == memory.peak_bytes


def test_sources_that_are_no_model_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("not a model")
    for source, message in (
        (tmp_path / "nowhere.gguf", "no such file or folder"),
        (tmp_path / "empty", "not a model folder, it has no config.json"),
        (tmp_path / "text.gguf", "not a GGUF file"),
    ):
        with pytest.raises(ModelError, match=message):
            qat_edge.plan(source, **QUICK)
    result = CliRunner().invoke(commands.main, ["plan"])
    assert result.exit_code == 2 and "No model to plan for" in result.output
