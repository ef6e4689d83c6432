"""Train a tiny model: both phases, the files of a run, exact resume after a kill, errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig

from conftest import plain_rows, short_training
from qat_edge import config
from qat_edge.data import training_examples
from qat_edge.errors import DataError, ExportError, RunError, UsageError
from qat_edge.manifest import read_manifest
from qat_edge.models.merge import merged_model
from qat_edge.options import FinetuneOptions, QuantizeOptions
from qat_edge.run import Run
from qat_edge.train.training_log import Finetuned
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> FinetuneOptions:
    return short_training(tiny_model_folder, tmp_path, plain_rows(40), lora_dropout=0.1, save_every=2)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in json.loads((run / "training.json").read_text())["curve"] if "loss" in row]


def adapter_tensors(run: Path, part: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / part / "adapter_model.safetensors")


def test_a_run_has_all_its_files(options: FinetuneOptions, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = finetune(options, out)
    assert isinstance(result, Finetuned) and (result.steps, result.qat_start_step) == (6, 3)
    assert config.load(FinetuneOptions, "finetune", out / "config.yaml", {}) == options
    rows = json.loads((out / "training.json").read_text())["curve"]
    assert [(r["step"], r["phase"]) for r in rows if "loss" in r] == [
        (1, "lora"), (2, "lora"), (3, "lora"), (4, "qat"), (5, "qat"), (6, "qat"),
    ]  # fmt: skip
    assert [r["step"] for r in rows if "eval_loss" in r] == [3, 6]
    for part in (out / "adapter", out / "reference"):
        manifest = read_manifest(part)
        assert set(manifest["files"]) >= {"adapter_model.safetensors", "adapter_config.json"}
        assert manifest["model"]["source"] == options.model and manifest["seed"] == 0
    assert any((adapter_tensors(out, "adapter")[k] != v).any() for k, v in adapter_tensors(out, "reference").items())


def test_plain_peft_loads_the_reference(options: FinetuneOptions, tmp_path: Path) -> None:
    finetune(options, tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "run" / "reference")).eval()
    ours = merged_model(tmp_path / "run" / "reference").model
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        # 2e-6 here: peft adds the adapter's product to the output, we add it to the weight.
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_killed_run_resumes_with_the_same_losses(options: FinetuneOptions, tmp_path: Path) -> None:
    finetune(options, tmp_path / "whole")
    config.save(tmp_path / "options.yaml", "finetune", options)

    # Kill the process as soon as its first checkpoint is complete.
    command = [sys.executable, "-m", "qat_edge", "finetune", "--config", str(tmp_path / "options.yaml")]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "cut")], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()

    # Resume from that checkpoint.
    for late in sorted((tmp_path / "cut" / "checkpoints").glob("checkpoint-[!2]*")):
        shutil.rmtree(late)  # a fast machine may be past the step of the kill
    finetune(options, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = adapter_tensors(tmp_path / "whole", "adapter"), adapter_tensors(tmp_path / "cut", "adapter")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ptq_init": "awq", "scales": "fixed"},
        {"ptq_init": "none", "distill_weight": 0.5, "distill_temperature": 2.0},
        {"distill_weight": 1.0, "distill_top_k": 8},
    ],
)
def test_a_run_resumed_in_phase_2_ends_the_same(
    options: FinetuneOptions, tmp_path: Path, changes: dict[str, Any]
) -> None:
    out, options = tmp_path / "run", replace(options, **changes)
    finetune(options, out)
    whole, curve = adapter_tensors(out, "adapter"), losses(out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    shutil.rmtree(out / "adapter")
    finetune(options, out, resume=True)
    assert losses(out) == curve
    again = adapter_tensors(out, "adapter")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_training_without_phase_2_ends_with_the_initialization(options: FinetuneOptions, tmp_path: Path) -> None:
    finetune(replace(options, qat_start=6), tmp_path / "run")
    manifest = read_manifest(tmp_path / "run" / "adapter")
    assert manifest["start"]["method"] == "coordinate-descent" and manifest["learned_scales"]
    merged = merged_model(tmp_path / "run" / "adapter")
    assert set(merged.scales) == set(merged.scheme.linears)
    reference = merged_model(tmp_path / "run" / "reference")
    name = next(iter(merged.scales))
    assert not reference.scales
    assert not torch.equal(merged.model.get_submodule(name).weight, reference.model.get_submodule(name).weight)


@pytest.mark.parametrize("rotate", ["auto", "on"])
def test_values_of_attention_are_rotated_alone_after_a_norm_that_keeps_the_hidden_states(
    rotate: str, options: FinetuneOptions, tmp_path: Path, tokenizer: Any, messages: list[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = Gemma3TextConfig(**sizes, vocab_size=288, num_key_value_heads=1, head_dim=32, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # equal weights of a norm would commute with the rotation
    model.save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    finetune(replace(options, model=str(tmp_path / "gemma"), rotate=rotate), tmp_path / "run")
    assert any(line.startswith("Rotation is on for the values of attention alone. Gemma3") for line in messages)
    assert read_manifest(tmp_path / "run" / "adapter")["start"]["rotation_seed"] == options.seed
    run = Run(tmp_path / "run")
    quantize(run, QuantizeOptions())
    assert read_manifest(run.quantized)["rotation_seed"] == options.seed


def test_a_model_that_cannot_be_rotated_is_trained_without_rotation(
    options: FinetuneOptions, tmp_path: Path, tokenizer: Any, messages: list[str]
) -> None:
    shape = GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=288,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    neox = replace(options, model=str(tmp_path / "neox"))
    with pytest.raises(UsageError, match=r"--rotate on: .* Use --rotate auto"):
        finetune(replace(neox, rotate="on"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    finetune(neox, tmp_path / "run")
    assert any(line.startswith("Rotation is off: ") for line in messages)
    assert read_manifest(tmp_path / "run" / "adapter")["start"]["rotation_seed"] is None
    finetune(options, tmp_path / "rotated")
    assert read_manifest(tmp_path / "rotated" / "adapter")["start"]["rotation_seed"] == options.seed


@pytest.mark.parametrize(("rotate", "steps"), [("on", 3), ("off", 6)])
def test_the_optimizer_is_reset_if_weights_are_rotated(
    options: FinetuneOptions, tmp_path: Path, rotate: str, steps: int
) -> None:
    finetune(replace(options, rotate=rotate), tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    adapters = [saved["state"][name]["step"] for name in saved["param_groups"][0]["params"]]
    assert {int(step) for step in adapters} == {steps}  # averaged over phase 2 alone, or over both


def test_resume_refuses_other_options_and_other_data(options: FinetuneOptions, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RunError, match="nothing to resume"):
        finetune(options, out, resume=True)
    finetune(options, out)
    with pytest.raises(UsageError, match="--learning-rate differ"):
        finetune(replace(options, learning_rate=1.0), out, resume=True)
    Path(options.data).write_text(json.dumps({"text": "something else entirely"}) + "\n")
    with pytest.raises(RunError, match="data changed"):
        finetune(options, out, resume=True)


def test_force_replaces_a_run_and_no_other_folder(options: FinetuneOptions, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(RunError):
            finetune(options, tmp_path / "mine", force=force)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("qat_start", "step"), [(0.0, 0), (0.25, 50), (0.5, 100), (1, 1), (30, 30), (500, 200)])
def test_qat_start_is_a_fraction_or_a_step(options: FinetuneOptions, qat_start: float, step: int) -> None:
    assert replace(options, steps=200, qat_start=float(qat_start)).qat_start_step == step


def test_a_changed_base_model_is_refused(options: FinetuneOptions, tmp_path: Path, tokenizer: Any) -> None:
    from conftest import make_model

    folder = tmp_path / "base"
    for seed in (0, 1):
        make_model(tokenizer, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if seed == 0:
            finetune(replace(options, model=str(folder)), tmp_path / "run")
    with pytest.raises(RunError, match="not the model that was trained"):
        merged_model(tmp_path / "run" / "adapter")


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(options: FinetuneOptions, tmp_path: Path, device: str) -> None:
    with pytest.raises(UsageError, match="no CUDA GPU"):
        finetune(replace(options, device=device), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_force_does_not_remove_its_own_input(options: FinetuneOptions, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune(options, out)
    (out / "mine.jsonl").write_text(Path(options.data).read_text())
    with pytest.raises(UsageError, match=r"--data .* is inside"):
        finetune(replace(options, data=str(out / "mine.jsonl")), out, force=True)
    assert (out / "mine.jsonl").is_file()


def test_other_versions_than_in_training_are_refused_by_name(
    options: FinetuneOptions, tmp_path: Path, messages: list[str]
) -> None:
    finetune(options, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["libraries"]["torchao"] = "0.1.0"
    manifest["quantizer"] = "another"
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"torchao 0\.18\.\S+ \(trained with 0\.1\.0\), quantizer .* --force"):
        merged_model(tmp_path / "run" / "adapter")
    merged_model(tmp_path / "run" / "adapter", force=True)
    assert "trained with 0.1.0" in messages[-1]


@pytest.mark.parametrize(
    ("target", "message"),
    [("nonsense_proj", "--target-modules: Target modules"), ("embed_tokens", "--target-modules: embed_tokens is a ")],
)
def test_unusable_target_modules_are_refused(
    options: FinetuneOptions, tmp_path: Path, target: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, target_modules=(target,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_data": "/nowhere.jsonl"}, r"/nowhere\.jsonl: no such file"),
        ({"target_modules": ("nope",)}, "--target-modules: Target modules that are not in this model: nope"),
        ({"target_modules": ("q_proj, up",)}, "Repeat the flag: --target-modules q_proj --target-modules up."),
        ({"target_modules": ("embed_tokens",)}, "--target-modules: embed_tokens is a "),
        ({"keep_layers": 5}, "--keep-layers 5: the model has 2 layers"),
        ({"bits": "bits.yaml"}, "names no weight of this model"),
        (
            {"bits": "other.yaml"},
            r"other\.yaml: its bits were chosen for other, and this model is .*, with other",
        ),
        ({"bits": "all.yaml", "codes": "fixed"}, "--codes fixed: no layer with an adapter has weights in groups"),
        ({"distill_weight": 0.5, "distill_top_k": 10**4}, "--distill-top-k 10000: this model has"),
        ({"context_length": 10**4}, "--context-length 10000: the model has positions for 512"),
    ],
)
def test_options_that_the_model_rules_out_are_refused_before_rows_are_tokenized(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def tokenize(*given: Any) -> None:
        raise AssertionError("rows were tokenized")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bits.yaml").write_text("bits:\n  model.layers.9.mlp.up_proj: 8\n")
    (tmp_path / "other.yaml").write_text("model: {name: other, weights: ab}\nbits: {model.layers.1.mlp.up_proj: 8}\n")
    model = AutoModelForCausalLM.from_pretrained(options.model)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    # One layer without an adapter keeps its groups.
    lines = [f"  {name}: 8\n" for name in linears if name != "model.layers.1.mlp.up_proj"]
    (tmp_path / "all.yaml").write_text("bits:\n" + "".join(lines))
    if changes.get("codes") == "fixed":
        changes = {**changes, "target_modules": ("q_proj", "down_proj")}
    monkeypatch.setattr(training_examples, "tokenize_for_task", tokenize)
    length = changes.get("context_length")
    given = {key: value for key, value in changes.items() if key != "context_length"}
    with pytest.raises((UsageError, DataError, ExportError), match=message):
        finetune(replace(options, **given), tmp_path / "run", context_length=length)


def test_adapters_on_some_target_modules_alone(options: FinetuneOptions, tmp_path: Path, messages: list[str]) -> None:
    finetune(replace(options, target_modules=("q_proj", "lm_head")), tmp_path / "run")
    names = {key.split(".lora_")[0].rpartition(".")[2] for key in adapter_tensors(tmp_path / "run", "adapter")}
    assert names == {"q_proj", "lm_head"}

    # The frozen checkpoint has a head that the embedding does not share, and so it was announced.
    assert any(line.startswith("lm_head becomes a table of its own: --target-modules trains it") for line in messages)
    assert not any("share a table" in line for line in messages)
    quantize(Run(tmp_path / "run"), QuantizeOptions())
    assert read_manifest(tmp_path / "run" / "quantized")["scheme"]["tied"] is False


def test_an_unknown_tracker_is_refused(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--track wandbb"):
        finetune(replace(options, track=("wandbb",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_trains_on_cuda(options: FinetuneOptions, tmp_path: Path, messages: list[str]) -> None:
    finetune(replace(options, device="auto"), tmp_path / "run")
    assert torch.cuda.get_device_name() in messages[0]
