"""Models that were not trained here go the whole line: quantized by PTQ, exported, verified, validated and reported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import qat_edge
from conftest import plain_rows
from qat_edge.cli import commands
from qat_edge.errors import ExportError, RunError, UsageError
from qat_edge.manifest import MANIFEST
from qat_edge.models.merge import merged_model
from qat_edge.options import FinetuneOptions, QuantizeOptions
from qat_edge.quant.ptq.method_names import PTQ_METHODS
from qat_edge.run import Run
from qat_edge.train.option_checks import check_combination
from qat_edge.verbs import compare
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.quantize_model import quantize_model

TOKENS = 300


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in plain_rows(40)))
    return path


def options(method: str, rows: Path, **changes: object) -> QuantizeOptions:
    made = QuantizeOptions(method=method, calibration_data=str(rows), calibration_tokens=TOKENS)
    if method in ("rtn", "hqq"):
        made = replace(made, calibration_tokens=None)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def quantized(tiny_model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("untrained") / "run"
    quantize_model(str(tiny_model_folder), out, options("coordinate-descent", rows, rotate=True))
    return Run.open(out)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(commands.main, [str(argument) for argument in arguments])


# --- what is frozen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_the_codes_are_those_of_the_method_on_the_plain_model(
    method: str, tiny_model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    done = quantize_model(str(tiny_model_folder), tmp_path / "run", options(method, rows))
    run = Run.open(tmp_path / "run")
    assert done.method == method and done.folder == run.quantized
    # The other way to the same codes: the FP32 reference of the run, quantized as that of any run.
    variant = options(method, rows, calibration_data=None)
    other = load_file(quantize(run, variant).folder / "model.safetensors")
    ours = load_file(run.quantized / "model.safetensors")
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, other[name]), name


def test_the_reference_is_the_model_itself(quantized: Run, tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    for name, tensor in merged_model(quantized.reference).model.state_dict().items():
        assert torch.equal(tensor, plain[name]), name


def test_bits_and_groups_are_those_of_the_flags(tiny_model_folder: Path, rows: Path, tmp_path: Path) -> None:
    flags = ["--group-size", "64", "--embedding-bits", "4", "--head-bits", "4", "--method", "rtn", "--seed", "3"]
    done = cli("quantize", tiny_model_folder, "--out", tmp_path / "run", "--calibration-data", rows, *flags)
    assert done.exit_code == 0, done.output
    trained = Run.open(tmp_path / "run")
    assert "int4 (group 64)" in done.output and "int8" not in done.output.split("Next:")[0].splitlines()[-1]
    assert json.loads((trained.quantized / MANIFEST).read_text())["seed"] == 3


def test_gguf_is_promised_only_where_it_can_hold_the_tables(
    tiny_model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    flags = ["--method", "gptq", "--rotate", "--calibration-data", rows, "--calibration-tokens", TOKENS]
    done = cli("quantize", tiny_model_folder, "--out", tmp_path / "tied", *flags)
    assert "To export it to gguf as well, train with --embedding-bits 8 --head-bits 4" in done.output
    with pytest.raises(ExportError, match="--embedding-bits 8 --head-bits 4"):
        qat_edge.export(tmp_path / "tied", target=["gguf"], context_length=64, ptq=("none",))

    # Nothing is built for the other targets before.
    with pytest.raises(ExportError, match="--embedding-bits 8 --head-bits 4"):
        qat_edge.export(tmp_path / "tied", target=["onnx", "gguf"], context_length=64, ptq=("none",))
    assert not list((tmp_path / "tied").glob("exports/*"))

    done = cli("quantize", tiny_model_folder, "--out", tmp_path / "apart", *flags, "--head-bits", 4)
    assert done.exit_code == 0 and "to gguf" not in done.output
    qat_edge.export(tmp_path / "apart", target=["gguf"], context_length=64, ptq=("none",))


def test_all_formats_are_checked_before_one_is_written(
    quantized: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Path(shutil.copytree(quantized.path, tmp_path / "run")))
    monkeypatch.setattr(
        "qat_edge_exporters.targets.Target.missing_for", lambda self, _: "It lacks it." if self.name == "onnx" else ""
    )
    with pytest.raises(ExportError, match=r"^onnx: It lacks it. Leave it out with --target executorch\."):
        qat_edge.export(run, context_length=64, ptq=("none",))
    assert not list(run.path.glob("exports/*"))


# --- the line ----------------------------------------------------------------------------------------------


def test_every_verb_takes_the_run(quantized: Run, rows: Path, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(quantized.path, tmp_path / "run")))
    qat_edge.export(run, context_length=64, ptq=("rtn",))
    assert all(not result.faults for result in qat_edge.verify(run))
    (report,) = qat_edge.validate(
        run, eval_data=rows, tokens=128, prompts=4, max_new_tokens=4, prefill=8, decode=4, repeats=1, max_kl=10.0,
        error_budget=True,
    )  # fmt: skip
    own = "quantized (coordinate descent)"
    found = [(row.name, row.target) for row in report.measured]
    assert found == [
        ("fp32 model", "torch"), (own, "executorch"), (own, "onnx"), ("ptq (round-to-nearest)", "executorch"),
        ("ptq (round-to-nearest)", "onnx"),
    ]  # fmt: skip
    # Gates check the own model, and what is measured is a rounded copy of the reference.
    assert [gate.measured for gate in report.gates] == [f"{own}, executorch", f"{own}, onnx"]
    assert all(row.agreement is not None and row.agreement.kl_nats > 0 for row in report.measured[1:])
    assert len(report.budgets) == 2

    done = cli("report", run.path)
    assert done.exit_code == 0, done.output
    page = (run.path / "report.html").read_text()
    assert "Coordinate descent (this run)" in page and "relative to the FP32 model" in page
    assert "not trained here" in page and "LoRA of rank" not in page
    body = page.split("<main")[1].split("glossary")[0]
    assert "QAT" not in body.split("<h2>Charts</h2>")[0] and "fine-tune" not in body.split("<h2>Charts</h2>")[0]


def test_a_run_of_lora_alone_is_not_called_qat(quantized: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(quantized.path, tmp_path / "run")))
    text = run.config.read_text()
    assert run.name == "quantized (coordinate descent)" and not run.is_trained
    run.config.write_text(text.replace("steps: 0", "steps: 8").replace("qat_start: null", "qat_start: 8"))
    assert run.name == "quantized (coordinate descent)" and run.is_trained
    run.config.write_text(text.replace("steps: 0", "steps: 8"))
    assert run.name == "qat"


# --- bad input ---------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_before_any_work(tiny_model_folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for flags, expected in {
        (): "--method qat and --out",
        ("--method", "gptq"): "--calibration-data: with --out",
        ("--method", "rtn", "--calibration-data", rows, "--calibration-tokens", 64): "not calibrated",
        ("--method", "hqq", "--calibration-data", rows, "--rotate"): "--rotate and --method hqq",
        ("--method", "gptq", "--calibration-data", tmp_path / "none.jsonl"): "none.jsonl",
    }.items():
        done = cli("quantize", tiny_model_folder, "--out", out, *flags)
        assert done.exit_code in (1, 2) and expected in done.output, done.output
        assert not out.exists()


def test_a_run_is_not_replaced_unless_forced(quantized: Run, tiny_model_folder: Path, rows: Path) -> None:
    with pytest.raises(RunError, match="exists"):
        quantize_model(str(tiny_model_folder), quantized.path, options("rtn", rows))


def test_options_of_a_model_have_no_effect_on_a_run(quantized: Run) -> None:
    with pytest.raises(UsageError, match="--group-size 64: finetune --group-size has decided that"):
        quantize(quantized, QuantizeOptions(method="rtn", group_size=64))


def test_options_of_training_are_refused_without_steps(rows: Path) -> None:
    untrained = FinetuneOptions(model="m", data=str(rows), steps=0)
    check_combination(untrained)
    for name, value in {"learning_rate": 1e-4, "qat_start": 0.5, "lora_rank": 8, "codes": "fixed"}.items():
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} and --steps 0: nothing is trained"):
            check_combination(replace(untrained, **{name: value}))  # type: ignore[arg-type]


def test_compare_needs_a_fine_tune(quantized: Run) -> None:
    with pytest.raises(RunError, match="nothing was trained, so there is no fine-tune to deploy"):
        compare.compare(quantized, compare.CompareOptions(), None)
