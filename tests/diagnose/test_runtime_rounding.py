"""Emulation in torch of what runtimes round differently. Real artifacts are compared with it in test_line.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conftest import make_model, make_tokenizer
from qat_edge.diagnose.runtime_rounding import Rounding, emulate_rounding
from qat_edge_devices.processor import Processor


def rounded_input(width: int, rounding: Rounding, x: Tensor) -> Tensor:
    """Return what a layer of that width multiplies its weight by."""
    model = nn.Module()
    model.layer = nn.Linear(width, width, bias=False)
    with torch.no_grad(), emulate_rounding(model, ["layer"], rounding):
        model.layer.weight.copy_(torch.eye(width))
        outputs: Tensor = model.layer(x)
    assert not model.layer._forward_pre_hooks
    return outputs


@pytest.mark.parametrize("width", [64, 48])  # two blocks, or one and a half
def test_each_block_has_a_scale_of_its_own(width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    x[:, 32:] *= 100
    x[1, :32] = 0
    found = rounded_input(width, Rounding("blocks", {"layer": 32}), x)
    for block in (slice(0, 32), slice(32, width)):
        largest = x[:, block].abs().amax(-1, keepdim=True)
        assert ((found - x)[:, block].abs() <= largest / 127 / 2 * 1.0001).all()
        codes = found[:, block] / (largest / 127).clamp(min=1e-30)
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    per_token = rounded_input(width, Rounding(), x)
    assert (per_token - x)[0, :32].square().mean() > 100 * (found - x)[0, :32].square().mean()


def test_an_int8_cache_rounds_what_attention_reads_until_the_block_ends() -> None:
    model, ids = make_model(make_tokenizer()), torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        before = model(ids).logits
        with emulate_rounding(model, [], Rounding("cache", int8_cache=True)):
            rounded = model(ids).logits
            first = model(ids[:, :1]).logits
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    noise = 10 * torch.log10((rounded - before).square().sum() / before.square().sum())
    assert -70 < float(noise) < -20, "eight bits of keys and values, and no more"
    # A single token attends to itself only, so only the rounding of its value remains.
    assert 0 < float((first - before[:, :1]).abs().max()) < float(before.abs().max()) / 20


def test_other_processors_can_have_another_rounding() -> None:
    on_arm = Rounding("arm", {"head": 32})
    blocks = Rounding("blocks", {"layer": 32, "head": 32}, others={Processor.ARM: on_arm, Processor.OTHER: Rounding()})
    assert blocks.on(Processor.X86) is blocks and blocks.on(Processor.ARM) is on_arm
    assert blocks.on(Processor.OTHER).is_as_trained and not blocks.is_as_trained
    assert not Rounding("cache", int8_cache=True).on(Processor.ARM).is_as_trained


def test_half_steps_multiply_the_sums_of_the_input_in_float() -> None:
    """2-bit levels n + 1/2: n times the rounded input, 1/2 times the input itself."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-2, 2, (16, 64), generator=generator).float()
    scales, x = torch.rand(16, 2, generator=generator) + 0.5, torch.randn(3, 64, generator=generator)
    by_weight = scales.repeat_interleave(32, dim=1)
    model = nn.Module()
    model.layer = nn.Linear(64, 16, bias=False)
    model.layer.weight.data = (integers + 0.5) * by_weight
    for blocks in ({"layer": 32}, {}):
        applied = Rounding("2 bits", blocks, half_steps={"layer": scales / 2})
        rounded = rounded_input(64, replace(applied, half_steps={}), x)
        with torch.no_grad(), emulate_rounding(model, ["layer"], applied):
            found = model.layer(x)
        sums = x.unflatten(-1, (2, 32)).sum(-1)
        torch.testing.assert_close(found, rounded @ (integers * by_weight).T + sums @ (scales / 2).T)
        assert not model.layer._forward_hooks and not model.layer._forward_pre_hooks
