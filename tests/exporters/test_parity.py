"""An artifact that computes another function than its checkpoint is refused; a correct one never is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny import CONTEXT, SIZES, TinyExport, freeze, llama
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    MistralConfig,
    OlmoConfig,
    PretrainedConfig,
)

from conftest import Recorder, relist, stored_tensors
from qat_edge import progress
from qat_edge.diagnose import parity
from qat_edge.diagnose.parity import FrozenReference
from qat_edge.errors import ArtifactError, ExportError, RunError
from qat_edge.evaluate.results import Parity
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models.artifact_options import ArtifactOptions, options_of_artifact
from qat_edge.options import ExportOptions
from qat_edge.run import Variant
from qat_edge.verbs.export import export_one
from qat_edge.verbs.verify import NOT_RUN, Verified, conclusion, verify_folder
from qat_edge_exporters.executorch.pte import delegates
from qat_edge_exporters.targets import target_named

BOTH = ("executorch", "onnx")
WINDOW = 8
MIXED_LAYERS = ["sliding_attention", "full_attention"]
OPTIONS = ExportOptions(context_length=CONTEXT)


def gemma3() -> PretrainedConfig:
    return Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=24, layer_types=MIXED_LAYERS)


def gemma2() -> PretrainedConfig:
    return Gemma2Config(
        **SIZES, head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    )


def granite() -> PretrainedConfig:
    return GraniteConfig(
        **SIZES, embedding_multiplier=12.0, attention_multiplier=0.1, residual_multiplier=0.3, logits_scaling=8.0
    )


# Each is exported with one entry of its configuration changed, as an exporter does that ignores or misreads it.
WRONG: dict[str, tuple[Callable[[], PretrainedConfig], dict[str, Any], tuple[str, ...]]] = {
    "epsilon of the norms": (lambda: llama(rms_norm_eps=1e-2), {"rms_norm_eps": 1e-6}, BOTH),
    "base of the rotary angles": (lambda: llama(rope_theta=10000.0), {"rope_theta": 1000.0}, BOTH),
    "activation": (llama, {"hidden_act": "gelu"}, BOTH),
    "missing window": (lambda: MistralConfig(**SIZES, sliding_window=WINDOW), {"sliding_window": None}, BOTH),
    "longer window": (lambda: MistralConfig(**SIZES, sliding_window=WINDOW), {"sliding_window": WINDOW + 1}, BOTH),
    "scale of the attention": (gemma3, {"query_pre_attn_scalar": 16}, BOTH),
    "cap of the logits": (gemma2, {"final_logit_softcapping": None}, BOTH[1:]),
    "cap of the scores": (gemma2, {"attn_logit_softcapping": None}, BOTH[1:]),
    "multiplier of the embeddings": (granite, {"embedding_multiplier": 1.0}, BOTH[:1]),
    "multiplier of the residuals": (granite, {"residual_multiplier": 1.0}, BOTH[:1]),
    "scaling of the logits": (granite, {"logits_scaling": 1.0}, BOTH[:1]),
}  # fmt: skip


def change_config(checkpoint: Path, changes: dict[str, Any]) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    if "rope_theta" in changes:
        config["rope_parameters"]["rope_theta"] = changes["rope_theta"]
    path.write_text(json.dumps(config | changes))


def export_checkpoint(checkpoint: Path, target: str, folder: Path) -> Path:
    folder.mkdir()
    target_named(target).export(checkpoint, folder, CONTEXT)
    return folder


@pytest.mark.parametrize(
    ("fault", "target"), [(fault, target) for fault, (_, _, targets) in WRONG.items() for target in targets]
)
def test_a_function_that_differs_in_one_setting_is_a_fault(fault: str, target: str, tmp_path: Path) -> None:
    config, changes, _ = WRONG[fault]
    freeze(config(), 32, tmp_path / "frozen")
    shutil.copytree(tmp_path / "frozen", tmp_path / "wrong")
    change_config(tmp_path / "wrong", changes)
    folder = export_checkpoint(tmp_path / "wrong", target, tmp_path / "export")
    found = parity.measure(folder, target, FrozenReference(tmp_path / "frozen"), CONTEXT)
    assert "differ from the frozen checkpoint's by more than rounding" in found.fault
    assert found.chance is not None and found.chance > 0.9


# --- export and verify ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """A tiny model exported to both targets; tests copy what they change."""
    made = Variant(tmp_path_factory.mktemp("parity"))
    freeze(llama(), 32, made.quantized)
    reference = FrozenReference(made.quantized)
    for target in BOTH:
        export_one(made, target_named(target), OPTIONS, reference)
    return made


@pytest.mark.parametrize("target", BOTH)
def test_an_export_records_what_was_measured(variant: Variant, target: str) -> None:
    recorded = Parity(**read_manifest(variant.exports / target)["parity"])
    assert recorded.fault == recorded.not_measured == ""
    assert recorded.tokens == parity.PROMPTS * parity.LENGTH and recorded.seconds > 0
    assert recorded.floor_sqnr_db is not None and recorded.floor_kl_nats is not None and recorded.floor_kl_nats > 0
    assert recorded.sqnr_db is None or recorded.sqnr_db > 30
    assert recorded.error_db is not None and recorded.noise_db is not None and recorded.error_db < -30
    assert recorded.chance is not None and recorded.chance < 0.75
    assert "noise floor" in recorded.describe()


def test_the_line_of_an_export_shows_parity(variant: Variant, tmp_path: Path) -> None:
    copy, recorder = Variant(tmp_path), Recorder()
    shutil.copytree(variant.quantized, copy.quantized)
    with progress.report_to(recorder):
        exported = export_one(copy, target_named("onnx"), OPTIONS)
    assert exported.parity.describe() in recorder.lines[-1] and "noise floor" in recorder.lines[-1]


def test_an_artifact_of_another_function_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C14: onnxruntime-genai's builder writes OLMo's layer norms as RMS norms with another epsilon."""
    monkeypatch.setattr("qat_edge_exporters.onnx.onnx_support.missing", lambda config: "")
    variant = Variant(tmp_path)
    freeze(OlmoConfig(**SIZES), 32, variant.quantized)
    with pytest.raises(ExportError) as caught:
        export_one(variant, target_named("onnx"), OPTIONS)
    message = str(caught.value)
    assert "exports/onnx was not written: the artifact does not compute the frozen checkpoint" in message
    assert "From position 0 of a prompt on (read at once)" in message and "noise floor" in message
    assert "first layer that diverges is model.layers.0.self_attn.q_proj: its input differs" in message
    assert "--target executorch" in message
    assert list(variant.exports.iterdir()) == []


def test_an_artifact_that_exists_stays_if_its_replacement_is_refused(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Variant(Path(shutil.copytree(variant.path, tmp_path / "copy")))
    before = (copy.exports / "onnx" / MANIFEST).read_bytes()
    monkeypatch.setattr(parity, "measure", lambda *_: Parity(fault="It is wrong."))
    with pytest.raises(ExportError, match="It is wrong"):
        export_one(copy, target_named("onnx"), OPTIONS)
    assert (copy.exports / "onnx" / MANIFEST).read_bytes() == before


def test_a_checkpoint_with_one_flipped_bit_is_not_exported(variant: Variant, tmp_path: Path) -> None:
    """C22: the file is still readable, and its codes are others."""
    copy = Variant(Path(shutil.copytree(variant.path, tmp_path / "copy")))
    path = copy.quantized / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"quantized is not as it was written: model\.safetensors: changed since"):
        export_one(copy, target_named("onnx"), OPTIONS)


def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    variant = Variant(tmp_path)
    freeze(llama(), 32, variant.quantized)
    with stored_tensors(variant.quantized) as tensors:
        tensors["model.norm.weight"][3] = float("nan")
    relist(variant.quantized)
    with pytest.raises(RunError, match=r"model\.norm\.weight: holds values that are not finite"):
        export_one(variant, target_named("onnx"), OPTIONS)


def test_a_crash_of_the_runtime_is_a_fault_and_not_a_crash_here(variant: Variant, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variant.exports / "executorch", tmp_path / "copy"))
    path = folder / "model.pte"
    path.write_bytes(path.read_bytes()[:-5000])
    found = parity.measure(folder, "executorch", FrozenReference(variant.quantized), CONTEXT)
    assert found.fault.startswith("Its runtime on this machine failed: local: ")


def test_what_cannot_run_here_is_not_measured(variant: Variant, tmp_path: Path) -> None:
    reference = FrozenReference(variant.quantized)
    found = parity.measure(tmp_path, "executorch-vulkan", reference, CONTEXT)
    assert "executorch-vulkan cannot run here" in found.not_measured and found.fault == ""
    assert found.describe().startswith("parity not measured: executorch-vulkan cannot run here")


def test_float_weights_without_codes_are_refused(variant: Variant, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(variant.quantized, tmp_path / "copy"))
    assert parity.not_comparable(copy) == ""
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="has the scheme of a frozen checkpoint, and config"):
        parity.not_comparable(copy)


def test_noise_that_exceeds_the_noise_once_is_no_fault(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    judge = parity._judge

    def unlucky(expected: Any, found: Any, prompts: Any) -> Any:
        judged.append(len(prompts.ids))
        result, _ = judge(expected, found, prompts)
        return result, parity._Suspect("bad luck", prompts.inputs) if len(judged) == 1 else None

    monkeypatch.setattr(parity, "_judge", unlucky)
    found = parity.measure(variant.exports / "onnx", "onnx", FrozenReference(variant.quantized), CONTEXT)
    assert found.fault == "" and judged == [parity.PROMPTS, parity.CONFIRMING_PROMPTS]


def test_codes_on_rounding_ties_are_noise(tmp_path: Path) -> None:
    """Norms of ones after an int8 embedding: the first layer's inputs are integers times one factor."""
    variant = Variant(tmp_path)
    freeze(llama(), 32, variant.quantized)
    with stored_tensors(variant.quantized) as tensors:
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name].fill_(1.0)
    relist(variant.quantized)
    found = export_one(variant, target_named("executorch"), OPTIONS).parity
    assert found.fault == "" and found.chance is not None and found.chance < 0.6


def test_a_window_that_no_prompt_reaches_is_stated(tmp_path: Path) -> None:
    freeze(MistralConfig(**SIZES, sliding_window=100), 32, tmp_path / "frozen")
    reference = FrozenReference(tmp_path / "frozen")
    assert reference.not_reached(128) == "the attention window of 100 tokens"
    assert len(reference.prompt_sets(128, 0, 4)) == 1
    # A context that ends before the window has none.
    assert reference.not_reached(100) == ""


def test_prompts_are_the_same_each_time_and_others_for_the_second_test(variant: Variant) -> None:
    reference = FrozenReference(variant.quantized)
    (first,), (again,), (other,) = (reference.prompt_sets(CONTEXT, seed, 8) for seed in (0, 0, 1))
    assert first == again and first.ids != other.ids
    assert all(len(ids) == parity.LENGTH + 1 and max(ids) < 288 for ids in first.ids)
    assert len({tuple(ids) for ids in first.ids}) == 8


# --- altered artifacts, whose manifests were altered as well ---------------------------------------------------


def altered(variant: Variant, target: str, to: Path) -> Variant:
    """Copy an artifact next to its checkpoint, to be altered."""
    copy = Variant(to)
    shutil.copytree(variant.quantized, copy.quantized)
    shutil.copytree(variant.exports / target, copy.exports / target)
    return copy


def measured(copy: Variant, target: str) -> Parity:
    return parity.measure(copy.exports / target, target, FrozenReference(copy.quantized), CONTEXT)


def test_a_zeroed_norm_in_onnx_is_named(variant: Variant, tmp_path: Path) -> None:
    copy = altered(variant, "onnx", tmp_path)
    name = "model.layers.1.input_layernorm.weight"
    graph = onnx.load(copy.exports / "onnx/model.onnx", load_external_data=False)
    stored = next(i for i in graph.graph.initializer if i.name == name)
    offset = int(next(entry.value for entry in stored.external_data if entry.key == "offset"))
    data = bytearray((copy.exports / "onnx/model.onnx.data").read_bytes())
    data[offset : offset + 4 * 64] = bytes(4 * 64)
    (copy.exports / "onnx/model.onnx.data").write_bytes(data)
    relist(copy.exports / "onnx")
    result = verify_folder(copy.exports / "onnx", "onnx", copy.quantized)
    assert result.faults == [f"{name}: not in the artifact as it was frozen"]
    assert (result.floats, result.floats_equal, result.linears_equal) == (5, 4, 14)
    assert "4 of 5 norms and biases equal" in result.describe()
    assert measured(copy, "onnx").fault


def test_norms_swapped_between_layers_in_onnx_are_named(variant: Variant, tmp_path: Path) -> None:
    copy = altered(variant, "onnx", tmp_path)
    path = copy.exports / "onnx/model.onnx"
    graph = onnx.load(path, load_external_data=False)
    norms = {i.name: i for i in graph.graph.initializer if i.name.endswith("input_layernorm.weight")}
    first, second = norms.values()
    first.name, second.name = second.name, first.name
    path.write_bytes(graph.SerializeToString())
    relist(copy.exports / "onnx")
    faults = verify_folder(copy.exports / "onnx", "onnx", copy.quantized).faults
    assert [fault.partition(":")[0] for fault in faults] == list(norms)


def test_a_zeroed_norm_in_a_pte_is_named(variant: Variant, tmp_path: Path) -> None:
    """The constant gets the hash of its new bytes, so that the file agrees with itself."""
    copy = altered(variant, "executorch", tmp_path)
    path = copy.exports / "executorch/model.pte"
    norm = freeze_norm(copy.quantized, "model.layers.1.input_layernorm.weight")
    old, new = (hashlib.sha256(data).hexdigest().encode() for data in (norm, bytes(len(norm))))
    assert delegates.named_constants(delegates.open_pte(path))[old.decode()] == norm
    data = path.read_bytes()
    path.write_bytes(data.replace(norm, bytes(len(norm))).replace(old, new))
    relist(copy.exports / "executorch")
    result = verify_folder(copy.exports / "executorch", "executorch", copy.quantized)
    assert result.faults == ["model.layers.1.input_layernorm.weight: not in the artifact as it was frozen"]
    assert measured(copy, "executorch").fault


def freeze_norm(quantized: Path, name: str) -> bytes:
    with stored_tensors(quantized) as tensors:
        values: bytes = tensors[name].float().numpy().tobytes()
    relist(quantized)
    return values


def test_a_negated_output_is_a_fault_of_the_run(variant: Variant, tmp_path: Path) -> None:
    copy = altered(variant, "onnx", tmp_path)
    path = copy.exports / "onnx/model.onnx"
    graph = onnx.load(path, load_external_data=False)
    head = next(node for node in graph.graph.node if "logits" in node.output)
    head.output[0] = "positive"
    graph.graph.node.append(onnx.helper.make_node("Neg", ["positive"], ["logits"]))
    path.write_bytes(graph.SerializeToString())
    relist(copy.exports / "onnx")
    # Every tensor of the file is as it was frozen: the graph and the run tell.
    assert "the operator Neg is not one that the exporter writes" in str(
        verify_folder(copy.exports / "onnx", "onnx", copy.quantized).faults
    )
    fault = measured(copy, "onnx").fault
    assert "From position 0 of a prompt on" in fault


def test_nan_logits_are_a_fault_that_names_the_position(variant: Variant, tmp_path: Path) -> None:
    copy = altered(variant, "onnx", tmp_path)
    path = copy.exports / "onnx/model.onnx"
    graph = onnx.load(path, load_external_data=False)
    head = next(node for node in graph.graph.node if "logits" in node.output)
    head.output[0] = "finite"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(np.nan, np.float32), "nothing"))
    graph.graph.node.append(onnx.helper.make_node("Mul", ["finite", "nothing"], ["logits"]))
    path.write_bytes(graph.SerializeToString())
    found = measured(copy, "onnx")
    assert found.fault.startswith("Its logits are not finite at position 0 of the token ids [")


def test_a_constant_that_the_checkpoint_does_not_have_is_a_fault(variant: Variant, tmp_path: Path) -> None:
    copy = altered(variant, "onnx", tmp_path)
    path = copy.exports / "onnx/model.onnx"
    graph = onnx.load(path, load_external_data=False)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(7, dtype=np.float32), "extra"))
    path.write_bytes(graph.SerializeToString())
    relist(copy.exports / "onnx")
    faults = verify_folder(copy.exports / "onnx", "onnx", copy.quantized).faults
    assert faults == ["model.onnx: its constant extra, 7 numbers, is not in the checkpoint"]


def test_another_rotary_frequency_in_a_pte_is_a_fault(variant: Variant, tmp_path: Path) -> None:
    copy = altered(variant, "executorch", tmp_path)
    path = copy.exports / "executorch/model.pte"
    frequencies = (10000.0 ** -(np.arange(8, dtype=np.float64) / 8)).astype(np.float32)
    data, constants = path.read_bytes(), delegates.named_constants(delegates.open_pte(path))
    key, stored = next((k, v) for k, v in constants.items() if len(v) == 32 and np.frombuffer(v, np.float32)[0] == 1)
    np.testing.assert_allclose(np.frombuffer(stored, np.float32), frequencies, rtol=1e-6)
    changed = (np.frombuffer(stored, np.float32) * np.float32(1.5)).tobytes()
    path.write_bytes(data.replace(stored, changed).replace(key.encode(), hashlib.sha256(changed).hexdigest().encode()))
    relist(copy.exports / "executorch")
    faults = verify_folder(copy.exports / "executorch", "executorch", copy.quantized).faults
    assert faults and all("8 numbers, is not in the checkpoint" in fault for fault in faults)
    assert measured(copy, "executorch").fault


@pytest.mark.parametrize("location", ["sub/model.onnx.data", "../model.onnx.data", "/etc/model.onnx.data", "other"])
def test_external_data_elsewhere_is_refused_by_name(variant: Variant, tmp_path: Path, location: str) -> None:
    """C22: a runtime would read the other file, and a reader that takes the name alone would read ours."""
    copy = altered(variant, "onnx", tmp_path)
    path = copy.exports / "onnx/model.onnx"
    graph = onnx.load(path, load_external_data=False)
    stored = next(i for i in graph.graph.initializer if i.name == "model.layers.0.input_layernorm.weight")
    next(entry for entry in stored.external_data if entry.key == "location").value = location
    path.write_bytes(graph.SerializeToString())
    relist(copy.exports / "onnx")
    with pytest.raises(ArtifactError, match=rf"tensor 'model\.layers\.0\.input_layernorm\.weight' is in '{location}'"):
        verify_folder(copy.exports / "onnx", "onnx", copy.quantized)
    assert location in measured(copy, "onnx").fault


def test_external_data_inside_a_node_is_refused_too(variant: Variant, tmp_path: Path) -> None:
    copy = altered(variant, "onnx", tmp_path)
    path = copy.exports / "onnx/model.onnx"
    graph = onnx.load(path, load_external_data=False)
    hidden = onnx.TensorProto(name="hidden", data_type=onnx.TensorProto.FLOAT, dims=[1])
    hidden.data_location = onnx.TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="weights/hidden")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=hidden)], "then", [], [])
    graph.graph.node.append(onnx.helper.make_node("If", ["logits"], ["d"], then_branch=inner, else_branch=inner))
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(ArtifactError, match="tensor 'hidden' is in 'weights/hidden'"):
        target_named("onnx").read(copy.exports / "onnx")


def test_verify_folder_alone_runs_nothing(variant: Variant) -> None:
    result = verify_folder(variant.exports / "onnx", "onnx", variant.quantized)
    assert result.parity == NOT_RUN and result.faults == []
    assert (result.floats, result.floats_equal) == (5, 5)
    assert "5 of 5 norms and biases equal; parity not measured" in result.describe()


def test_a_reference_is_computed_once_for_artifacts_that_round_alike(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = parity.reference.load_dequantized
    monkeypatch.setattr(parity.reference, "load_dequantized", lambda path: loads.append(path) or load(path))
    reference = FrozenReference(variant.quantized)
    for _ in range(2):
        parity.measure(variant.exports / "executorch", "executorch", reference, CONTEXT)
    assert loads == [variant.quantized]


def test_an_int8_cache_is_compared_with_a_rounded_cache(tmp_path: Path) -> None:
    variant = Variant(tmp_path)
    freeze(llama(), 32, variant.quantized)
    exported = export_one(variant, target_named("executorch"), ExportOptions(context_length=CONTEXT, kv_cache="int8"))
    assert exported.parity.fault == "" and exported.parity.tokens == parity.PROMPTS * parity.LENGTH
    assert options_of_artifact(exported.folder) == ArtifactOptions(CONTEXT, int8_cache=True)
    edit_options(exported.folder, kv_cache="float32")
    words = "'options.kv_cache' is 'float32', but the type of keys and values in model.pte is 'int8'"
    with pytest.raises(ArtifactError, match=words):
        options_of_artifact(exported.folder)


def edit_options(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["options"] |= changes
    path.write_text(json.dumps(manifest))


def test_a_portable_artifact_is_run(tmp_path: Path) -> None:
    variant = Variant(tmp_path)
    freeze(llama(), 32, variant.quantized)
    exported = export_one(variant, target_named("executorch"), ExportOptions(context_length=CONTEXT, portable=True))
    assert exported.parity.fault == exported.parity.not_measured == ""
    result = verify_folder(exported.folder, "executorch", variant.quantized)
    assert result.faults == [] and result.floats_equal == result.floats == 5
    assert options_of_artifact(exported.folder) == ArtifactOptions(CONTEXT, int8_cache=False)
    edit_options(exported.folder, portable=False)
    words = "'options.portable' is False, but the value that use_sdpa_with_kv_cache of model.pte gives is True"
    with pytest.raises(ArtifactError, match=words):
        options_of_artifact(exported.folder)


def test_a_context_shorter_than_a_prompt_is_run(tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "frozen")
    made = TinyExport(tmp_path / "frozen", tmp_path / "export", [])
    made.folder.mkdir()
    target_named("onnx").export(made.frozen, made.folder, 6)
    found = parity.measure(made.folder, "onnx", FrozenReference(made.frozen), 6)
    assert found.fault == "" and found.tokens == 6 * parity.PROMPTS


def test_the_conclusion_of_verify_says_what_was_not_run() -> None:
    run = Verified(Path("a"), "onnx", 1, 1, True, True, [], parity=Parity(error_db=-80.0))
    assert conclusion([run]) == "Verified 1 artifact: equal to the frozen checkpoint"
    unrun = Verified(Path("b"), "executorch", 1, 1, True, True, [])
    assert conclusion([run, unrun]).endswith("but what executorch computes was NOT measured")
