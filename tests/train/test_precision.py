"""The precision of matrix products follows what the machine multiplies fast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qat_edge.options import FinetuneOptions
from qat_edge.quant.autocast import gains_from_bfloat16
from qat_edge.train import setup

Machine = Callable[..., None]


@pytest.fixture
def cpu_with(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return a function that makes torch see a CPU with the given instruction sets."""

    def use(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    return use


@pytest.mark.parametrize(
    ("capabilities", "gains"),
    [
        ({"avx2": True, "avx512_bw": False}, False),
        ({"avx2": True, "avx512_bw": True}, True),
        ({"avx2": True, "avx_ne_convert": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_auto_is_bf16_where_the_cpu_gains(cpu_with: Machine, capabilities: dict[str, bool], gains: bool) -> None:
    cpu_with(**capabilities)
    assert gains_from_bfloat16("cpu") == gains
    assert setup.choose_precision("auto", "cpu") == ("bf16" if gains else "fp32")
    assert [setup.choose_precision(name, "cpu") for name in ("bf16", "fp32")] == ["bf16", "fp32"]


@pytest.mark.parametrize(("fast", "warned"), [(True, False), (False, True)])
def test_emulated_bfloat16_is_warned_of(cpu_with: Machine, fast: bool, warned: bool, messages: list[str]) -> None:
    cpu_with(avx512_bw=fast)
    setup._choose_machine(FinetuneOptions(model="m", data="d", device="cpu", precision="bf16"))
    assert any("emulates bfloat16" in line for line in messages) == warned
