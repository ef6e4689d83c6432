"""Quantization arithmetic: equality with torchao, and the properties that artifacts rely on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import QATConfig
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine

from qat_edge.quant import numerics


def grid_weight(out: int, width: int, group: int, seed: int = 0) -> torch.Tensor:
    """Random weights whose torchao scales are bfloat16 numbers: each group's largest magnitude is 7.5 * 2^k."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width // group, group, generator=generator).clamp(-3, 3) / 4
    exponent = torch.randint(-6, 3, (out, width // group), generator=generator)
    weight[..., 0] = -7.5 / 8
    return (weight * 8 * torch.exp2(exponent.float()).unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_bfloat16_numbers_and_codes_in_range(bits: int) -> None:
    weight = torch.randn(16, 128)
    scales = numerics.choose_scales(weight, bits, 32)
    codes = numerics.quantize(weight, scales, bits)
    assert scales.shape == (16, 4) and scales.dtype == torch.float32
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    low, high = numerics.code_range(bits)
    assert codes.dtype == torch.int8 and low <= int(codes.min()) and int(codes.max()) <= high


def test_fake_quantization_is_dequantized_quantization() -> None:
    weight = torch.randn(16, 128)
    scales = numerics.choose_scales(weight, 4, 32)
    expected = numerics.dequantize(numerics.quantize(weight, scales, 4), scales)
    assert torch.equal(numerics.fake_quantize_weight(weight, 4, 32), expected)


def test_the_error_is_at_most_half_a_step_plus_clipping() -> None:
    weight = torch.randn(8, 64)
    scales = numerics.choose_scales(weight, 8, 64)
    error = (numerics.fake_quantize_weight(weight, 8, 64) - weight).abs()
    # A bfloat16 scale is off by at most 2^-8, so the largest magnitude may be clipped by that much more.
    assert bool((error <= scales * (0.5 + 128 * 2**-8)).all())


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 32)
    assert torch.equal(numerics.fake_quantize_weight(weight, 4, 32), weight)


def test_equals_torchao_where_the_scales_agree() -> None:
    model = nn.Sequential(nn.Linear(128, 48, bias=False))
    model[0].weight = nn.Parameter(grid_weight(48, 128, 32))
    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    x = torch.randn(5, 128)
    ours = nn.functional.linear(
        numerics.fake_quantize_activation(x), numerics.fake_quantize_weight(model[0].weight.detach(), 4, 32)
    )
    quantize_(model, QATConfig(base, step="prepare"))
    torch.testing.assert_close(model(x), ours, rtol=0, atol=0)
    quantize_(model, QATConfig(base, step="convert"))
    converted = model[0].weight
    scales = numerics.choose_scales(grid_weight(48, 128, 32), 4, 32)
    assert torch.equal(converted.scale, scales)
    assert torch.equal(converted.qdata, numerics.quantize(grid_weight(48, 128, 32), scales, 4))
    torch.testing.assert_close(model(x), ours, rtol=0, atol=0)


def test_differs_from_torchao_only_by_the_rounded_scale() -> None:
    weight = torch.randn(48, 128)
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

    theirs, _ = choose_qparams_affine(weight, MappingType.SYMMETRIC, (1, 32), torch.int8, -8, 7)
    ours = numerics.choose_scales(weight, 4, 32)
    assert torch.equal(ours.flatten(), theirs.flatten().to(torch.bfloat16).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_torchao_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 96, generator=generator) * torch.logspace(-44, 30, 40).unsqueeze(-1)
    x[0, 3], x[0, 4], x[0, 5, 7] = 0, -1, 1e20
    x[0, 6:9] = torch.arange(96) / 2 - torch.tensor([[0.0], [24.0], [100.0]])  # many ties
    x = x.to(dtype)
    block, wide = [1, 1, 96], x.float()
    scale, zero = choose_qparams_affine(
        wide, MappingType.ASYMMETRIC, block, torch.int8, -128, 127, zero_point_dtype=torch.int8
    )
    codes = quantize_affine(wide, block, scale, zero, torch.int8, -128, 127)
    expected = dequantize_affine(codes, block, scale, zero, torch.int8, -128, 127)
    before = x.clone()
    assert torch.equal(numerics.fake_quantize_activation(x), expected)
    assert torch.equal(x, before)


def test_activations_represent_zero_and_have_a_scale_per_token() -> None:
    x = torch.stack([torch.linspace(1.0, 2.0, 64), torch.linspace(-300.0, 50.0, 64), torch.zeros(64)])
    rounded = numerics.fake_quantize_activation(x)
    steps = torch.tensor([2.0 / 255, 350.0 / 255, 0.0])
    assert bool(((rounded - x).abs().amax(dim=1) <= steps * 0.5001 + 1e-6).all())
    assert torch.equal(numerics.fake_quantize_activation(x[:1]), rounded[:1])


def test_merge_is_float32_and_exact_on_small_integers() -> None:
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    lora_a, lora_b = torch.full((2, 4), 2.0), torch.full((3, 2), 3.0)
    merged = numerics.merge(weight, lora_a, lora_b, 0.5)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, torch.full((3, 4), 1 + 0.5 * 12))
