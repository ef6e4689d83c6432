"""Tests of the Triton kernels against `numerics` on the CPU; `test_triton_kernels` runs them in a process of its own.

Without a GPU they run in Triton's interpreter, which computes a multiply-add with two roundings; `exact_multiply_add`
mends that, so that results can be compared bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qat_edge.quant import fused, layer_functions, numerics, triton_kernels
from qat_edge.quant.codebook import INTEGER, SEQ, codebook_of
from qat_edge.quant.scheme import WeightScheme
from tests.conftest import fill_adapters
from tests.quant.test_fake import adapted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALING = 1.7
# Bits, levels, rows, columns, group size, rank: whole tiles and parts of them, groups of any length.
SHAPES = (
    (4, INTEGER, 48, 64, 32, 8),
    (4, INTEGER, 37, 192, 64, 16),
    (4, INTEGER, 5, 2048, 128, 3),
    (8, INTEGER, 10, 72, 72, 0),
    (8, INTEGER, 3, 600, 600, 4),
    (2, SEQ, 33, 64, 32, 4),
    (2, INTEGER, 16, 64, 32, 4),
)


@pytest.fixture(autouse=True)
def exact_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(np.float32), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, a: Tensor | None, b: Tensor | None, scales: Tensor | None, *rest: Any) -> Tensor:
    """Call `round_merged` on the device; the result is on the CPU."""
    moved = [None if tensor is None else tensor.to(DEVICE) for tensor in (weight, a, b, scales)]
    return triton_kernels.round_merged(*moved, SCALING, *rest).cpu()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_weight_is_rounded_as_on_the_cpu(
    shape: tuple[int, str, int, int, int, int], stored: torch.dtype, computed: torch.dtype
) -> None:
    bits, levels, rows, columns, group_size, rank = shape
    codebook, weight = codebook_of(bits, levels), random(rows, columns).to(stored)
    a, b = (random(rank, columns, seed=1), random(rows, rank, seed=2)) if rank else (None, None)
    merged = weight.float() if a is None or b is None else numerics.merge(weight, a, b, SCALING)
    own = numerics.largest_scales(merged, codebook, group_size) * (0.5 + torch.rand(rows, columns // group_size))
    for scales in (own, None):
        if scales is None and codebook.searches_scales:
            continue
        exact = None if scales is None else numerics.representable(scales)
        expected = numerics.fake_quantize_weight(merged, codebook, group_size, exact).to(computed)
        assert torch.equal(rounded(weight, a, b, scales, codebook, group_size, computed), expected)


def adversarial(kind: str) -> Tensor:
    """Weights (4, 64) in groups of 32 at which rounding goes wrong first."""
    weight = random(4, 64)
    if kind == "ties":  # between two codes, under a scale of 1
        return torch.arange(-128, 128).reshape(4, 64).remainder(16).sub(7.5)
    if kind == "zeros":
        weight[:, :32] = 0
    if kind == "denormals":
        weight *= 1e-41
    if kind == "one large weight":
        weight[:, 5] = 3e38
    if kind == "tiny":
        weight *= 1e-8
    return weight


@pytest.mark.parametrize("kind", ["ties", "zeros", "denormals", "one large weight", "tiny"])
@pytest.mark.parametrize("own", [True, False])
def test_adversarial_weights_are_rounded_as_on_the_cpu(kind: str, own: bool) -> None:
    weight, codebook = adversarial(kind), codebook_of(4)
    scales = torch.ones(4, 2) if own else None
    expected = numerics.fake_quantize_weight(weight, codebook, 32, scales)
    assert torch.equal(rounded(weight, None, None, scales, codebook, 32, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_a_number_stays_one(dtype: torch.dtype) -> None:
    weight = random(4, 64)
    weight[1, 2] = torch.nan
    found = rounded(weight, None, None, torch.ones(4, 2), codebook_of(4), 32, dtype)
    assert found.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1]])
def test_gradients_equal_those_of_the_cpu(shape: tuple[int, str, int, int, int, int]) -> None:
    bits, levels, rows, columns, group_size, rank = shape
    codebook, weight, grad = codebook_of(bits, levels), random(rows, columns), random(rows, columns, seed=3)
    a, b = random(rank, columns, seed=1), random(rows, rank, seed=2)
    merged = numerics.merge(weight, a, b, SCALING)
    # Smaller scales than of the largest weight: some weights are clamped.
    scales = numerics.largest_scales(merged, codebook, group_size) * 0.7
    own = numerics.representable(scales)
    codes = numerics.round_codes(merged, own, codebook)
    grad_weight, grad_scales = numerics.straight_through(merged, own, codes, grad, codebook.step)
    assert (grad_weight == 0).any()

    moved = [tensor.to(DEVICE) for tensor in (weight, a, b, scales)]
    masked = grad.to(DEVICE).clone()
    weight_again, found = triton_kernels.scale_gradients(*moved, SCALING, codebook, group_size, masked, torch.float32)
    assert torch.equal(masked.cpu(), grad_weight)
    assert torch.equal(weight_again.cpu(), numerics.dequantize(codes, own))
    # The order of a sum differs.
    torch.testing.assert_close(found.cpu(), grad_scales, rtol=1e-5, atol=1e-5 * float(grad_scales.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 100), (3, 576)])
def test_inputs_are_rounded_as_by_torchao(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape) * 10 ** random(*shape[:-1], 1, seed=1)
    x[:1] *= 0
    for given in (x, x.abs(), -x.abs(), x.bfloat16(), x.transpose(0, 1).contiguous().transpose(0, 1)):
        found = triton_kernels.round_activation(given.to(DEVICE), dtype).cpu()
        assert torch.equal(found, numerics.fake_quantize_activation(given).to(dtype))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_the_same_with_kernels_and_without(
    learned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and all gradients of one adapted layer; those in bfloat16 within its precision."""
    weight, spec = random(48, 64), WeightScheme(4, 32, quantize_input=True)
    scales = numerics.largest_scales(weight, spec.codebook, 32) * 0.8 if learned else None
    results = []
    for kernels in (None, triton_kernels):
        monkeypatch.setattr(fused, "kernels_on", lambda device, kernels=kernels: kernels)
        leaves = [random(5, 64, seed=1), random(4, 64, seed=2), random(48, 4, seed=3)]
        leaves += [] if scales is None else [scales.clone()]
        leaves = [leaf.to(DEVICE).requires_grad_() for leaf in leaves]
        x, a, b = leaves[:3]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = layer_functions.MergedFakeQuantLinear.apply(
                x, layer_functions.rounded_input(x), weight.to(DEVICE), None, a, b,
                leaves[3] if learned else None, SCALING, spec,
            )  # fmt: skip
        output.float().pow(2).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(results[0][0], results[1][0])
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_model_has_the_same_logits_with_kernels_and_without(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, switch, _ = adapted(tiny_model_folder)
    fill_adapters(model)
    switch.enabled = True
    ids = torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits = []
    for kernels in (None, triton_kernels):
        monkeypatch.setattr(fused, "kernels_on", lambda device, kernels=kernels: kernels)
        with torch.no_grad():
            logits.append(model.to(DEVICE)(ids).logits)
    assert torch.equal(*logits)


def test_the_check_before_the_first_use_finds_no_fault() -> None:
    assert fused.fault(triton_kernels, DEVICE) is None
