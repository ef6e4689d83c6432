"""Freezing: of the trained adapters, and of the FP32 fine-tune by each method, with calibration rows of the run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from conftest import relist
from qat_edge.cli import commands
from qat_edge.data import calibration
from qat_edge.errors import DataError, ExportError, RunError, UsageError
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models.merge import merged_model
from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions
from qat_edge.quant import frozen, numerics
from qat_edge.quant.ptq.method_names import CALIBRATED, PTQ_METHODS
from qat_edge.run import Run
from qat_edge.verbs import freezing
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize, quantize_if_missing

ROWS = 40
TOKENS = 600


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("quantize")
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i}, and {i * i} is its square"} for i in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = FinetuneOptions(
        model=str(tiny_model_folder), data=str(folder / "train.jsonl"), steps=4, qat_start=0.5, batch_size=4,
        lora_rank=4, learning_rate=1e-2, track=(), ptq_init="none", scales="absmax",
    )  # fmt: skip
    finetune(options, folder / "run")
    return Run(folder / "run")


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(trained.path, tmp_path / "run")))


def options(method: str, **changes: Any) -> QuantizeOptions:
    tokens = TOKENS if method in CALIBRATED else None
    return replace(QuantizeOptions(method=method, calibration_tokens=tokens), **changes)


# --- calibration -------------------------------------------------------------------------------------------


def rows(lengths: list[int]) -> list[dict[str, list[int]]]:
    return [{"input_ids": [i + 1] * n, "labels": [i + 1] * n} for i, n in enumerate(lengths)]


def test_rows_hold_as_many_tokens_as_asked() -> None:
    chosen = calibration.choose_rows(rows([10, 20, 30, 40]), 55, 0, "file", "--tokens")
    assert sum(len(row["input_ids"]) for row in chosen) == 55
    assert chosen == calibration.choose_rows(rows([10, 20, 30, 40]), 55, 0, "file", "--tokens")
    orders = [calibration.choose_rows(rows([9] * 9), 81, seed, "file", "--tokens") for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_too_few_rows_say_how_much_is_missing() -> None:
    with pytest.raises(DataError, match=r"file: 2 rows have 30 tokens, --tokens requests 100: 70 are missing"):
        calibration.choose_rows(rows([10, 20]), 100, 0, "file", "--tokens")


def test_batches_hold_every_token_once_and_mark_the_padding(tokenizer: Any) -> None:
    given = rows([5, 700, 9, 600, 400, 12])
    batches = calibration.make_batches(given, tokenizer)
    assert sum(int(b["attention_mask"].sum()) for b in batches) == sum(len(row["input_ids"]) for row in given)
    assert all(b["input_ids"].numel() <= calibration.BATCH_TOKENS for b in batches)
    assert all(set(b) == {"input_ids", "attention_mask"} for b in batches)
    for batch in batches:
        real = batch["attention_mask"].bool()
        assert bool((real[:, :-1] >= real[:, 1:]).all()), "padding is on the right"


# --- quantize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qat", *PTQ_METHODS])
def test_every_method_leaves_a_checkpoint_that_plain_transformers_runs(run: Run, method: str, tokenizer: Any) -> None:
    result = quantize(run, options(method))
    folder = run.quantized if method == "qat" else run.path / "ptq" / method / "quantized"
    assert result.folder == folder and result.method == method and "14 int4" in result.weights
    manifest = read_manifest(folder)
    assert manifest["method"] == method
    if method in CALIBRATED:
        assert manifest["calibration"]["tokens"] == TOKENS and 0 < manifest["calibration"]["rows"] <= ROWS
    else:
        assert manifest["calibration"] is None
    ids = tokenizer("say 7 it is 7, and 49 is its square", return_tensors="pt").input_ids
    tuned = merged_model(run.adapter if method == "qat" else run.reference).model
    with torch.no_grad():
        expected, logits = tuned(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    error = float((logits - expected).norm() / expected.norm())
    # On text like the calibration rows: 0.043 rounded to nearest, 0.008 to 0.035 by the methods that look at them.
    assert 0 < error < (0.04 if method in CALIBRATED else 0.16)


def test_round_to_nearest_is_of_the_fp32_fine_tune(run: Run) -> None:
    quantize(run, options("rtn"))
    model = merged_model(run.reference).model
    for name, found in frozen.read_weights(run.ptq("rtn").quantized).items():
        weight = model.get_submodule(name).weight.detach()
        group = weight.shape[1] // found.scales.shape[1]
        scales = numerics.choose_scales(weight, found.bits, group)
        assert torch.equal(found.scales, scales) and torch.equal(
            found.codes, numerics.quantize(weight, scales, found.bits)
        )


def test_made_once_and_again_only_by_force(run: Run, messages: list[str]) -> None:
    quantize(run, options("gptq"))
    again = quantize(run, options("gptq"))
    assert again.calibration == read_manifest(again.folder)["calibration"]
    assert len([line for line in messages if line.startswith("Frozen")]) == 1
    with pytest.raises(RunError, match=r"other options.*--seed 0"):
        quantize(run, options("gptq", seed=1))
    quantize(run, options("gptq", seed=1), force=True)
    assert read_manifest(run.ptq("gptq").quantized)["options"]["seed"] == 1


def test_bits_by_layer_are_those_of_the_file(run: Run, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    (tmp_path / "bits.yaml").write_text(f"bits: {{{name}: 8}}\n")
    asked = options("awq", bits=str(tmp_path / "bits.yaml"))
    quantize(run, asked)
    bits = {n: w.bits for n, w in frozen.read_weights(run.ptq("awq").quantized).items()}
    assert bits[name] == 8 and sum(b == 4 for b in bits.values()) == 13
    (tmp_path / "other.yaml").write_text(f"model: {{name: other, weights: ab}}\nbits: {{{name}: 8}}\n")
    with pytest.raises(UsageError, match=r"other\.yaml: its bits were chosen for other, and this model is"):
        quantize(run, options("awq", bits=str(tmp_path / "other.yaml")), force=True)
    with pytest.raises(UsageError, match="--bits and --method qat"):
        quantize(run, replace(asked, method="qat"))


@pytest.mark.parametrize("method", ["qat", "rtn", "hqq"])
@pytest.mark.parametrize(("flag", "value"), [("--calibration-data", "/nowhere"), ("--calibration-tokens", "64")])
def test_calibration_data_that_no_method_reads_is_refused(run: Run, method: str, flag: str, value: str) -> None:
    answer = CliRunner().invoke(commands.main, ["quantize", str(run.path), "--method", method, flag, value])
    assert answer.exit_code == 2, answer.output
    assert f"{flag} {value} and --method {method}: it is not calibrated. Give --method gptq|" in answer.output


def test_turned_hidden_states_are_quantized_as_well(run: Run, tokenizer: Any) -> None:
    folder = quantize(run, options("coordinate-descent", rotate=True)).folder
    assert frozen.read_scheme(folder).tied
    tuned = merged_model(run.reference).model
    stored, head = (frozen.read_weights(folder)[name] for name in ("model.embed_tokens", "lm_head"))
    assert torch.equal(stored.codes, head.codes) and torch.equal(stored.scales, head.scales)
    table = numerics.dequantize(stored.codes, stored.scales)
    lengths = tuned.get_input_embeddings().weight.norm(dim=1)
    torch.testing.assert_close(table.norm(dim=1), lengths, rtol=0.01, atol=0)  # the rows have turned, no more
    assert (table - tuned.get_input_embeddings().weight).norm(dim=1).median() > 0.5 * lengths.median()
    ids = tokenizer("say 7 it is 7, and 49 is its square", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = tuned(ids).logits
        logits = frozen.load(folder)(ids).logits
    assert 0 < float((logits - expected).norm() / expected.norm()) < 0.04
    with pytest.raises(UsageError, match="--rotate and --method qat"):
        quantize(run, options("qat", rotate=True))


def test_a_checkpoint_of_another_adapter_is_refused(run: Run) -> None:
    quantize(run, options("qat"))
    shutil.copy(run.reference / "adapter_model.safetensors", run.adapter)
    for attempt in (lambda: quantize(run, options("qat")), lambda: quantize_if_missing(run, "qat")):
        with pytest.raises(RunError, match="another adapter"):
            attempt()

    # Not even --force freezes an adapter that is not as it was written.
    with pytest.raises(RunError, match=r"adapter_model\.safetensors: changed since it was written"):
        quantize_if_missing(run, "qat", force=True)
    relist(run.adapter)
    quantize_if_missing(run, "qat", force=True)


def test_too_little_calibration_data_is_said_by_the_command(run: Run, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"text": "only this"}) + "\n")
    arguments = ["quantize", str(run.path), "--method", "awq", "--calibration-data", str(few)]
    arguments += ["--calibration-tokens", "12288"]
    answer = CliRunner().invoke(commands.main, arguments)
    assert answer.exit_code == 1 and "--calibration-tokens requests 12288" in answer.output
    assert "are missing" in answer.output and not run.ptq("awq").quantized.exists()


def test_a_frozen_checkpoint_returns_what_every_model_returns(run: Run) -> None:
    quantize(run, options("rtn"))
    folder = run.ptq("rtn").quantized
    path = folder / "config.json"
    odd = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **odd}))
    relist(folder)
    with torch.no_grad():
        found: Any = frozen.load(folder)(torch.tensor([[1, 5, 9]]))
    assert found.logits.shape[:2] == (1, 3)
    assert found.attentions is None and found.hidden_states is None


def test_the_command_prints_what_it_made(run: Run) -> None:
    answer = CliRunner().invoke(commands.main, ["quantize", str(run.path), "--method", "hqq", "--json"])
    assert answer.exit_code == 0, answer.output
    made = json.loads(answer.stdout)
    assert made["method"] == "hqq" and made["folder"] == str(run.ptq("hqq").quantized)


# --- export of variants ------------------------------------------------------------------------------------


def copying(quantized: Path, work: Path, context_length: int) -> None:
    (work / "model").write_text(f"{read_manifest(quantized)['method']} {context_length}")


@pytest.fixture
def quick_exporters(monkeypatch: pytest.MonkeyPatch, stand_in_exports: None) -> None:
    monkeypatch.setattr("qat_edge_exporters.targets.load", lambda entry: copying)
    monkeypatch.setattr("qat_edge_exporters.targets.Target.missing_for", lambda *_: "")
    monkeypatch.setattr("qat_edge_exporters.targets.Target.require_checkpoint", lambda *_: None)


@pytest.mark.usefixtures("quick_exporters")
def test_methods_are_exported_beside_the_run_and_can_be_added(run: Run) -> None:
    first = ExportOptions(target=("onnx",))
    assert [e.folder for e in export(run, first)] == [run.exports / "onnx", run.ptq("rtn").exports / "onnx"]
    added = replace(first, ptq=("rtn", "hqq"))
    assert [e.folder for e in export(run, added)] == [run.ptq("hqq").exports / "onnx"]
    assert (run.ptq("hqq").exports / "onnx" / "model").read_text() == "hqq 512"
    assert [v.name for v in run.variants()] == ["qat", "ptq (round-to-nearest)", "ptq (HQQ)"]
    assert export(run, added) == [], "everything is there and current"
    with pytest.raises(RunError, match="--force"):
        export(run, replace(added, ptq=("rtn", "hqq", "gptq"), context_length=64))
    assert not run.ptq("gptq").path.exists(), "refused before anything was made"


@pytest.mark.usefixtures("quick_exporters")
def test_the_default_context_is_no_longer_than_the_positions_of_the_model(run: Run, messages: list[str]) -> None:
    (exported,) = export(run, ExportOptions(target=("onnx",), ptq=()))
    assert (exported.folder / "model").read_text() == "qat 512"
    assert read_manifest(exported.folder)["options"]["context_length"] == 512
    assert [line for line in messages if "positions" in line] == [
        "Context: 512 tokens, because the model has no more positions"
    ]


@pytest.mark.usefixtures("quick_exporters")
def test_a_context_beyond_the_positions_of_the_model_is_refused_before_any_work(run: Run) -> None:
    with pytest.raises(ExportError, match=r"--context-length 513: the model has positions for 512 .*Give 512 or less"):
        export(run, ExportOptions(target=("onnx",), context_length=513))
    assert not run.quantized.exists()


@pytest.mark.usefixtures("quick_exporters")
def test_force_exports_again_from_the_checkpoint_that_is_there(run: Run) -> None:
    quantize(run, options("gptq"))
    before = (run.ptq("gptq").quantized / MANIFEST).read_text()
    asked = ExportOptions(target=("onnx",), ptq=("gptq",))
    for _ in range(2):
        assert len(export(run, asked, force=True)) == 2
    assert (run.ptq("gptq").quantized / MANIFEST).read_text() == before


@pytest.mark.usefixtures("quick_exporters")
@pytest.mark.parametrize("nothing", [(), ("none",)])
def test_post_training_quantization_can_be_left_out(run: Run, nothing: tuple[str, ...]) -> None:
    assert [e.folder for e in export(run, ExportOptions(ptq=nothing))] == [
        run.exports / "executorch", run.exports / "onnx",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--ptq none cannot be combined with --ptq hqq"):
        export(run, ExportOptions(ptq=("none", "hqq")))


@pytest.mark.parametrize("text", ["", '{"format": 1}', '{"format": 2}'])
def test_force_replaces_a_checkpoint_whose_manifest_cannot_be_read(run: Run, tmp_path: Path, text: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / MANIFEST).write_text(text)
    run.quantized.symlink_to(other)
    opened = Run.open(run.path)
    with pytest.raises(RunError, match=r"quantized/manifest\.json.*--force replaces it"):
        quantize_if_missing(opened, "qat")
    quantize_if_missing(opened, "qat", force=True)
    assert read_manifest(run.quantized)["kind"] == "quantized" and (other / MANIFEST).read_text() == text


def test_calibration_rows_are_as_long_as_those_of_the_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default no row is longer than the model's positions, for finetune and for calibration."""
    lengths = []
    tokenize = freezing.training_examples.tokenize_for_task

    def short(*given: Any) -> Any:
        merged = merged_model(*given)
        merged.model.config.max_position_embeddings = 32
        return merged

    def record(*given: Any) -> Any:
        lengths.append(given[-1])
        return tokenize(*given)

    monkeypatch.setattr(freezing, "merged_model", short)
    monkeypatch.setattr(freezing.training_examples, "tokenize_for_task", record)
    quantize(run, options("gptq"))
    assert lengths == [32]
