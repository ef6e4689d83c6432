"""GPTQ and coordinate descent against plain loops with temporaries: the same codes and scales, bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qat_edge.quant import numerics
from qat_edge.quant.codebook import INTEGER, SEQ, Codebook
from qat_edge.quant.ptq import coordinate_descent, gptq
from qat_edge.quant.ptq.block_calls import KeptTokens
from qat_edge.quant.ptq.hqq import RATIOS, search_scales
from qat_edge.quant.scheme import WeightScheme

OUT, WIDTH = 24, 128
SCHEMES = {
    "4 bits in groups of 32": WeightScheme(4, 32, True),
    "4 bits in groups of 64": WeightScheme(4, 64, True),
    "8 bits in groups of 32": WeightScheme(8, 32, True),
    "2 bits": WeightScheme(2, 32, True, levels=INTEGER),
    "2 bits, odd codes": WeightScheme(2, 64, True, levels=SEQ),
}
# Of a step of a loop over columns, 7.7 and 7.8 were counted, with a column's share of what a group takes.
MOST_CALLS = 9


# --- the plain loops ---------------------------------------------------------------------------------------


def plain_search(weight: Tensor, codebook: Codebook, group_size: int, importance: Tensor) -> Tensor:
    best = numerics.largest_scales(weight, codebook, group_size)
    largest, least = best, torch.full_like(best, torch.inf)
    for ratio in numerics.RATIOS_2_BITS if codebook.bits == 2 else RATIOS:
        scales = numerics.representable(largest * ratio)
        error = (numerics.dequantize(numerics.round_codes(weight, scales, codebook), scales) - weight).square()
        cost = (error * importance).unflatten(-1, (-1, group_size)).sum(-1)
        better = cost < least
        best, least = torch.where(better, scales, best), torch.where(better, cost, least)
    return best


def plain_compensate(weight: Tensor, hessian: Tensor, factor: Tensor, spec: WeightScheme) -> tuple[Tensor, Tensor]:
    work, found = weight.clone(), []
    for start in range(0, weight.shape[1], spec.group_size):
        end = start + spec.group_size
        scales = plain_search(work[:, start:end], spec.codebook, spec.group_size, hessian.diagonal()[start:end])
        errors = torch.empty(len(weight), spec.group_size)
        for j in range(start, end):
            column = work[:, j : j + 1]
            rounded = numerics.dequantize(numerics.quantize(column, scales, spec.codebook), scales)
            error = (column - rounded) / factor[j, j]
            work[:, j + 1 : end] -= error * factor[j, j + 1 : end]
            errors[:, j - start : j - start + 1] = error
        work[:, end:] -= errors @ factor[start:end, end:]
        found.append(scales)
    return work, torch.cat(found, dim=1)


def plain_best_scale(codes: Tensor, scale: Tensor, hessian: Tensor, gradient: Tensor) -> Tensor:
    slope, curvature = (gradient * codes).sum(dim=0), ((hessian @ codes) * codes).sum(dim=0)
    found = scale + slope / curvature.clamp(min=torch.finfo(scale.dtype).tiny)
    found = numerics.representable(torch.minimum(torch.maximum(found, scale / 2), scale * 2))
    gain = (found - scale) * (2 * slope - (found - scale) * curvature)
    return torch.where(gain > 0, found, scale)


def plain_refine(
    target: Tensor, hessian: Tensor, weight: Tensor, scales: Tensor, spec: WeightScheme
) -> tuple[Tensor, Tensor]:
    codes = numerics.quantize(weight, scales, spec.codebook).float().T.contiguous()
    scales, kept, step = scales.T.contiguous(), weight.T.contiguous(), spec.group_size
    rounded = codes * scales.repeat_interleave(step, dim=0)
    gradient = hessian @ (target.T - rounded)
    for _ in range(coordinate_descent.SWEEPS):
        for group, start in enumerate(range(0, len(codes), step)):
            columns = slice(start, start + step)
            before, inside, local = rounded[columns].clone(), hessian[columns, columns], gradient[columns].clone()
            scales[group] = plain_best_scale(codes[columns], scales[group], inside, local)
            rounded[columns] = codes[columns] * scales[group]
            local -= inside @ (rounded[columns] - before)
            for j in range(step):
                best = rounded[start + j] + local[j] / inside[j, j]
                code = numerics.round_to_codes(best / scales[group], spec.codebook)
                value, margin = code * scales[group], coordinate_descent.MARGIN * scales[group]
                local -= torch.outer(inside[:, j], value - rounded[start + j])
                codes[start + j], rounded[start + j] = code, value
                kept[start + j] = torch.minimum(torch.maximum(best, value - margin), value + margin)
            gradient -= hessian[:, columns] @ (rounded[columns] - before)
    return kept.T, scales.T


# --- inputs that make loops differ -------------------------------------------------------------------------


def layer(trouble: str) -> tuple[Tensor, Tensor]:
    """Return a weight (OUT, WIDTH) and the sum of x x^T over its inputs, with a difficulty of this name."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    x = torch.randn(300, 16, generator=generator) @ torch.randn(16, WIDTH, generator=generator)
    x = x + 0.2 * torch.randn(300, WIDTH, generator=generator)
    if trouble == "ties":
        # Multiples of half a step under scales of the largest weights, and inputs that are not correlated.
        weight = (weight * 4).round() / 8
        x = torch.eye(WIDTH)
    elif trouble == "equal weights":
        weight = torch.full_like(weight, 0.25)
    elif trouble == "dead inputs":
        x[:, 3:90:2] = 0
        weight[:, :32] = 0
    elif trouble == "a huge weight":
        weight[5, 40] = 1e6
    return weight, x.T @ x


@pytest.mark.parametrize("trouble", ["none", "ties", "equal weights", "dead inputs", "a huge weight"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_are_those_of_plain_loops(scheme: str, trouble: str) -> None:
    spec, (weight, hessian) = SCHEMES[scheme], layer(trouble)
    factor = gptq.inverse_factor(hessian, "layer")
    found = gptq.compensate(weight, hessian, factor, spec)
    expected = plain_compensate(weight, hessian, factor, spec)
    assert_same_codes(found, expected, spec)

    damped = hessian + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(WIDTH)
    refined = coordinate_descent.refine(weight, damped, *found, spec)
    assert_same_codes(refined, plain_refine(weight, damped, *expected, spec), spec)
    assert_same_codes(coordinate_descent.CoordinateDescent().choose_codes(weight, hessian, factor, spec), refined, spec)


def assert_same_codes(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], spec: WeightScheme) -> None:
    assert torch.equal(found[1], expected[1])
    codes, wanted = (numerics.quantize(weight, scales, spec.codebook) for weight, scales in (found, expected))
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(found[0], expected[0])  # what else is kept of a weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_searched_scales_are_those_of_a_plain_loop_even_where_costs_overflow(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    spec = SCHEMES[scheme]
    weight, importance = layer("none")[0], torch.linspace(0, 5, WIDTH)
    weight[3, 70], weight[4, 0] = 1e21, 1e30  # the second in a column that does not count
    weight[6] = 0
    expected = plain_search(weight, spec.codebook, spec.group_size, importance)
    for count in (1, 10_000, numerics.SEARCHED_ON_CPU):  # a row at a time, a few, and all
        monkeypatch.setattr(numerics, "SEARCHED_ON_CPU", count)
        assert torch.equal(search_scales(weight, spec.codebook, spec.group_size, importance), expected)


def test_a_start_is_not_changed_by_its_refinement() -> None:
    spec, (weight, hessian) = SCHEMES["4 bits in groups of 32"], layer("none")
    start = gptq.compensate(weight, hessian, gptq.inverse_factor(hessian, "layer"), spec)
    copies = [tensor.clone() for tensor in start]
    coordinate_descent.refine(weight, hessian + torch.eye(WIDTH), *start, spec)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(start, copies, strict=True))


# --- what a GPU waits for ----------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts the calls of operators, and refuses those whose result the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        name = str(function).removeprefix("aten.").partition(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in arguments[1])
        self.counts[name] += 1
        return function(*arguments, **(keywords or {}))


def calls(out: int, width: int, spec: WeightScheme, device: str, method: type[gptq.GPTQ]) -> int:
    """Return how many operators choose the codes of one layer."""
    target = torch.ones(out, width, device=device)
    hessian = factor = torch.ones(width, width, device=device)
    with Calls() as counted:
        weight, scales = method().choose_codes(target, hessian, factor, spec)
    assert weight.shape == target.shape and scales.shape == (out, width // spec.group_size)
    return counted.counts.total()


@pytest.mark.parametrize(("method", "sweeps"), [(gptq.GPTQ, 1), (coordinate_descent.CoordinateDescent, 4)])
def test_no_step_reads_a_number_back_and_all_rows_are_one_call(method: type[gptq.GPTQ], sweeps: int) -> None:
    spec = SCHEMES["4 bits in groups of 32"]
    calls(OUT, WIDTH, spec, "cpu", method)
    # Tensors without numbers, whose calls are those of a GPU.
    few, many = (calls(out, WIDTH, spec, "meta", method) for out in (8, 4096))
    assert few == many
    wider = calls(8, 2 * WIDTH, spec, "meta", method)
    assert (wider - few) / (WIDTH * sweeps) < MOST_CALLS


def test_tokens_that_are_no_padding_are_found_once() -> None:
    keep = KeptTokens.of(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert keep.positions.tolist() == [0, 1, 3] and keep.total == 6
