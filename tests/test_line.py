"""All verbs in sequence on a tiny model: finetune, export, verify, validate, report, generate, and their errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from conftest import relist, train_run
from qat_edge.cli import commands
from qat_edge.diagnose.error_budget import FROZEN, HOST, PARTS, TRAINED, inputs_rounded_without, part_unquantized
from qat_edge.diagnose.runtime_rounding import BLOCKS, Rounding, emulate_rounding
from qat_edge.errors import ArtifactError, RunError
from qat_edge.evaluate import results
from qat_edge.evaluate.reference import disturbed, load_dequantized, load_exact
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.models.artifact_options import options_of_artifact
from qat_edge.models.merge import float_model, merged_model
from qat_edge.options import EvalOptions, ExportOptions, ValidateOptions
from qat_edge.quant import frozen
from qat_edge.run import Run
from qat_edge.verbs.chat import chat
from qat_edge.verbs.eval import evaluate
from qat_edge.verbs.export import export
from qat_edge.verbs.generate import generate
from qat_edge.verbs.validate import Validated, validate
from qat_edge.verbs.verify import require_equal, verify, verify_folder
from qat_edge_devices.processor import Processor, this_processor
from qat_edge_exporters.onnx import graph_file
from qat_edge_exporters.targets import target_named

TARGETS = ("executorch", "onnx")
LINEARS = 14  # seven in each of two layers
NORMS = {"run": 6, "rtn": 5}  # two in each of two layers, the last one, and in the run the rotation of its output
OPTIONS = ValidateOptions(
    tokens=64, window=64, prompts=3, max_new_tokens=6, threads=1, prefill=8, decode=4, repeats=2,
    max_kl=100.0, min_exact_match=0.5, error_budget=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps, and its round-to-nearest variant, exported to both targets. Tests copy what they change."""
    made = train_run(tiny_model_folder, tmp_path_factory.mktemp("line"))
    export(made, ExportOptions(context_length=128))
    return made


@pytest.fixture(scope="module")
def report(run: Run) -> results.Report:
    return validate(run, OPTIONS)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def copied(run: Run, target: str, tmp_path: Path) -> Iterator[Path]:
    """A copy of an export folder to damage, without its manifest, so that only the contents can reveal the damage."""
    folder = tmp_path / target
    shutil.copytree(run.exports / target, folder)
    (folder / MANIFEST).unlink()
    yield folder


def weights_file(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda p: p.stat().st_size)


# --- export and verify -----------------------------------------------------------------------------------


def test_every_matrix_is_equal_in_every_artifact(run: Run) -> None:
    verified = verify(run, ())
    assert [(v.folder.parent.parent.name, v.target) for v in verified] == [
        ("run", "executorch"), ("run", "onnx"), ("rtn", "executorch"), ("rtn", "onnx"),
    ]  # fmt: skip
    for one in verified:
        assert (one.linears_equal, one.linears, one.embedding_equal, one.head_equal) == (LINEARS, LINEARS, True, True)
        assert one.faults == []
        assert f"{LINEARS} of {LINEARS} linear layers equal" in one.describe()
        norms = NORMS[one.folder.parent.parent.name]
        assert one.floats_equal == one.floats == norms
        assert f"{norms} of {norms} norms and biases equal" in one.describe()
        assert one.parity.tokens > 0 and one.parity.fault == one.parity.not_measured == ""
    require_equal(verified)
    recorded = json.loads(run.verified.read_text())
    assert [row["parity"]["tokens"] for row in recorded] == [one.parity.tokens for one in verified]
    assert all(row["parity_line"].startswith("parity ") for row in recorded)


def test_both_targets_contain_the_same_codes(run: Run) -> None:
    first, second = (target_named(t).read(run.exports / t).weights for t in TARGETS)
    assert set(first) == set(second)
    assert all(np.array_equal(first[name].codes, second[name].codes) for name in first)


def test_the_run_and_round_to_nearest_differ(run: Run, target: str) -> None:
    found = verify_folder(run.ptq("rtn").exports / target, target, run.quantized)
    assert found.linears_equal < LINEARS and found.faults != []


def test_a_flipped_nibble_is_reported_with_its_position(run: Run, target: str, copied: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    codes = frozen.read_weights(run.quantized)[name].codes.numpy()
    packed = ((codes[:, 1::2] + 8) << 4 | (codes[:, ::2] + 8)).astype(np.uint8)  # low nibble first, value q + 8
    path = weights_file(copied)
    content = bytearray(path.read_bytes())
    start = content.find(packed.tobytes())
    assert start > 0, "the file contains the packed matrix as it was frozen"
    content[start + 5 * packed.shape[1] + 3] ^= 0x10  # row 5, column 7
    path.write_bytes(content)
    found = verify_folder(copied, target, run.quantized)
    assert found.linears_equal == LINEARS - 1
    assert any(f"{name}: 1 of {codes.size} codes differ, first at row 5, column 7" in fault for fault in found.faults)
    with pytest.raises(ArtifactError, match=name):
        require_equal([found])


def test_a_truncated_file_is_an_error_that_names_the_file(run: Run, target: str, copied: Path) -> None:
    path = weights_file(copied)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=path.name):
        verify_folder(copied, target, run.quantized)


def test_a_missing_constant_method_is_reported(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run.exports / "executorch", folder)
    path = folder / "model.pte"
    content = path.read_bytes()
    assert content.count(b"get_max_seq_len\0") == 1
    path.write_bytes(content.replace(b"get_max_seq_len\0", b"got_max_seq_len\0"))
    assert any("get_max_seq_len" in fault for fault in verify_folder(folder, "executorch", run.quantized).faults)


def test_a_wrong_or_missing_tokenizer_is_reported(run: Run, target: str, copied: Path) -> None:
    path = copied / "tokenizer.json"
    path.write_text(path.read_text().replace('"th"', '"ht"', 1))
    faults = verify_folder(copied, target, run.quantized).faults
    assert faults == ["tokenizer.json: not the tokenizer the model was trained with"]
    path.unlink()
    assert any("tokenizer.json: missing" in f for f in verify_folder(copied, target, run.quantized).faults)


def test_a_file_changed_after_the_export_is_reported(run: Run, target: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run.exports / target, folder)
    with (folder / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert any("changed since it was exported" in f for f in verify_folder(folder, target, run.quantized).faults)


def flip(path: Path) -> None:
    """Flip one bit in the last tensor of a file."""
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def test_an_artifact_that_was_changed_is_not_run(run: Run, target: str, tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "ptq", "reports", "logs"))
    flip(weights_file(copy.exports / target))
    changed = rf"exports/{target} is not as it was written: model\.\S+: changed since it was written"
    with pytest.raises(RunError, match=changed):
        generate(copy, "hello", target, lambda text: None, max_new_tokens=1)
    with pytest.raises(RunError, match=changed):
        validate(copy, dataclasses.replace(OPTIONS, target=(target,)))


def record(folder: Path, **options: Any) -> None:
    """Edit options in the manifest of an artifact, and list its files again."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["options"] |= options
    path.write_text(json.dumps(manifest))
    relist(folder)


OTHER_OPTIONS = {
    "context_length": (
        64, {"executorch": "get_max_context_len of model.pte", "onnx": "model.context_length of genai_config.json"}, 128
    ),
    "kv_cache": (
        "int8",
        {"executorch": "the type of keys and values in model.pte", "onnx": "the type of past_key_values.0.key in"},
        "float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_options_that_only_the_manifest_has_are_refused(run: Run, target: str, name: str, tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "ptq", "reports", "logs"))
    value, where, held = OTHER_OPTIONS[name]
    record(copy.exports / target, **{name: value})
    uses: dict[str, Any] = {
        "verify": lambda: require_equal(verify(copy, (target,))),
        "validate": lambda: validate(copy, dataclasses.replace(OPTIONS, target=(target,))),
        "generate": lambda: generate(copy, "hello", target, lambda text: None, max_new_tokens=1),
        "chat": lambda: chat(copy, [], target, lambda text: None),
        "eval": lambda: evaluate(copy, EvalOptions(task="gsm8k", context_length=32), (target,)),
    }
    for verb, use in uses.items():
        with pytest.raises(ArtifactError) as caught:
            use()
        message = str(caught.value)
        assert f"exports/{target}/manifest.json: 'options.{name}' is {value!r}, but {where[target]}" in message, verb
        assert f" is {held!r}. Export again, or restore the files." in message, verb
    wanted = ExportOptions(target=(target,), ptq=("none",), context_length=64 if name == "context_length" else 128)
    with pytest.raises(RunError, match="is not what this command would write"):
        export(copy, wanted)


def test_prompts_that_only_the_manifest_has_are_a_fault(run: Run, target: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.exports / target, tmp_path / target))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["conversation"] = {"template_arguments": {"enable_thinking": True}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (fault,) = verify_folder(folder, target, run.quantized).faults
    assert fault.startswith("manifest.json: its 'conversation'")


def edit_graph(folder: Path, edit: Any) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit({entry.name: entry for entry in model.graph.input})
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def float16_values(inputs: dict[str, Any]) -> None:
    inputs["past_key_values.1.value"].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def more_heads(inputs: dict[str, Any]) -> None:
    inputs["past_key_values.1.key"].type.tensor_type.shape.dim[1].dim_value = 4


def other_name(inputs: dict[str, Any]) -> None:
    inputs["past_key_values.1.key"].name = "past_key_values.2.key"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            float16_values,
            "'options.kv_cache' is 'float32', but the type of past_key_values.1.value in model.onnx is ",
        ),
        (more_heads, r"model\.onnx: past_key_values\.1\.key has the shape \[0, 4, 0, 0\], but .* head_size 16"),
        (other_name, r"model\.onnx: no input past_key_values\.1\.key, though genai_config\.json has that layer"),
    ],
)
def test_a_graph_with_another_cache_is_refused(run: Run, edit: Any, message: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.exports / "onnx", tmp_path / "onnx"))
    edit_graph(folder, edit)
    with pytest.raises(ArtifactError, match=message):
        options_of_artifact(folder)


@pytest.mark.parametrize("part", ["adapter", "quantized"])
def test_a_folder_that_was_changed_is_not_exported(run: Run, part: str, tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "ptq", "exports", "logs"))
    if part == "adapter":
        shutil.rmtree(copy.quantized)
    flip(next((copy.path / part).glob("*.safetensors")))
    with pytest.raises(RunError, match=rf"run/{part} is not as it was written: \S+\.safetensors: changed since"):
        export(copy, ExportOptions(target=("onnx",), context_length=128, ptq=("none",)))
    assert not (copy.exports / "onnx").exists()


def test_verify_refuses_a_changed_checkpoint(run: Run, tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "ptq", "reports", "logs"))
    flip(copy.quantized / "model.safetensors")
    with pytest.raises(RunError, match="run/quantized is not as it was written"):
        verify(copy, ())


def test_verify_fails_on_an_artifact_that_computes_something_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_edge.diagnose.parity.measure", lambda *_: results.Parity(fault="It is another function."))
    before = run.verified.read_bytes() if run.verified.is_file() else None
    answer = CliRunner().invoke(commands.main, ["verify", str(run.path), "--target", "onnx"])
    assert answer.exit_code == 1
    assert "parity FAILED" in answer.output
    assert "It does not compute the frozen checkpoint. It is another function." in " ".join(answer.output.split())
    if before is not None:
        run.verified.write_bytes(before)


def test_manifests_record_what_was_exported(run: Run, target: str) -> None:
    manifest = read_manifest(run.exports / target)
    assert manifest["kind"] == "export" and manifest["target"] == target
    assert manifest["options"]["context_length"] == 128
    assert set(manifest["files"]) == {p.name for p in (run.exports / target).iterdir()} - {MANIFEST}


def test_exporting_again_keeps_what_is_current(run: Run) -> None:
    before = [(run.exports / target / MANIFEST).read_bytes() for target in TARGETS]
    assert export(run, ExportOptions(context_length=128)) == []
    assert [(run.exports / target / MANIFEST).read_bytes() for target in TARGETS] == before


def test_exporting_with_other_options_needs_force(run: Run) -> None:
    with pytest.raises(RunError, match="--force"):
        export(run, ExportOptions(context_length=64))


def test_a_killed_export_leaves_no_artifact(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "exports")
    command = [sys.executable, "-m", "qat_edge", "export", str(copy), "--target", "executorch", "--ptq", "none"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(copy.glob("exports/.executorch.*")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the export ended before it was killed"
    assert not (copy / "exports" / "executorch").exists()
    assert Run(copy).targets() == []


# --- the frozen checkpoint and its faster equivalent -------------------------------------------------------


def test_the_dequantized_model_equals_the_frozen_one(run: Run) -> None:
    ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    exact, plain = load_exact(run.quantized), frozen.load(run.quantized)
    with torch.no_grad():
        expected = plain(ids).logits
        torch.testing.assert_close(exact(ids).logits, expected, rtol=0, atol=0)
        with disturbed(exact):
            noisy = exact(ids).logits
        torch.testing.assert_close(exact(ids).logits, expected, rtol=0, atol=0)
    assert not torch.equal(noisy, expected)


# --- validate, report, generate ----------------------------------------------------------------------------


def test_everything_is_measured(report: results.Report) -> None:
    assert [(m.name, m.target) for m in report.measured] == [
        ("fp32 base", "torch"), ("fp32 fine-tuned", "torch"), ("qat", "executorch"), ("qat", "onnx"),
        ("ptq (round-to-nearest)", "executorch"), ("ptq (round-to-nearest)", "onnx"),
    ]  # fmt: skip
    assert set(report.identities) == {"tokens", "prompts", "reference"}
    assert report.tokens == OPTIONS.tokens == report.measured[0].agreement.tokens  # type: ignore[union-attr]
    for m in report.measured[2:]:
        assert m.agreement is not None and m.speed is not None and m.load_ms is not None
        assert m.prompts == 3 and m.exact_match is not None and 0 <= m.exact_match <= 1
        assert m.same_answers in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
        assert (m.first_divergence is None) is (m.same_answers == 1)
        assert m.speed.decode.least <= m.speed.decode.median <= m.speed.decode.greatest
        assert m.memory_bytes is not None and m.runtime_bytes is not None and m.memory_bytes >= m.runtime_bytes > 0
        assert {"linears", "scales", "embedding", "head", "graph", "tokenizer"} <= set(m.size_bytes)


def test_sizes_by_part_add_up_to_the_folder(run: Run, report: results.Report) -> None:
    for m in report.measured[2:]:
        variant = run if m.name == "qat" else run.ptq("rtn")
        files = sum(p.stat().st_size for p in (variant.exports / m.target).iterdir() if p.name != MANIFEST)
        assert m.total_bytes == files


def test_executorch_equals_the_frozen_checkpoint_down_to_the_noise_floor(report: results.Report) -> None:
    qat = next(m for m in report.measured if (m.name, m.target) == ("qat", "executorch"))
    # The logits of a random model are so close that even the noise floor changes the top token now and then.
    assert qat.parity is not None and qat.parity.top1 >= report.noise_floor.top1 - 1 / report.tokens
    # Two layers: 1e-12 measured; one flipped int8 activation costs about 1e-6.
    assert qat.parity.kl_nats < 1e-4


def test_the_error_budget_has_every_step(report: results.Report) -> None:
    assert [budget.target for budget in report.budgets] == list(TARGETS)
    for budget in report.budgets:
        steps = {step.name: step for step in budget.steps}
        blocks = [BLOCKS] if budget.target == "onnx" and this_processor() is Processor.X86 else []
        assert list(steps) == ["FP32 base", "FP32 fine-tuned", TRAINED, FROZEN, *blocks, HOST]
        # The trained forward and the frozen checkpoint are equal, bit for bit.
        assert steps[FROZEN].change == results.Agreement(report.tokens, 0.0, 1.0, None)
        assert budget.frozen_divergence == ""
        assert steps[FROZEN].perplexity == steps[TRAINED].perplexity
        shipped = next(m for m in report.measured if (m.name, m.target) == ("qat", budget.target))
        assert (steps[HOST].perplexity, steps[HOST].agreement) == (shipped.perplexity, shipped.agreement)
        assert not blocks or steps[HOST].change.kl_nats < steps[BLOCKS].change.kl_nats  # type: ignore[union-attr]
        assert len(budget.floor) == len(budget.floor_nats) == 3 and budget.floor[0] == report.noise_floor


def test_neither_runtime_differs_by_more_than_rounding(report: results.Report) -> None:
    assert [(b.target, b.fault_test.exceeds_noise, b.fault_test.location) for b in report.budgets] == [
        (t, False, "") for t in TARGETS
    ]


def test_with_all_parts_unquantized_the_checkpoint_is_the_fine_tune(run: Run, report: results.Report) -> None:
    scheme = frozen.read_scheme(run.quantized)
    model, names = load_dequantized(run.quantized)
    tuned = float_model(run.reference, run.quantized)
    ids = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ExitStack() as stack:
        expected = merged_model(run.reference).model(ids).logits
        torch.testing.assert_close(tuned(ids).logits, expected, rtol=1e-3, atol=1e-4)  # in a rotated basis
        with emulate_rounding(model, names, Rounding()):
            before = model(ids).logits
        # With one part unquantized, the model is no further from the fine-tune than with all of them quantized.
        for part in PARTS:
            with (
                part_unquantized(model, tuned, scheme, part),
                emulate_rounding(model, inputs_rounded_without(names, scheme, part), Rounding()),
            ):
                assert (model(ids).logits - expected).norm() < 1.2 * (before - expected).norm(), part
        for part in PARTS:
            stack.enter_context(part_unquantized(model, tuned, scheme, part))
        torch.testing.assert_close(model(ids).logits, tuned(ids).logits, rtol=0, atol=0)
        stack.close()
        with emulate_rounding(model, names, Rounding()):
            torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert inputs_rounded_without(names, scheme, "head") == [name for name in names if name != scheme.head]
    assert inputs_rounded_without(names, scheme, "activations") == [scheme.head]
    assert inputs_rounded_without(names, scheme, "weights") == names
    assert [part.name for part in report.budgets[0].parts] == list(PARTS)


def test_a_doubled_scale_in_a_file_is_a_fault_and_its_weight_is_named(run: Run, tmp_path: Path) -> None:
    name, copy = "model.layers.1.mlp.up_proj", Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "ptq", "executorch", "logs"))
    path = weights_file(copy.exports / "onnx")
    scales = frozen.read_weights(run.quantized)[name].scales.float().numpy()
    content = bytearray(path.read_bytes())
    start = content.find(scales.tobytes())
    assert start > 0, "the file contains the scales as they were frozen"
    scales[5, 1] *= 2
    content[start : start + scales.nbytes] = scales.tobytes()
    path.write_bytes(content)
    relist(copy.exports / "onnx")
    (budget,) = validate(copy, dataclasses.replace(OPTIONS, prompts=0, min_exact_match=None), force=True).budgets
    assert budget.fault_test.exceeds_noise and budget.fault_test.position == 0
    assert f"{name}: 1 scale differs, first at row 5, group 1" in budget.fault_test.location


def test_a_wrong_rotary_angle_in_a_file_is_a_fault_and_its_layer_is_named(run: Run, tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "ptq", "executorch", "logs"))
    source, folder = run.exports / "onnx", copy.exports / "onnx"
    graph = graph_file.load_graph(source / "model.onnx")
    tables = {t.name: np.array(graph_file.tensor(t, source)) for t in graph.graph.initializer if t.name == "cos_cache"}
    tables["cos_cache"][:, 1] = 1.0
    graph_file.save(graph, tables, source, folder)
    relist(folder)
    (budget,) = validate(copy, dataclasses.replace(OPTIONS, prompts=0, min_exact_match=None), force=True).budgets
    assert budget.fault_test.exceeds_noise and budget.fault_test.position != 0
    location = budget.fault_test.location  # only the file's codes and scales are those that were frozen
    assert "The file differs from the frozen checkpoint: model.onnx" in location
    assert "first layer that diverges is model.layers.0.self_attn.o_proj: its input differs" in location


def test_a_report_survives_its_file(run: Run, report: results.Report) -> None:
    assert results.load(run.reports / "local.json") == report


def test_figures_name_the_artifact_that_was_measured(run: Run, report: results.Report) -> None:
    exports = {variant.name: variant.exports for variant in run.variants()}
    rows = [row for row in report.measured if row.target != "torch"]
    assert rows
    for row in rows:
        assert row.artifact_sha256 == sha256(exports[row.name] / row.target / MANIFEST)


def test_measuring_again_needs_force(run: Run, report: results.Report) -> None:
    with pytest.raises(RunError, match="--force"):
        validate(run, OPTIONS)


def test_gates_set_the_exit_code(run: Run, report: results.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(g.flag, g.passed) for g in report.gates] == [("--max-kl", True), ("--min-exact-match", False)] * 2
    monkeypatch.setattr("qat_edge.verbs.validate.validate_devices", lambda *_, **__: Validated([report], {}))
    missed = CliRunner().invoke(commands.main, ["validate", str(run.path)])
    assert missed.exit_code == 1 and "2 of 4 gates missed" in missed.output
    assert "--min-exact-match 0.5, measured 0" in missed.output


def test_the_report_is_written(run: Run, report: results.Report) -> None:
    written = CliRunner().invoke(commands.main, ["report", str(run.path)])
    assert written.exit_code == 0, written.output
    assert "<html" in run.report_html.read_text()
    (device,) = json.loads((run.path / "report.json").read_text())["devices"]
    assert set(device["budgets"][0]["judged"]) == {"beyond", "chance", "position", "where"}, "keys of the file format"


@pytest.mark.parametrize("source", ["torch", *TARGETS])
def test_every_form_of_the_model_generates(run: Run, source: str) -> None:
    arguments = ["generate", str(run.path), "say 3", "--from", source, "--max-new-tokens", "4"]
    answer = subprocess.run([sys.executable, "-m", "qat_edge", *arguments], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("\n")
    assert "PyTorchObserver" not in answer.stdout  # logs of the C++ runtime are not part of the output


@pytest.mark.parametrize("target", TARGETS)
def test_a_prompt_longer_than_the_context_is_a_usage_error(run: Run, target: str) -> None:
    answer = CliRunner().invoke(commands.main, ["generate", str(run.path), "long " * 200, "--from", target])
    assert answer.exit_code == 2 and "holds 128 with its answer" in answer.output, answer.output


def test_a_stale_artifact_is_not_measured(run: Run, report: results.Report, tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    with (copy.quantized / MANIFEST).open("a") as file:
        file.write("\n")
    with pytest.raises(RunError, match="exported from an earlier"):
        validate(copy, OPTIONS, force=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("exports", "nothing exported yet"), ("adapter", "although the training is finished")],
)
def test_what_is_missing_is_named(run: Run, tmp_path: Path, damage: str, message: str) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.path, copy.path, ignore=shutil.ignore_patterns("checkpoints", "ptq"))
    for part in ("exports", "quantized", damage):
        shutil.rmtree(copy.path / part, ignore_errors=True)
    verbs: dict[str, Any] = {"exports": "verify", "adapter": "export"}
    answer = CliRunner().invoke(commands.main, [verbs[damage], str(copy.path)])
    assert answer.exit_code == 1 and message in answer.output, answer.output
