"""A pass that hands out what finished layers said before is the pass that computes them, and spares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from qat_edge.quant import ptq, scheme
from qat_edge.quant.replay import Replay


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


def llama(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def gemma(folder: Path) -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("make", [llama, gemma])
def test_codes_and_scales_are_those_of_passes_that_compute_everything(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (2, 40), generator=generator) for _ in range(3)]
    seen = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]
    found = []
    for finish in (Replay.finish, lambda self, names: self.finished.extend(names)):
        monkeypatch.setattr(Replay, "finish", finish)
        model = make(tiny_model_folder).eval()
        with torch.no_grad():
            scales = ptq.apply(model, scheme.choose(model, 32), "cd", seen, lambda text: None)
        found.append((scales, model.state_dict()))
    for replayed, computed in zip(found[0], found[1], strict=True):
        assert replayed.keys() == computed.keys()
        assert all(torch.equal(replayed[name], computed[name]) for name in computed)
