"""Adapters trained next to the frozen weights of a base: `finetune --frozen-base`, and the line behind it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import qat_edge
from conftest import plain_rows
from qat_edge import config
from qat_edge.cli import commands
from qat_edge.errors import ArtifactError, ExportError, RunError, UsageError
from qat_edge.manifest import read_manifest
from qat_edge.models.merge import base_model, fake_quantized_model, merged_model
from qat_edge.options import CompareOptions, FinetuneOptions, QuantizeOptions, SensitivityOptions
from qat_edge.quant import frozen
from qat_edge.quant.frozen_adapters import ADAPTER, WEIGHTS, read_adapters
from qat_edge.run import Run
from qat_edge.train.option_checks import check_combination
from qat_edge.verbs.compare import compare
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.quantize_model import quantize_model
from qat_edge.verbs.sensitivity import sensitivity
from qat_edge.verbs.verify import verify
from qat_edge_devices.runtimes.agent_runtime import AgentRuntime

STEPS = 8
IDS = torch.arange(3, 43).unsqueeze(0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in plain_rows(40)))
    return path


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A base whose hidden states are rotated, so that embedding and head have rotated tables."""
    out = tmp_path_factory.mktemp("base") / "run"
    options = QuantizeOptions(
        method="coordinate-descent", calibration_data=str(rows), calibration_tokens=300, rotate=True
    )
    quantize_model(str(tiny_model_folder), out, options)
    return Run.open(out)


def training(frozen_base: Run, rows: Path, **changes: Any) -> FinetuneOptions:
    given = {
        "frozen_base": str(frozen_base.path), "data": str(rows), "eval_data": str(rows), "steps": STEPS,
        "batch_size": 4, "lora_rank": 4, "track": (), "learning_rate": 0.02, "save_every": 1,
    }  # fmt: skip
    return config.load(FinetuneOptions, "finetune", None, {**given, **changes})


@pytest.fixture(scope="module")
def trained(base: Run, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("trained") / "run"
    finetune(training(base, rows), out)
    run = Run.open(out)
    quantize(run, QuantizeOptions())
    return run


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(commands.main, [str(argument) for argument in arguments])


# --- what is trained and frozen ----------------------------------------------------------------------------


def test_the_base_decides_model_bits_and_rotation(base: Run, rows: Path, tiny_model_folder: Path) -> None:
    options = training(base, rows)
    assert options.model == str(tiny_model_folder) and options.ptq_init == "coordinate-descent"
    assert options.rotate == "on" and options.scales == "fixed" and options.qat_start_step == STEPS // 2
    check_combination(options)


def test_codes_and_scales_are_those_of_the_base(base: Run, trained: Run) -> None:
    ours, theirs = (load_file(run.quantized / "model.safetensors") for run in (trained, base))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    metadata = read_manifest(trained.adapter)
    assert metadata["start"]["sha256"] == metadata["frozen_base"]["sha256"]
    trained_files = load_file(trained.adapter / WEIGHTS)
    shipped = load_file(trained.quantized / ADAPTER / WEIGHTS)
    assert trained_files.keys() == shipped.keys()
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in trained_files.items())


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_methods_that_keep_the_weights_have_the_codes_of_the_base(
    method: str, tiny_model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    quantize_model(
        str(tiny_model_folder), tmp_path / "base", QuantizeOptions(method=method, calibration_data=str(rows))
    )
    base = Run.open(tmp_path / "base")
    finetune(training(base, rows, steps=4), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    quantize(run, QuantizeOptions())
    ours, theirs = (load_file(each.quantized / "model.safetensors") for each in (run, base))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert_computes_what_training_did(run)


def test_another_training_on_the_base_differs_in_its_adapters_alone(
    base: Run, trained: Run, rows: Path, tmp_path: Path
) -> None:
    finetune(training(base, rows, seed=1, lora_rank=2), tmp_path / "run")
    other = Run.open(tmp_path / "run")
    quantize(other, QuantizeOptions())
    ours, theirs = (load_file(run.quantized / "model.safetensors") for run in (trained, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    one, two = read_adapters(trained.quantized), read_adapters(other.quantized)
    assert one.keys() == two.keys() and {len(each.down) for each in two.values()} == {2}


def test_the_frozen_checkpoint_computes_what_training_did(trained: Run) -> None:
    assert_computes_what_training_did(trained)


def assert_computes_what_training_did(run: Run) -> None:
    with torch.no_grad():
        expected = fake_quantized_model(run.adapter)(input_ids=IDS).logits
        found = frozen.load(run.quantized)(input_ids=IDS).logits
        without = frozen.load(run.quantized, with_adapters=False)(input_ids=IDS).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((without - expected).abs().max()) > 0.1


def test_the_reference_is_plain_lora_on_the_model_itself(trained: Run) -> None:
    merged, plain = merged_model(trained.reference).model, base_model(trained.reference)
    with torch.no_grad():
        difference = merged(input_ids=IDS).logits - plain(input_ids=IDS).logits
    assert float(difference.abs().max()) > 0.1
    assert read_manifest(trained.reference)["unmerged"] is False and read_manifest(trained.adapter)["unmerged"] is True


def test_a_resumed_training_ends_the_same(base: Run, trained: Run, rows: Path, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / f"checkpoint-{STEPS}")
    assert (run.checkpoints / f"checkpoint-{STEPS - 1}").is_dir()  # in phase 2
    finetune(training(base, rows), run.path, resume=True)
    ours, whole = load_file(run.adapter / WEIGHTS), load_file(trained.adapter / WEIGHTS)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ours.items())


def test_a_base_quantized_again_is_noticed(
    base: Run, trained: Run, rows: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    other = QuantizeOptions(
        method="coordinate-descent", calibration_data=str(rows), calibration_tokens=200, rotate=True, seed=3
    )
    quantize_model(str(tiny_model_folder), tmp_path / "base", other)
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    shutil.rmtree(run.adapter)
    moved = training(Run.open(tmp_path / "base"), rows)
    path = run.config
    path.write_text(path.read_text().replace(str(base.path), moved.frozen_base or ""))
    with pytest.raises(RunError, match="--resume: frozen_base changed since"):
        finetune(moved, run.path, resume=True)


# --- the line ----------------------------------------------------------------------------------------------


def test_the_onnx_folder_computes_the_checkpoint(
    trained: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Logits, generated answers and speed are those of base and adapter.
    used: dict[str, str | None] = {}
    for name in ("score", "generate", "speed"):
        plain = getattr(AgentRuntime, name)

        def record(self: Any, *given: Any, _name: str = name, _plain: Any = plain) -> Any:
            used[_name] = self.adapter
            return _plain(self, *given)

        monkeypatch.setattr(AgentRuntime, name, record)
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    qat_edge.export(run, target=["onnx"], context_length=64, ptq=("none",))
    (verified,) = qat_edge.verify(run)
    assert verified.linears_equal == verified.linears == 14 and not verified.faults
    assert not verified.parity.not_measured and not verified.parity.fault
    assert verified.adapter == verified.adapter_equal == 2 * 14
    (report,) = qat_edge.validate(
        run, eval_data=rows, tokens=128, prompts=4, max_new_tokens=4, prefill=8, decode=4, repeats=1, max_kl=10.0
    )
    assert [row.name for row in report.measured] == [
        "fp32 base", "fp32 fine-tuned", "adapters (coordinate descent)",
    ]  # fmt: skip
    assert report.gates
    assert set(used) == {"score", "generate", "speed"} and all(used.values())
    shown = cli("report", run.path)
    assert shown.exit_code == 0, shown.output
    page = run.report_html.read_text()
    assert "Adapters on coordinate descent" in page and "QAT · ONNX" not in page

    texts = [
        cli("generate", run.path, "say 3 ", "--from", source, "--raw", "--max-new-tokens", 8).stdout
        for source in ("torch", "onnx")
    ]
    assert texts[0] == texts[1] and texts[0]

    # An earlier result does not stand where the artifact cannot be read any more.
    assert run.verified.is_file()
    (run.exports / "onnx" / "model.onnx.data").write_bytes(b"cut short")
    (found,) = verify(run, ())
    assert found.linears_equal == 0 and not found.embedding_equal and "but the file has 9" in found.faults[0]
    assert found.describe().endswith("exports/onnx: cannot be read, so that nothing was compared")
    with pytest.raises(ArtifactError, match="It cannot be read"):
        qat_edge.verify(run)
    (row,) = json.loads(run.verified.read_text())
    assert row["faults"] == found.faults


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 64}, "--group-size 64 and --frozen-base .*: its weights were quantized with 32, and stay"),
        ({"weight_bits": 2}, "--weight-bits 2 and --frozen-base .* with 4, and stay"),
        ({"rotate": "off"}, "--rotate off and --frozen-base .* with on"),
        ({"ptq_init": "gptq"}, "--ptq-init gptq and --frozen-base .* with coordinate-descent"),
        ({"scales": "learned"}, "--scales learned and --frozen-base .* with fixed"),
        ({"steps": 0}, "--frozen-base and --steps 0: no adapter would be trained"),
        ({"method": "full"}, "--method full and --frozen-base: adapters alone are trained"),
        ({"base": "int8"}, "--base int8 and --frozen-base"),
        ({"codes": "trained"}, "--codes trained and --frozen-base"),
        ({"calibration_tokens": 99}, "--calibration-tokens 99 and --frozen-base"),
    ],
)
def test_options_that_the_base_decides_are_refused(
    base: Run, rows: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_combination(training(base, rows, **changes))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, rows: Path) -> None:
    done = cli("finetune", "--frozen-base", tmp_path / "none", "--data", rows, "--out", tmp_path / "run")
    assert done.exit_code == 2 and "none: no run folder. `qat-edge quantize MODEL --out" in done.output
    assert not (tmp_path / "run").exists()


def test_a_trained_run_is_no_base(trained: Run, rows: Path) -> None:
    with pytest.raises(UsageError, match="this run was trained, and a base has no adapters"):
        check_combination(replace(training(trained, rows)))


def test_the_model_of_a_base_may_have_moved(base: Run, rows: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    finetune(training(base, rows, steps=2, model=str(moved)), tmp_path / "run")
    assert read_manifest(Run.open(tmp_path / "run").adapter)["model"]["source"] == str(moved)


def test_a_base_of_another_model_is_refused(base: Run, rows: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    run = Run(Path(shutil.copytree(base.path, tmp_path / "base")))
    text = run.config.read_text().replace(str(tiny_model_folder), str(model))
    run.config.write_text(text)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"--frozen-base .*: quantized from .*, whose files was another one"):
        finetune(training(run, rows), tmp_path / "run")


@pytest.mark.parametrize("target", ["gguf", "hf"])
def test_targets_without_adapters_refuse_them(trained: Run, target: str) -> None:
    with pytest.raises(ExportError, match="adapters"):
        qat_edge.export(trained, target=[target], context_length=64, ptq=("none",))


def test_the_adapter_of_another_training_is_refused(base: Run, trained: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    other = tmp_path / "rows.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in plain_rows(30)))
    finetune(training(base, other), tmp_path / "other")
    shutil.rmtree(run.adapter)
    shutil.copytree(tmp_path / "other" / "adapter", run.adapter)
    with pytest.raises(RunError, match=r"'data\.sha256' is"):
        quantize(run, QuantizeOptions(), force=True)


def test_another_base_in_the_place_of_the_first_is_named(
    base: Run, trained: Run, rows: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    other = QuantizeOptions(method="gptq", calibration_data=str(rows), calibration_tokens=300, rotate=True)
    quantize_model(str(tiny_model_folder), tmp_path / "base", other)
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    shutil.rmtree(run.adapter)
    text = run.config.read_text()
    run.config.write_text(text.replace(str(base.path), str(tmp_path / "base")))
    with pytest.raises(RunError, match=r"--frozen-base .*: not the base that the run began with.*another --ptq-init"):
        finetune(training(Run.open(tmp_path / "base"), rows), run.path, resume=True)


def test_verbs_for_merged_adapters_refuse_the_run(trained: Run) -> None:
    with pytest.raises(RunError, match=r"whose bits stay as they are. Choose bits for another base"):
        sensitivity(trained, SensitivityOptions())
    answer = cli("validate", trained.path, "--error-budget", "--force")
    assert answer.exit_code == 2 and "--error-budget: the adapters of" in answer.output
    with pytest.raises(RunError, match=r"its adapters belong to the frozen weights of .*, and compare deploys"):
        compare(trained, CompareOptions(), None)


def test_damaged_adapters_of_a_checkpoint_are_named(trained: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.quantized, tmp_path / "quantized"))
    path = folder / ADAPTER / WEIGHTS
    tensors = load_file(path)
    renamed = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in tensors.items()}
    save_file(renamed, path, {"format": "pt"})
    with pytest.raises(ExportError, match=r"no linear layer model.layers.9.*, so the adapter is of another model"):
        frozen.load(folder)
    path.write_bytes(b"damaged")
    with pytest.raises(ExportError, match=r"adapter_model.safetensors: cannot be read"):
        frozen.load(folder)
