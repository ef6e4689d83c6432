"""Sums over tokens, which all calibrated methods use."""

from __future__ import annotations

import pytest
import torch

from qat_edge.quant.ptq.blockwise import gram, token_sum_precision


def test_sums_over_tokens_are_float32_under_autocast_too() -> None:
    rows = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0))
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError), token_sum_precision(rows.device):
            raise KeyError  # the setting is restored even so
        with token_sum_precision(rows.device):
            sums = rows.T @ rows
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    exact = rows.double().T @ rows.double()
    assert sums.dtype == torch.float32 and (sums - exact).norm() < 0.004 * exact.norm()
    assert (sums - sums.to(torch.bfloat16)).abs().max() > 0


@pytest.mark.parametrize("width", [96, 256, 600])
def test_a_sum_over_tokens_is_symmetric_and_complete(width: int) -> None:
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    found, exact = gram(rows), rows.T @ rows
    assert torch.equal(found, found.T) and (found - exact).norm() < 0.004 * exact.norm()


def test_a_sum_over_tokens_of_few_directions_stays_positive() -> None:
    """Damping by a hundredth of the diagonal makes it positive definite: rounding the factors must not undo that."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2048, 3, generator=generator) @ torch.randn(3, 96, generator=generator)
    sums = gram(rows).double()
    assert torch.linalg.eigvalsh(sums)[0] > -1e-3 * sums.diagonal().mean()
