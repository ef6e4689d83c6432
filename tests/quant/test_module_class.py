"""Modules that change their class in place, and the dtype of custom functions."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from qat_edge.quant.autocast import compute_dtype
from qat_edge.quant.module_class import insert_base, wrap_class


class Negated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Shifted(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input) + 1
        return output


def test_a_plain_module_gets_our_class() -> None:
    assert insert_base(nn.Linear, nn.Linear, Negated, "Our") is Negated


def test_a_subclass_keeps_its_forward_over_our_base() -> None:
    found = insert_base(Doubled, nn.Linear, Negated, "Our")
    layer = Doubled(3, 2)
    x = torch.randn(4, 3)
    expected = -layer(x)
    layer.__class__ = found
    assert found.__name__ == "OurDoubled" and isinstance(layer, Doubled | Negated)
    assert torch.equal(layer(x), expected)


def test_a_wrapped_class_runs_the_original_first() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = layer(x) + 1
    layer.__class__ = wrap_class(nn.Linear, Shifted, "Our")
    assert type(layer).__name__ == "OurLinear" and torch.equal(layer(x), expected)


def test_custom_functions_compute_in_the_dtype_of_autocast() -> None:
    x = torch.zeros(1)
    assert compute_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16


def test_the_names_of_methods_load_no_torch() -> None:
    code = "import sys, qat_edge.quant.ptq.method_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
