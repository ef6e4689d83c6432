"""Other tools' forward passes compared with their formulas, their gradients, and the patch that trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks import formulations
from benchmarks.formulations import FORMULATIONS, SeparateLinear, SplitLinear, convert
from qat_edge.errors import UsageError
from qat_edge.quant import fake, numerics
from qat_edge.quant.fake import LoraFakeQuantLinear
from qat_edge.quant.scheme import Scheme, WeightScheme

SPEC = WeightScheme(bits=4, group_size=32, quantize_input=True)
SCALING = 2.0
RANK = 4


class OneLayer(nn.Module):
    """Model of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(name: str) -> tuple[LoraFakeQuantLinear, fake.Switch]:
    """Return the layer with adapters that are not zero, and its switch, which is on."""
    torch.manual_seed(0)
    model = OneLayer()
    switch = fake.insert(model, Scheme(32, False, "", "", {"layer": SPEC}))
    peft_model = fake.add_adapters(model, LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["layer"]))
    layer = convert(peft_model, name).get_base_model().layer
    nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    switch.enabled = True
    return layer, switch


def parts(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W, bias, A and B."""
    base = layer.get_base_layer()
    return base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def rounded(weight: Tensor, group: int = 32) -> Tensor:
    return numerics.fake_quantize_weight(weight.detach(), 4, group)


def test_split_equals_its_formula() -> None:
    layer, _ = adapted("split")
    weight, bias, a, b = parts(layer)
    x = torch.randn(2, 5, 64)
    expected = numerics.fake_quantize_activation(x) @ rounded(weight).T + bias + SCALING * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_separate_equals_its_formula() -> None:
    layer, _ = adapted("separate")
    weight, bias, a, b = parts(layer)
    x = torch.randn(2, 5, 64)
    rounded_x = numerics.fake_quantize_activation(x)
    low_rank = rounded_x @ rounded(a).T @ rounded(b, group=RANK).T  # B is narrower than a group: one group per row
    torch.testing.assert_close(
        layer(x), rounded_x @ rounded(weight).T + bias + SCALING * low_rank, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["split", "separate"])
def test_the_straight_through_gradients(name: str) -> None:
    layer, _ = adapted(name)
    weight, _, a, b = parts(layer)
    x, grad = torch.randn(7, 64, requires_grad=True), torch.randn(7, 48)
    layer(x).backward(grad)
    inputs = x.detach() if name == "split" else numerics.fake_quantize_activation(x.detach())
    used_a, used_b = (a, b) if name == "split" else (rounded(a), rounded(b, group=RANK))
    torch.testing.assert_close(b.grad, SCALING * grad.T @ (inputs @ used_a.T), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad, SCALING * (grad @ used_b).T @ inputs, rtol=1e-5, atol=1e-5)
    expected = grad @ rounded(weight) + SCALING * grad @ used_b @ used_a
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    assert weight.grad is None


@pytest.mark.parametrize("name", FORMULATIONS)
def test_without_rounding_all_formulations_are_plain_lora(name: str) -> None:
    layer, switch = adapted(name)
    switch.enabled = False
    weight, bias, a, b = parts(layer)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ (weight + SCALING * b @ a).T + bias, rtol=1e-5, atol=1e-5)


def test_only_merged_computes_the_deployed_function() -> None:
    x = torch.randn(3, 64)
    differences = {}
    for name in FORMULATIONS:
        layer, _ = adapted(name)
        weight, bias, a, b = parts(layer)
        shipped = rounded(weight + SCALING * b @ a)
        deployed = numerics.fake_quantize_activation(x) @ shipped.T + bias
        differences[name] = float((layer(x) - deployed).abs().max().detach())
    assert differences["merged"] < 1e-5 < 1e-2 < min(differences["split"], differences["separate"])


def test_the_patch_is_undone_after_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[type] = []
    original = fake.add_adapters

    def trained(*args: Any, **kwargs: Any) -> None:
        model = OneLayer()
        fake.insert(model, Scheme(32, False, "", "", {"layer": SPEC}))
        made = fake.add_adapters(model, LoraConfig(r=RANK, target_modules=["layer"]))
        seen.append(type(made.get_base_model().layer))
        raise RuntimeError("stopped")

    monkeypatch.setattr(formulations, "finetune", trained)
    for name in ("split", "separate"):
        with pytest.raises(RuntimeError, match="stopped"):
            formulations.train(name, None, tmp_path)  # type: ignore[arg-type]
        assert fake.add_adapters is original
    assert seen == [SplitLinear, SeparateLinear]


def test_an_unknown_formulation_is_named() -> None:
    with pytest.raises(UsageError, match=r"'joint': not known\. Known: merged, split, separate"):
        convert(OneLayer(), "joint")
