"""What is handed out again is what would be computed, and it is not computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat_edge.quant.ptq.activation_cache import Replay


class Counted(nn.Linear):
    """A linear layer that knows how often it was computed."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return super().forward(x)


class Toy(nn.Module):
    """A block of two modules with two layers each; the last layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"inner": nn.Sequential(Counted(4, 4), nn.ReLU(), Counted(4, 4))})
        self.mlp = nn.Sequential(Counted(4, 4), nn.ReLU())
        self.last = Counted(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x + self.attention["inner"](x))
        return self.last(x) + self.last(y)


def test_what_is_finished_is_computed_once_a_batch() -> None:
    toy = Toy()
    linears = {name: module for name, module in toy.named_modules() if isinstance(module, Counted)}
    replay, batches = Replay(toy, linears), [torch.randn(3, 4), torch.randn(3, 4)]
    expected = [toy(x) for x in batches]

    def computed_by_two_passes() -> list[int]:
        for layer in linears.values():
            layer.times = 0
        for _ in range(2):
            for x, wanted in zip(batches, expected, strict=True):
                with replay.on():
                    replay.begin(x)
                    assert torch.equal(toy(x), wanted)
        assert not any("forward" in vars(module) for module in toy.modules())
        return [layer.times for layer in linears.values()]

    first, second, third, last = linears
    assert computed_by_two_passes() == [4, 4, 4, 8]
    replay.finish([first])
    assert computed_by_two_passes() == [2, 4, 4, 8]
    replay.finish([second])
    assert computed_by_two_passes() == [0, 2, 4, 8]  # the first was kept until all of attention was
    replay.finish([third, last])
    assert computed_by_two_passes() == [0, 0, 2, 4]
    assert replay.finished == list(linears)
    with replay.on():
        replay.begin(None)
        toy(torch.randn(3, 4))
    assert [layer.times for layer in linears.values()] == [1, 1, 3, 6]
