"""Cached outputs equal computed ones, and nothing is computed twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat_edge.quant.ptq.activation_cache import ActivationCache


class Counted(nn.Linear):
    """A linear layer that counts how often it is computed."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return super().forward(x)


class Toy(nn.Module):
    """A block of three parts: two layers in `attention`, one in `mlp`, and a last layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"inner": nn.Sequential(Counted(4, 4), nn.ReLU(), Counted(4, 4))})
        self.mlp = nn.Sequential(Counted(4, 4), nn.ReLU())
        self.last = Counted(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x + self.attention["inner"](x))
        return self.last(x) + self.last(y)


def test_a_finished_layer_is_computed_once_per_batch() -> None:
    toy = Toy()
    linears = {name: module for name, module in toy.named_modules() if isinstance(module, Counted)}
    cache, batches = ActivationCache(toy, linears), [torch.randn(3, 4), torch.randn(3, 4)]
    expected = [toy(x) for x in batches]

    def computations_in_two_passes() -> list[int]:
        for layer in linears.values():
            layer.times = 0
        for _ in range(2):
            for x, wanted in zip(batches, expected, strict=True):
                with cache.enabled():
                    cache.start_pass(x)
                    assert torch.equal(toy(x), wanted)
        assert not any("forward" in vars(module) for module in toy.modules())
        return [layer.times for layer in linears.values()]

    first, second, third, last = linears
    assert computations_in_two_passes() == [4, 4, 4, 8]
    cache.mark_finished([first])
    assert computations_in_two_passes() == [2, 4, 4, 8]
    cache.mark_finished([second])
    assert computations_in_two_passes() == [0, 2, 4, 8]  # only now is attention cached as a whole
    cache.mark_finished([third, last])
    assert computations_in_two_passes() == [0, 0, 2, 4]
    assert cache.finished == list(linears)
    with cache.enabled():
        cache.start_pass(None)
        toy(torch.randn(3, 4))
    assert [layer.times for layer in linears.values()] == [1, 1, 3, 6]


def test_it_is_known_before_a_call_whether_its_output_is_cached() -> None:
    toy, x = Toy(), torch.randn(3, 4)
    linears = {name: module for name, module in toy.named_modules() if isinstance(module, Counted)}
    cache, last = ActivationCache(toy, linears), toy.last
    cache.mark_finished(linears)
    known: list[bool] = []
    last.register_forward_pre_hook(lambda module, _: known.append(cache.returns_cached(module)))
    for batch in (x, x, None):
        with cache.enabled():
            cache.start_pass(batch)
            toy(x)
    assert known == [False, False, True, True, False, False]
    cache.start_pass(x)
    assert not cache.returns_cached(last), "the cache is off"
