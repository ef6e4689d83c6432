"""AWQ (https://arxiv.org/abs/2306.00978): columns with large inputs are rounded more finely, at nothing to run.

Column k of a matrix is multiplied by s_k and its input divided by it, which changes nothing before rounding:

    s = mean|x|^alpha, over its geometric middle        y = (W diag(s)) (x / s)

alpha is searched per group of layers that share an input, for the least output error with weights and inputs rounded.
The division is folded into what makes the input: the weight of a norm, or the output rows of the linear layer
before. What that is, is found by trying: a candidate is taken where scaling it leaves the block's outputs as they
were, so a norm that stores weight - 1 is handled, and an input with a second reader is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat_edge.quant import numerics
from qat_edge.quant.ptq.blockwise import Block, tokens_of
from qat_edge.quant.ptq.hqq import search_scales
from qat_edge.quant.scheme import WeightScheme

ALPHAS = [step / 20 for step in range(20)]  # the paper's grid
SAMPLE = 1024  # tokens an alpha is judged on
UNCHANGED = 1e-3  # of what a block adds, median over tokens; SmolLM2: 0 for what feeds, 0.13 and more for what does not
Key = tuple[str, ...]


@dataclass(frozen=True)
class Feeder:
    """What makes a shared input: a norm or a linear layer. offset: 1 where a norm stores weight - 1."""

    name: str
    module: Any
    offset: float

    def divide(self, factors: Tensor) -> None:
        """Divide its outputs by `factors` (width,), in place."""
        for parameter, offset in ((self.module.weight, self.offset), (getattr(self.module, "bias", None), 0.0)):
            if parameter is not None:
                shaped = factors.view(-1, *[1] * (parameter.dim() - 1))
                parameter.data.copy_((parameter.data + offset) / shaped - offset)


@dataclass
class Balancer:
    """AWQ on one block after another. scaled, unscaled: names of layers; feeders: found in earlier blocks."""

    scaled: list[str] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    feeders: dict[Key, tuple[str, float] | None] = field(default_factory=dict)

    def treat(self, block: Block) -> dict[str, Tensor]:
        """Scale the block's weights in place and fold the inverse; scales of its int4 weights by name."""
        groups = [names for names in block.shared_inputs() if any(block.specs[n].bits == 4 for n in names)]
        inputs = sample_inputs(block, [names[0] for names in groups])
        importance = {}
        for names in groups:
            x = inputs.pop(names[0])
            feeder = self._feeder(block, names)
            (self.unscaled if feeder is None else self.scaled).extend(names)
            if feeder is not None:
                weights = [(block.linears[n].weight.detach().float(), block.specs[n]) for n in names]
                with torch.autocast(x.device.type, enabled=False):
                    factors = search_factors(x, weights)
                fold(feeder, [block.linears[n] for n in names], factors)
                x = x / factors
            importance.update(dict.fromkeys(names, x.square().mean(dim=0)))
        return {
            name: search_scales(
                block.linears[name].weight.detach().float(), spec.bits, spec.group_size, importance[name]
            )
            for name, spec in block.specs.items()
            if spec.bits == 4 and name in importance
        }

    def summary(self) -> list[str]:
        """For people: which layers were scaled, and which could not be."""
        lines = [f"AWQ: {len(self.scaled)} layers scaled"]
        if self.unscaled:
            kinds = sorted({name.rpartition(".")[2] for name in self.unscaled})
            lines.append(
                f"AWQ: {len(self.unscaled)} layers not scaled ({', '.join(kinds)}): nothing before them takes the "
                "inverse without changing the model. Their scales are searched all the same."
            )
        return lines

    def _feeder(self, block: Block, names: list[str]) -> Feeder | None:
        """What makes the input of `names`, tried first where it lay in the block before."""
        prefix = _prefix(block)
        key = tuple(name.removeprefix(prefix) for name in names)
        found = candidates(block, names)
        if key in self.feeders:
            before = self.feeders[key]
            found.sort(key=lambda one: (one.name.removeprefix(prefix), one.offset) != before)
        chosen = next((one for one in found if feeds(block, one, names)), None)
        self.feeders[key] = None if chosen is None else (chosen.name.removeprefix(prefix), chosen.offset)
        return chosen


def candidates(block: Block, names: list[str]) -> list[Feeder]:
    """Norms and linear layers of the block that are as wide as the input of `names`."""
    width = block.linears[names[0]].weight.shape[1]
    found = [
        Feeder(name, module, 0.0)
        for name, module in block.linears.items()
        if name not in names and module.weight.shape[0] == width
    ]
    for name, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.shape == (width,):
            found += [Feeder(name, module, 0.0), Feeder(name, module, 1.0)]
    return found


def feeds(block: Block, feeder: Feeder, names: list[str]) -> bool:
    """Whether scaling the inputs of `names`, and dividing in `feeder`, leaves the block's outputs as they were."""
    batch = block.batches[0]
    width = block.linears[names[0]].weight.shape[1]
    # Powers of two commute with rounding to any float format, so that only a wrong place changes a result.
    factors = torch.exp2((torch.arange(width, device=batch.hidden.device) * 7 % 5 - 2).float())
    layers = [block.linears[n] for n in names]
    before = block.run(batch)
    with _restored([feeder.module, *layers]):
        fold(feeder, layers, factors)
        after = block.run(batch)
    update = tokens_of(before - batch.hidden, batch.keep).norm(dim=-1)
    change = tokens_of(after - before, batch.keep).norm(dim=-1)
    return bool((change / update.clamp(min=torch.finfo(torch.float32).tiny)).median() < UNCHANGED)


def fold(feeder: Feeder, layers: list[Any], factors: Tensor) -> None:
    """Columns of `layers` times `factors` (in,), outputs of `feeder` divided by them; in place."""
    feeder.divide(factors)
    for layer in layers:
        layer.weight.data.mul_(factors)


def search_factors(inputs: Tensor, weights: list[tuple[Tensor, WeightScheme]]) -> Tensor:
    """Factors (in,) of the alpha whose rounded layers come closest to the float ones.

    inputs: (tokens, in); weights: (out, in) with their schemes. The error of each layer counts over its own square.
    """
    magnitude = inputs.abs().mean(dim=0)
    magnitude = magnitude.clamp(min=float(magnitude.max()) * 1e-4 + torch.finfo(torch.float32).tiny)
    best, least = torch.ones_like(magnitude), torch.inf
    expected = [inputs @ weight.T for weight, _ in weights]
    for alpha in ALPHAS:
        factors = magnitude**alpha
        factors = factors / (factors.max() * factors.min()).sqrt()
        rounded = numerics.fake_quantize_activation(inputs / factors)
        error = 0.0
        for (weight, spec), wanted in zip(weights, expected, strict=True):
            output = rounded @ numerics.fake_quantize_weight(weight * factors, spec.bits, spec.group_size).T
            error += float((output - wanted).square().sum() / wanted.square().sum())
        if error < least:
            best, least = factors, error
    return best


def sample_inputs(block: Block, names: list[str]) -> dict[str, Tensor]:
    """Up to `SAMPLE` tokens each layer is given, evenly from all batches, before they are rounded: (tokens, in)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    share = -(-SAMPLE // len(block.batches))
    for batch in block.batches:

        def see(name: str, x: Tensor, keep: Tensor = batch.keep) -> None:
            if name in found:
                rows = tokens_of(x, keep)
                found[name].append(rows[:: -(-rows.shape[0] // share)].clone())

        block.observe(batch, see)
    return {name: torch.cat(rows) for name, rows in found.items()}


@contextmanager
def _restored(modules: list[Any]) -> Iterator[None]:
    """Give weights and biases back as they were."""
    parameters = [p for m in modules for p in (m.weight, getattr(m, "bias", None)) if p is not None]
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.data.copy_(values)


def _prefix(block: Block) -> str:
    """What the names of the block's layers begin with."""
    return next(iter(block.linears)).split(f".{block.index}.")[0] + f".{block.index}."
