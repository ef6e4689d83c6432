"""Initialization of QAT: weights that a PTQ method prepared under adapters, and scales learned with the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import fill_adapters, stored_tensors
from qat_edge.errors import RunError
from qat_edge.quant import fake, frozen, layer_functions, numerics, qat_init, rotated_norm, rotation
from qat_edge.quant.ptq import methods
from qat_edge.quant.scheme import Scheme, WeightScheme, choose_scheme

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
IDS = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(1))


def adapted(folder: Path) -> tuple[PeftModel, fake.Switch, Scheme]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scheme = choose_scheme(model, 32)
    switch = fake.insert(model, scheme, learned_scales=True)
    torch.manual_seed(0)
    peft_model = fake.add_adapters(model, LORA)
    fill_adapters(peft_model)
    return peft_model.eval(), switch, scheme


def calibration() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 200, (8, 48), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def disturb_factors(model: PeftModel) -> None:
    """Change the scale factors as training would."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_scale_factor" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def test_gradients_of_weight_and_scales_equal_the_naive_graph_in_float64() -> None:
    torch.manual_seed(0)
    weight, scales = torch.randn(6, 64, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64) / 3 + 0.1
    upstream = torch.randn(6, 64, dtype=torch.float64)
    w, s = weight.clone().requires_grad_(), scales.clone().requires_grad_()
    spread = s.repeat_interleave(32, dim=1)
    ratio = w / spread
    rounded = ratio + (ratio.round() - ratio).detach()
    (rounded.clamp(-8, 7) * spread * upstream).sum().backward()
    codes = numerics.round_codes(weight, scales, 4)
    found_weight, found_scales = numerics.straight_through(weight, scales, codes, upstream)
    clamped = (weight / scales.repeat_interleave(32, dim=1)).round()
    assert ((clamped < -8) | (clamped > 7)).any()  # both branches occur
    torch.testing.assert_close(found_weight, w.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_scales, s.grad, rtol=1e-12, atol=1e-12)


def test_layer_gradients_under_learned_scales() -> None:
    """Gradients of A, B and the scales follow from the gradient of the rounded weight."""
    torch.manual_seed(0)
    spec = WeightScheme(4, 32, quantize_input=True)
    x, weight = torch.randn(5, 64), torch.randn(48, 64)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    scales = numerics.choose_scales(weight, 4, 32).mul(0.9).requires_grad_()
    rounded = layer_functions.rounded_input(x)
    output = layer_functions.MergedFakeQuantLinear.apply(x, rounded, weight, None, a, b, scales, 0.5, spec)
    output.pow(2).sum().backward()
    merged = numerics.merge(weight, a.detach(), b.detach(), 0.5)
    rounded_scales = numerics.representable(scales.detach())
    rounded_x = numerics.fake_quantize_activation(x)
    output = rounded_x @ numerics.fake_quantize_weight(merged, 4, 32, rounded_scales).T
    codes = numerics.round_codes(merged, rounded_scales, 4)
    by_weight, by_scales = numerics.straight_through(merged, rounded_scales, codes, (2 * output).T @ rounded_x)
    torch.testing.assert_close(scales.grad, by_scales, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(a.grad, 0.5 * b.detach().T @ by_weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(b.grad, 0.5 * by_weight @ a.detach().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "rotation_seed"), [("rtn", None), ("hqq", None), ("gptq", None), ("awq", None), ("gptq", 0)]
)
def test_the_function_trained_after_initialization_equals_the_frozen_one(
    tiny_model_folder: Path, tmp_path: Path, method: str, rotation_seed: int | None
) -> None:
    model, switch, scheme = adapted(tiny_model_folder)
    qat_init.prepare(model, scheme, method, calibration(), rotation_seed)
    disturb_factors(model)
    switch.enabled = True
    with torch.no_grad():
        trained = model(IDS).logits
    merged, scales = fake.merge_adapters(model)
    assert set(scales) == set(scheme.linears)
    frozen.freeze(merged, scheme, scales)
    merged.save_pretrained(tmp_path / "quantized")
    load = AutoModelForCausalLM.from_pretrained if rotation_seed is None else frozen.load
    reloaded = load(tmp_path / "quantized")
    assert set(rotated_norm.output_rotations(reloaded)) == (set() if rotation_seed is None else {"model.norm"})
    with torch.no_grad():
        torch.testing.assert_close(reloaded(IDS).logits, trained, rtol=0, atol=0)


def test_a_rotated_checkpoint_runs_correctly_or_not_at_all(tiny_model_folder: Path, tmp_path: Path) -> None:
    model, _, scheme = adapted(tiny_model_folder)
    qat_init.prepare(model, scheme, "rtn", calibration())
    rotation.rotate(model, scheme, 0)
    merged, _ = fake.merge_adapters(model)
    frozen.freeze(merged, scheme)
    merged.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with stored_tensors(tmp_path) as tensors:
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(3)
    with pytest.raises(RunError, match=r"model\.layers\.0\.input_layernorm\.weight is of another shape"):
        frozen.load(tmp_path)


@pytest.mark.parametrize("method", ["hqq", "gptq"])
def test_the_initialization_equals_the_method_on_the_merged_model(tiny_model_folder: Path, method: str) -> None:
    model, _, scheme = adapted(tiny_model_folder)
    plain, _ = fake.merge_adapters(adapted(tiny_model_folder)[0])
    expected = methods.apply(plain, scheme, method, calibration())
    qat_init.prepare(model, scheme, method, calibration())
    merged, scales = fake.merge_adapters(model)
    for name, spec in scheme.linears.items():
        # The adapters' products are added in another order: a scale may fall on the other side of a bfloat16 tie.
        torch.testing.assert_close(scales[name], expected[name], rtol=2**-7, atol=0)
        ours = numerics.quantize(merged.get_submodule(name).weight, scales[name], spec.bits)
        theirs = numerics.quantize(plain.get_submodule(name).weight, expected[name], spec.bits)
        assert (ours != theirs).float().mean() < 0.02  # bfloat16 of the weights moves a few across a rounding boundary


def test_a_method_that_keeps_weights_changes_nothing_without_rounding(tiny_model_folder: Path) -> None:
    model, switch, scheme = adapted(tiny_model_folder)
    with torch.no_grad():
        before = model(IDS).logits
        qat_init.prepare(model, scheme, "hqq", [])
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-6)
    assert not switch.enabled


def test_a_saved_initialization_is_applied_bit_for_bit(tiny_model_folder: Path, tmp_path: Path) -> None:
    model, switch, scheme = adapted(tiny_model_folder)
    made = qat_init.prepare(model, scheme, "gptq", calibration())
    digest = made.save(tmp_path / "start", method="gptq")
    assert qat_init.recorded_sha256(tmp_path / "start") == digest
    other, other_switch, _ = adapted(tiny_model_folder)
    qat_init.QatInit.load(tmp_path / "start", digest).apply(other.get_base_model())
    switch.enabled = other_switch.enabled = True
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_a_missing_or_different_initialization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"start\.safetensors is missing"):
        qat_init.QatInit.load(tmp_path / "start", "")
    digest = qat_init.QatInit({"x": torch.ones(1, 1)}, {}).save(tmp_path / "start")
    with pytest.raises(RunError, match="another sha256"):
        qat_init.QatInit.load(tmp_path / "start", digest[::-1])


def test_scales_and_adapters_learn_together(tiny_model_folder: Path) -> None:
    model, switch, scheme = adapted(tiny_model_folder)
    qat_init.prepare(model, scheme, "rtn", [])
    switch.enabled = True
    model(IDS, labels=IDS).loss.backward()
    trained: dict[str, Any] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 3  # A, B and the factors of seven linear layers in two blocks
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
