"""Quantized base weights: their values, their memory, and that no dense weight outlives its use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import fill_adapters
from qat_edge.quant import fake, frozen, layer_functions, numerics, qlora_base
from qat_edge.quant.qat_init import QatInit
from qat_edge.quant.scheme import Scheme, WeightScheme, choose_scheme

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
IDS = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(1))
FORMATS = pytest.mark.parametrize("format", ["nf4", "int8"])
NF4_CODES = 16


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 10


def adapted(folder: Path, format: str, config: LoraConfig = LORA) -> tuple[PeftModel, fake.Switch, Scheme]:
    """Return a tiny model with a quantized base and adapters that are not zero."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scheme = choose_scheme(model, 32)
    qlora_base.quantize_base(model, scheme.linears, format)
    switch = fake.insert(model, scheme, learned_scales=True)
    torch.manual_seed(0)
    peft_model = fake.add_adapters(model, config)
    fill_adapters(peft_model)
    return peft_model.eval(), switch, scheme


def test_int8_has_one_scale_per_row() -> None:
    weight = weights(48, 96)
    quantized = qlora_base.Int8Weight(weight)
    assert torch.equal(quantized.dequantize(), numerics.fake_quantize_weight(weight, 8, 96))
    assert quantized.size_bytes == 48 * 96 + 48 * 4


def test_nf4_has_sixteen_values_for_every_64_weights() -> None:
    weight = weights(128, 256)
    quantized = qlora_base.Nf4Weight(weight)
    blocks = quantized.dequantize().reshape(-1, 64)
    assert all(len(block.unique()) <= NF4_CODES for block in blocks)
    # Widest gap between two codes is 0.304 of the largest weight; int8 scales add half a hundredth.
    error = (quantized.dequantize() - weight).reshape(-1, 64).abs().amax(1)
    assert (error <= 0.16 * weight.reshape(-1, 64).abs().amax(1)).all()
    scales = 128 * 256 // 64
    codebook_and_mean = (16 + 1) * 4
    assert quantized.size_bytes == 128 * 256 // 2 + scales + scales // 256 * 4 + codebook_and_mean


@FORMATS
def test_zeros_stay_zeros(format: str) -> None:
    weight = weights(64, 128)
    weight[:8] = 0
    found = qlora_base.FORMATS[format](weight).dequantize()
    assert found.isfinite().all() and (found[:8] != 0).sum() <= 8 * 128 // 64 and found[:8].abs().max() < 2e-3
    assert qlora_base.FORMATS[format](torch.zeros(64, 64)).dequantize().abs().max() < 1e-6


@FORMATS
def test_output_and_gradient_are_those_of_the_dequantized_weight(format: str) -> None:
    """And the dequantized weight is not kept between the forward and the backward pass."""
    model = nn.Sequential(nn.Linear(64, 32))
    plain = nn.Linear(64, 32)
    plain.bias.data.copy_(model[0].bias)
    before, after = qlora_base.quantize_base(model, ["0"], format)
    plain.weight.data.copy_(model[0].weight)
    assert before == 32 * 64 * 4 and after < before / (3 if format == "int8" else 6)
    x = weights(5, 64).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = model(x)
    output.pow(2).sum().backward()
    found, x.grad = x.grad, None
    expected = plain(x)
    expected.pow(2).sum().backward()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, x.grad)
    assert not kept and "0.weight" not in dict(model.named_parameters()) and not model.state_dict().keys() - {"0.bias"}


@FORMATS
def test_fake_quantization_keeps_no_dense_weight_for_the_backward_pass(format: str) -> None:
    quantized = qlora_base.FORMATS[format](weights(64, 64))
    a, b = weights(4, 64).requires_grad_(), weights(64, 4).requires_grad_()
    spec = WeightScheme(4, 32, quantize_input=True)
    grads = []
    for weight in (quantized, quantized.dequantize()):
        kept: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(tuple(t.shape)) or t, lambda t: t
        ):
            x = weights(3, 64)
            rounded = layer_functions.rounded_input(x)
            output = layer_functions.MergedFakeQuantLinear.apply(x, rounded, weight, None, a, b, None, 0.5, spec)
        grads.append(torch.autograd.grad(output.pow(2).sum(), (a, b)))
        assert ((64, 64) in kept) is isinstance(weight, Tensor)
    for ours, dense in zip(*grads, strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=0)


@FORMATS
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("initialized", [False, True])
def test_the_trained_function_equals_the_frozen_one_over_a_quantized_base(
    tiny_model_folder: Path, tmp_path: Path, format: str, targets: Any, initialized: bool
) -> None:
    """With a quantized base too, the trained logits and those of the frozen checkpoint are equal bit for bit."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model, switch, scheme = adapted(tiny_model_folder, format, config)
    if initialized:
        view = fake.MergedWeights(model)
        scales = {
            n: numerics.choose_scales(view.get_submodule(n).weight, s.bits, 32) for n, s in scheme.linears.items()
        }
        QatInit({n: s * 0.75 for n, s in scales.items()}, {}).apply(model.get_base_model())
    switch.enabled = True
    with torch.no_grad():
        trained = model(IDS).logits
    merged, scales = fake.merge_adapters(model)
    switch.enabled = False
    frozen.freeze(merged, scheme, scales)
    merged.save_pretrained(tmp_path / "quantized")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(IDS).logits, trained, rtol=0, atol=0)
    assert not any(isinstance(m, qlora_base.QloraWeight) for m in merged.modules())


@FORMATS
def test_both_phases_train_over_a_quantized_base(tiny_model_folder: Path, format: str) -> None:
    model, switch, scheme = adapted(tiny_model_folder, format)
    before = {n: qlora_base.dequantized(fake.linear(model.get_base_model(), n).qlora_weight) for n in scheme.linears}
    for enabled in (False, True):
        switch.enabled = enabled
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
        assert len(grads) == 2 * 7 * 2 and all(g is not None and g.abs().sum() > 0 for g in grads)
    for name, weight in before.items():
        assert torch.equal(fake.linear(model.get_base_model(), name).weight, weight)


def test_a_subclass_of_linear_keeps_its_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(64, 32, bias=False))
    qlora_base.quantize_base(model, ["0"], "int8")
    fake.insert(model, Scheme(32, False, "", "", {"0": WeightScheme(4, 32, quantize_input=True)}))
    x, weight = weights(3, 64), model[0].weight
    torch.testing.assert_close(model(x), 2 * nn.functional.linear(x, weight))
    merged, _ = fake.merge_adapters(model)
    assert isinstance(merged[0], Doubled) and torch.equal(merged[0].weight, weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@FORMATS
def test_a_quantized_base_moves_to_the_gpu(tiny_model_folder: Path, format: str) -> None:
    model, switch, scheme = adapted(tiny_model_folder, format)
    model = model.to("cuda")
    switch.enabled = True
    with torch.no_grad():
        trained = model(IDS.cuda()).logits
    assert all(fake.linear(model.get_base_model(), n).weight.is_cuda for n in scheme.linears)
    merged, scales = fake.merge_adapters(model)
    switch.enabled = False
    frozen.freeze(merged, scheme, scales)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS.cuda()).logits, trained, rtol=1e-5, atol=1e-5)
