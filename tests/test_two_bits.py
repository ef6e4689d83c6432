"""The whole line at 2 bits: train, freeze, export to ONNX, verify; refusals before any work."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from conftest import Recorder, plain_rows, short_training
from qat_edge import config, progress
from qat_edge.cli import commands
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.manifest import read_manifest, write_manifest
from qat_edge.models.merge import fake_quantized_model, merged_model
from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions
from qat_edge.quant import frozen
from qat_edge.run import Run
from qat_edge.train.option_checks import check_combination, check_export_section
from qat_edge.train.setup import require_width
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize, quantize_if_missing
from qat_edge.verbs.verify import require_equal, verify

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOptions:
    folder = tmp_path_factory.mktemp("two_bits")
    (folder / "bits.yaml").write_text(yaml.safe_dump({"bits": {UP: 8, UP.replace("up", "down"): 4}}))
    bits = str(folder / "bits.yaml")
    return short_training(tiny_model_folder, folder, plain_rows(40), steps=4, weight_bits=2, bits=bits)


@pytest.fixture(scope="module")
def trained(base: FinetuneOptions, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("trained") / "run"
    finetune(base, out)
    return Run(out)


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(trained.path, tmp_path / "run")))


def widths(folder: Path) -> dict[str, tuple[int, str]]:
    return {name: (spec.bits, spec.levels) for name, spec in frozen.read_scheme(folder).linears.items()}


def test_what_was_trained_is_what_the_onnx_folder_holds_and_computes(run: Run) -> None:
    metadata = read_manifest(run.adapter)
    assert (metadata["weight_bits"], metadata["weight_levels"]) == (2, "seq")
    written = export(run, ExportOptions(target=("onnx",), ptq=("rtn",), context_length=64))
    assert {w.target for w in written} == {"onnx"} and not any(w.parity.fault for w in written)
    results = verify(run, [])
    require_equal(results)
    assert [(r.linears, r.linears_equal) for r in results] == [(14, 14)] * 2
    for folder in (run.quantized, run.ptq("rtn").quantized):
        found = widths(folder)
        assert (found[UP], found[UP.replace("up", "down")]) == ((8, "integer"), (4, "integer"))
        assert sorted(found.values()).count((2, "seq")) == 12


def test_the_frozen_checkpoint_computes_what_training_did(run: Run) -> None:
    import torch

    quantize(run, QuantizeOptions())
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        expected, found = fake_quantized_model(run.adapter)(ids).logits, frozen.load(run.quantized)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_ptq_alone_takes_other_bits_than_the_training(run: Run) -> None:
    given = QuantizeOptions(method="hqq", weight_bits=2, weight_levels="integer")
    assert "14 int2 (group 32, integer levels)" in quantize(run, given).weights
    assert set(widths(run.ptq("hqq").quantized).values()) == {(2, "integer")}
    four = quantize(run, QuantizeOptions(method="rtn", weight_bits=4))
    assert "14 int4" in four.weights
    levels = quantize(run, QuantizeOptions(method="awq", weight_levels="integer", calibration_tokens=300))
    assert "12 int2 (group 32, integer levels), 1 int4" in levels.weights, "the bits of single layers are kept"


def test_a_checkpoint_of_an_earlier_version_is_kept(run: Run) -> None:
    """Its manifest does not mention options that did not exist."""
    quantize(run, QuantizeOptions(method="rtn"))
    folder = run.ptq("rtn").quantized
    manifest = read_manifest(folder)
    entries = {k: v for k, v in manifest.items() if k not in ("kind", "files", "libraries", "qat_edge", "created")}
    entries["options"] = {k: v for k, v in entries["options"].items() if not k.startswith("weight_")}
    (folder / "manifest.json").unlink()
    write_manifest(folder, "quantized", **entries)
    assert quantize(run, QuantizeOptions(method="rtn")).wall_s == 0.0


def test_a_pte_is_refused_by_name_before_anything_is_frozen(run: Run, tmp_path: Path) -> None:
    for target in (("executorch",), ("executorch", "onnx")):
        with pytest.raises(UsageError, match="--target executorch: ExecuTorch has no operator for 2-bit weights") as e:
            export(run, ExportOptions(target=target))
        assert f"was trained with. Run `qat-edge export {run.path} --target onnx`." in str(e.value)
    assert not run.quantized.exists()

    # A variant with bits of its own, of a run that has others.
    quantize(run, QuantizeOptions(method="rtn", weight_bits=4))
    quantize_if_missing(run, "qat")
    with pytest.raises(UsageError, match="was trained with"):
        export(run, ExportOptions(target=("executorch",), ptq=("rtn",)))


def test_the_exporter_itself_refuses_such_a_checkpoint(run: Run, tmp_path: Path) -> None:
    from qat_edge.errors import ExportError
    from qat_edge_exporters.targets import target_named

    quantize(run, QuantizeOptions())
    with pytest.raises(
        ExportError, match=r"2-bit weights of this checkpoint\. Leave this target out with --target onnx"
    ):
        target_named("executorch").export(run.quantized, tmp_path, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 4, "bits": None, "weight_levels": "seq"}, "--weight-levels seq: only 2-bit weights"),
        ({"weight_bits": 4, "weight_levels": "integer"}, "--weight-levels integer: only 2-bit weights"),
        ({"weight_bits": 4, "bits": "/nowhere.yaml", "weight_levels": "seq"}, "--bits /nowhere.yaml: no such file"),
    ],
)
def test_levels_without_two_bits_are_refused(base: FinetuneOptions, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_combination(replace(base, **changes))
    check_combination(replace(base, weight_levels="integer"))


@pytest.fixture
def integer_bits(tmp_path: Path) -> str:
    """A file of bits that were chosen at integer levels."""
    path = tmp_path / "integer.yaml"
    path.write_text(yaml.safe_dump({"levels": "integer", "bits": {UP: 2}}))
    return str(path)


def test_training_takes_the_levels_of_the_file_and_keeps_them(
    base: FinetuneOptions, integer_bits: str, tmp_path: Path
) -> None:
    options, run = replace(base, steps=1, ptq_init="hqq", weight_bits=4, bits=integer_bits), Run(tmp_path / "run")
    finetune(options, run.path)
    assert read_manifest(run.adapter)["weight_levels"] == "integer"
    quantize(run, QuantizeOptions())
    assert widths(run.quantized)[UP] == (2, "integer")
    Path(integer_bits).write_text(yaml.safe_dump({"levels": "seq", "bits": {UP: 2}}))
    with pytest.raises(RunError, match="--resume: weight_levels changed since"):
        finetune(options, run.path, resume=True)


def test_ptq_takes_the_levels_of_the_file(run: Run, integer_bits: str) -> None:
    quantize(run, QuantizeOptions(method="rtn", weight_bits=4, bits=integer_bits))
    assert widths(run.ptq("rtn").quantized)[UP] == (2, "integer")


def test_other_levels_than_those_of_the_file_are_refused(base: FinetuneOptions, run: Run, integer_bits: str) -> None:
    message = rf"--weight-levels seq and --bits {integer_bits}: the file has 'levels: integer'"
    with pytest.raises(UsageError, match=message):
        check_combination(replace(base, bits=integer_bits, weight_levels="seq"))
    with pytest.raises(UsageError, match=message):
        quantize(run, QuantizeOptions(method="rtn", bits=integer_bits, weight_levels="seq"))
    check_combination(replace(base, bits=integer_bits, weight_levels="integer"))


@pytest.mark.parametrize("name", ["weight_bits", "weight_levels"])
def test_the_trained_model_keeps_its_bits(run: Run, name: str) -> None:
    given = replace(QuantizeOptions(), **{name: 2 if name == "weight_bits" else "seq"})
    with pytest.raises(UsageError, match=f"{config.flag_name(name)} and --method qat"):
        quantize(run, given)


def test_levels_for_ptq_of_more_bits_are_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="--weight-levels seq: only 2-bit weights have a choice"):
        quantize(run, QuantizeOptions(method="rtn", weight_bits=4, weight_levels="seq"))


@pytest.mark.parametrize(("target", "refused"), [(["executorch"], True), (["executorch", "onnx"], False)])
@pytest.mark.parametrize("by_file", [False, True])
def test_a_file_that_exports_to_a_pte_alone_is_refused_before_training(
    base: FinetuneOptions, tmp_path: Path, target: list[str], refused: bool, by_file: bool
) -> None:
    (tmp_path / "bits.yaml").write_text(yaml.safe_dump({"bits": {UP: 2}}))
    path = tmp_path / "config.yaml"
    options = replace(base, bits=str(tmp_path / "bits.yaml"), weight_bits=4 if by_file else 2)
    exporting = ExportOptions(target=tuple(target))
    if not refused:
        return check_export_section(options, exporting, path)
    with pytest.raises(UsageError, match="ExecuTorch has no operator for 2-bit weights") as caught:
        check_export_section(options, exporting, path)
    assert str(path) in str(caught.value)
    assert ("--bits" if by_file else "--weight-bits 2") in str(caught.value)


def test_the_command_checks_the_file_first(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {"finetune": {"model": "none", "data": "none", "weight_bits": 2}, "export": {"target": ["executorch"]}}
        )
    )
    result = CliRunner().invoke(commands.main, ["finetune", "--config", str(path), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "2-bit weights" in result.output
    assert not (tmp_path / "run").exists()


def test_a_model_that_onnx_cannot_express_is_not_trained_at_two_bits(base: FinetuneOptions) -> None:
    with pytest.raises(ModelError, match=r"weights of 2 bits can be exported to onnx alone.* its attention"):
        require_width(base, {"onnx": "its attention is not causal."})
    require_width(base, {"executorch": "its attention is not causal."})
    require_width(replace(base, weight_bits=4, bits=None), {"onnx": "its attention is not causal."})


def test_training_says_what_it_quantizes_to(base: FinetuneOptions, tmp_path: Path) -> None:
    recorder = Recorder()
    with progress.report_to(recorder):
        finetune(replace(base, steps=1, weight_levels="integer", ptq_init="hqq"), tmp_path / "run")
    assert any("12 int2 (group 32, integer levels)" in line for line in recorder.lines)
    assert merged_model(tmp_path / "run" / "adapter").scheme.weights[UP].bits == 8
