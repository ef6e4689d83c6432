"""Gradients of adapters and scales by finite differences in float64, how they are clipped, and what an update moves.

Rounding has no derivative, so the differences are those of the function that a straight-through estimator stands for:
what rounding adds to inputs and weights, and the codes, stay as they are at the point where the gradient is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from qat_edge.options import FinetuneOptions
from qat_edge.quant import fake, layer_functions, numerics
from qat_edge.quant.scheme import Scheme, WeightScheme, choose_scheme
from qat_edge.train import movement
from qat_edge.train.trainer import QatTrainer

SPEC = WeightScheme(bits=4, group_size=32, quantize_input=True)
Layer = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
NAMES = ("a", "b", "factor")


def trained_layer(index: int, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    rounded = layer_functions.rounded_input(x)
    output: Tensor = layer_functions.MergedFakeQuantLinear.apply(x, rounded, weight, None, a, b, scales, 0.5, SPEC)
    return output


@dataclass
class Surrogate:
    """The differentiable function that the straight-through estimator stands for, around the first point it sees."""

    fixed: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, index: int, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        merged = weight + 0.5 * (b @ a)
        if index not in self.fixed:
            self.fixed[index] = self._fix(x, merged, scales)
        fixed = self.fixed[index]
        rounded_scales = (scales + fixed["scales"]).unsqueeze(-1)
        groups = merged.unflatten(-1, (scales.shape[-1], -1))
        # Inside the range a weight passes its own change; outside only the scale moves what it is rounded to.
        inside = groups + rounded_scales * fixed["offset"]
        rounded = torch.where(fixed["inside"], inside, rounded_scales * fixed["codes"])
        return (x + fixed["x"]) @ rounded.flatten(-2).T

    def _fix(self, x: Tensor, merged: Tensor, scales: Tensor) -> dict[str, Tensor]:
        rounded_scales = numerics.representable(scales)
        shape = (scales.shape[-1], -1)
        codes = numerics.round_codes(merged, rounded_scales, SPEC.bits).unflatten(-1, shape)
        offset = codes - merged.unflatten(-1, shape) / rounded_scales.unsqueeze(-1)
        return {
            "x": numerics.fake_quantize_activation(x).double() - x,
            "scales": rounded_scales - scales,
            "codes": codes,
            "offset": offset,
            "inside": offset.abs() <= 0.5,
        }


def loss_of(values: dict[str, list[Tensor]], layer: Layer) -> Tensor:
    """Return the loss of two layers with a curve between them."""
    x = values["x"][0]
    for i in range(2):
        scales = values["scales"][i] * values["factor"][i]
        x = layer(i, x, values["weight"][i], values["a"][i], values["b"][i], scales)
        x = x.tanh() if i == 0 else x
    return x.pow(2).mean()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    shapes = {"x": (6, 64), "weight": (64, 64), "a": (4, 64), "b": (64, 4), "scales": (64, 2), "factor": (64, 2)}
    values = {key: [torch.randn(shape).double() for _ in range(2)] for key, shape in shapes.items()}
    values["b"] = [0.1 * b for b in values["b"]]
    # Scales that leave a few weights outside of the range of codes, and factors around 1.
    values["scales"] = [numerics.choose_scales(w, 4, 32) * 0.6 for w in values["weight"]]
    values["factor"] = [1 + 0.01 * factor for factor in values["factor"]]

    leaves = {key: [t.clone().requires_grad_(key in NAMES) for t in tensors] for key, tensors in values.items()}
    loss_of(leaves, trained_layer).backward()
    surrogate = Surrogate()
    expected = loss_of(values, surrogate)
    assert torch.equal(expected, loss_of(leaves, trained_layer))
    outside = [int((~fixed["inside"]).sum()) for fixed in surrogate.fixed.values()]
    assert all(0 < count < 64 * 64 // 4 for count in outside)

    for index in range(2):
        direction, step = torch.randn_like(values[name][index]), 1e-5
        losses = []
        for sign in (1, -1):
            moved = {key: list(tensors) for key, tensors in values.items()}
            moved[name][index] = values[name][index] + sign * step * direction
            losses.append(float(loss_of(moved, surrogate)))
        gradient = leaves[name][index].grad
        assert gradient is not None
        # 1e-9 here: the products of the layers are in float64, and the loss is smooth.
        assert float((gradient * direction).sum()) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)


def test_a_scale_follows_updates_below_the_spacing_of_bfloat16() -> None:
    """Its factor is float32: updates of 0.1% add up, although neighbors in bfloat16 are 0.4% to 0.8% apart."""
    layer: Any = nn.Linear(64, 48, bias=False)
    model: Any = nn.ModuleDict({"layer": layer})
    fake.insert(model, Scheme(32, False, "", "", {"layer": SPEC}), learned_scales=True)
    fake.train_weights(model)
    fake.set_scales(model, {"layer": torch.full((48, 2), 1.03125)})  # neighbors are 0.76% apart
    assert layer.scale_factor.dtype == torch.float32
    scales = []
    for _ in range(4):
        with torch.no_grad():
            layer.scale_factor.mul_(1.001)
        scales.append(float(numerics.representable(layer.trained_scales.detach()).unique()))
    assert scales == [1.03125, 1.03125, 1.03125, 1.0390625]


# --- clipping ----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_model_folder: Path) -> tuple[Any, Scheme]:
    """A tiny model with adapters and learned scales, its switch on."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    scheme = choose_scheme(model, 32)
    switch = fake.insert(model, scheme, learned_scales=True)
    torch.manual_seed(0)
    adapted = fake.add_adapters(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    scales = {n: numerics.choose_scales(fake.linear(fake.base_of(adapted), n).weight, 4, 32) for n in scheme.linears}
    fake.set_scales(fake.base_of(adapted), scales)
    switch.enabled = True
    return adapted, scheme


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(3, 23).unsqueeze(0)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", ["together", "apart"])
def test_scales_are_clipped_by_a_norm_of_their_own(trained: tuple[Any, Scheme], tmp_path: Path, clip: str) -> None:
    model, _ = trained
    options = FinetuneOptions(model="m", data="d", clip_gradients=clip)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_grad_norm=0.001, use_cpu=True, report_to=[])
    trainer = QatTrainer(model=model, args=arguments)
    trainer.configure_optimizer(options, start=0)
    trainer._tr_loss = torch.tensor(1.0)
    before = _gradients(model)
    norm = float(trainer._clip_grad_norm(model))
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def norm_of(gradients: dict[str, Any], of_scales: bool) -> float:
        return math.sqrt(sum(float(g.pow(2).sum()) for n, g in gradients.items() if ("scale_factor" in n) == of_scales))

    weights, scales = norm_of(before, False), norm_of(before, True)
    assert weights > 0.001 and scales > 0.001 and norm == pytest.approx(math.hypot(weights, scales), rel=1e-5)
    reduced = scales / math.sqrt(32 * 7)
    expected = {
        "together": (weights * 0.001 / norm, scales * 0.001 / norm),
        "apart": (0.001, min(reduced, 0.001)),
    }[clip]
    assert (norm_of(after, False), norm_of(after, True)) == pytest.approx(expected, rel=1e-3)


# --- movement ----------------------------------------------------------------------------------------------


def test_movement_is_measured_in_steps_of_a_code(trained: tuple[Any, Scheme]) -> None:
    model, scheme = trained
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert movement.measure(model, scheme.linears, before) == movement.Movement(0.0, 0.0, 0.0)

    # One layer moves by half a step of each group, another one's scales by 2%.
    base = fake.base_of(model)
    first, second = list(scheme.linears)[:2]
    codes_before = _codes(base, first)
    with torch.no_grad():
        moved, scaled = base.get_submodule(first), base.get_submodule(second)
        step = float(moved.trained_scales.min())
        moved.lora_A["default"].weight.zero_()[0] = 1.0
        moved.lora_B["default"].weight.zero_()[:, 0] = 0.5 * step / moved.scaling["default"]
        scaled.lora_scale_factor["default"].mul_(1.02)
    now = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = movement.measure(model, scheme.linears, before)
    assert all(torch.equal(p, now[n]) for n, p in model.named_parameters())

    weights = sum(fake.linear(base, n).weight.numel() for n in scheme.linears)
    ratio = 0.5 * step / moved.trained_scales.double()
    assert found.rms_steps == pytest.approx(math.sqrt(float(32 * ratio.pow(2).sum()) / weights), rel=1e-4)
    groups = sum(base.get_submodule(n).trained_scales.numel() for n in scheme.linears)
    share = scaled.trained_scales.numel() / groups
    assert found.rms_scale == pytest.approx(0.02 * math.sqrt(share), rel=0.1)  # rounded to bfloat16
    changed = int((_codes(base, first) != codes_before).sum())
    assert found.codes_changed >= changed / weights > 0
    assert "of a code's step" in found.describe()


def _codes(base: nn.Module, name: str) -> Tensor:
    weight = fake.MergedWeights(base).get_submodule(name).weight
    return numerics.round_codes(weight, numerics.representable(base.get_submodule(name).trained_scales), 4)


def test_movement_of_trained_weights_leaves_them_as_they_are(tiny_model_folder: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    scheme = choose_scheme(model, 32)
    fake.insert(model, scheme)
    fake.train_weights(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name in scheme.linears:
            model.get_submodule(name).weight.mul_(1.5)
    now = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = movement.measure(model, scheme.linears, before)
    assert all(torch.equal(p, now[n]) for n, p in model.named_parameters())
    # Scales follow the largest weights, so the codes stay, but for ties after the rounding of a scale.
    assert found.rms_scale == pytest.approx(0.5, rel=0.02) and found.codes_changed < 0.02
