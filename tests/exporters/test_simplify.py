"""Operators that change nothing are removed from the graph, and its results stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qat_edge_exporters.executorch.graph.simplify import simplify

HEADS, WIDTH = 4, 8
COSINES = torch.linspace(-1, 1, WIDTH)


class BetweenTransposes(nn.Module):
    """Transpose heads before positions and back, as attention does, and compute `between` in that layout."""

    def __init__(self, between: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.matrix = nn.Parameter(torch.arange(float(WIDTH**2)).view(WIDTH, WIDTH).cos())

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(1, -1, HEADS, WIDTH).transpose(1, 2)
        angles = (x[..., :1] * COSINES).unsqueeze(1)  # (1, 1, S, WIDTH), the same for all heads
        return self.between(heads, angles, self.matrix).transpose(1, 2)


def swaps(program: torch.export.ExportedProgram) -> int:
    return sum(node.target is torch.ops.aten.transpose.int for node in program.graph.nodes)


@pytest.mark.parametrize(
    ("between", "left"),
    [
        (lambda x, angles, matrix: x, 0),
        (lambda x, angles, matrix: x * angles + nn.functional.linear(x, matrix) * angles, 1),  # that of `angles`
        (lambda x, angles, matrix: torch.cat((-x[..., 4:], x[..., :4]), dim=-1).pow(2) / 3.0, 0),
        (lambda x, angles, matrix: x - x.flip(1), 2),  # heads in another order
        (lambda x, angles, matrix: x + x.cumsum(2), 2),  # along positions
        (lambda x, angles, matrix: torch.cat((x, x), dim=1)[:, :HEADS], 2),  # along heads
    ],
)
def test_a_transpose_next_to_its_inverse_is_removed(
    between: Callable[[Tensor, Tensor, Tensor], Tensor], left: int
) -> None:
    model = BetweenTransposes(between)
    x = torch.randn(1, 5, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("length", min=2, max=9)},), strict=False)
    assert swaps(program) >= 2
    simplify(program)
    assert swaps(program) == left
    for given in (x, x[:, :3], torch.cat((x, x[:, :2]), dim=1)):
        torch.testing.assert_close(program.module()(given), model(given))


@pytest.mark.parametrize(("weight", "products"), [(1.0, 0), (0.5, 1)])
def test_a_factor_of_one_is_removed(weight: float, products: int) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((WIDTH,), weight))
            self.column = nn.Parameter(torch.full((1,), weight))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * torch.rsqrt(x) + x[..., :1] * self.weight * self.column  # the second one broadcasts

    x = torch.rand(1, 5, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
    model = Norm()
    program = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("length", min=2, max=9)},), strict=False)
    simplify(program)
    assert sum(n.target is torch.ops.aten.mul.Tensor for n in program.graph.nodes) == 1 + 2 * products
    torch.testing.assert_close(program.module()(x), model(x))
