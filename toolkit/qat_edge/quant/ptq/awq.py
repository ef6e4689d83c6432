"""AWQ (https://arxiv.org/abs/2306.00978): round columns with large inputs more finely, at no cost at run time.

Column k of a matrix is multiplied by s_k and its input divided by it, which changes nothing before rounding:

    s = mean|x|^alpha, over its geometric middle        y = (W diag(s)) (x / s)

alpha is searched per group of layers that share an input, for the least output error with weights and inputs rounded.
The division is folded into the module that produces the input: the weight of a norm, or the output rows of the linear
layer before. That module is found by trial: a candidate is accepted if scaling it leaves the block's outputs as they
were. So a norm that stores weight - 1 is handled, and an input with a second reader is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat_edge.quant import numerics
from qat_edge.quant.ptq.block_calls import KeptTokens
from qat_edge.quant.ptq.blockwise import Block, token_rows
from qat_edge.quant.ptq.hqq import search_scales
from qat_edge.quant.scheme import WeightScheme
from qat_edge.readers import counted

ALPHAS = [step / 20 for step in range(20)]  # the paper's grid
SAMPLE = 1024  # tokens that alpha is searched on
# Tolerance relative to the block's residual update, median over tokens. SmolLM2: 0 for the producer of an input, at
# least 0.13 for other modules.
UNCHANGED = 1e-3


@dataclass(frozen=True)
class InputProducer:
    """The module that produces a shared input: a norm or a linear layer.

    Attributes:
        name: Name in the model for a linear layer, in the block for a norm.
        module: The module.
        offset: 1 where a norm stores weight - 1, else 0.
    """

    name: str
    module: Any
    offset: float

    def divide(self, factors: Tensor) -> None:
        """Divide the module's outputs by `factors` (width,), in place."""
        for parameter, offset in ((self.module.weight, self.offset), (getattr(self.module, "bias", None), 0.0)):
            if parameter is not None:
                # Rows of a matrix, elements of a vector.
                shaped = factors.view(-1, *[1] * (parameter.dim() - 1))
                parameter.data.copy_((parameter.data + offset) / shaped - offset)


class _KnownProducer(NamedTuple):
    """The producer found in an earlier block. name: in the block."""

    name: str
    offset: float


@dataclass
class AWQ:
    """AWQ on one block after another.

    Attributes:
        scaled: Names of layers whose columns were scaled.
        unscaled: Names of layers without a module that takes the inverse.
        producers: Found in earlier blocks, by the names of the layers in the block; None where there is none.
    """

    scaled: list[str] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    producers: dict[tuple[str, ...], _KnownProducer | None] = field(default_factory=dict)

    def quantize_block(self, block: Block) -> dict[str, Tensor]:
        """Scale the block's weights in place and fold the inverse; returns the scales of its weights in groups."""
        groups = [names for names in block.input_groups() if any(block.specs[n].has_groups for n in names)]
        inputs = sample_inputs(block, [names[0] for names in groups])

        importance: dict[str, Tensor] = {}
        for names in groups:
            x = inputs.pop(names[0])
            # Without a producer the columns stay as they are, and only the scales are searched.
            producer = self._find_producer(block, names)
            (self.unscaled if producer is None else self.scaled).extend(names)
            if producer is not None:
                # All layers that share the input get the same factors, int8 ones too.
                weights = [(block.linears[n].weight.detach().float(), block.specs[n]) for n in names]
                with torch.autocast(x.device.type, enabled=False):
                    factors = search_factors(x, weights)
                fold(producer, [block.linears[n] for n in names], factors)
                x = x / factors
            importance.update(dict.fromkeys(names, x.square().mean(dim=0)))

        # The scales are searched in any case, for the inputs as they are now.
        scales: dict[str, Tensor] = {}
        for name, spec in block.specs.items():
            if spec.has_groups and name in importance:
                weight = block.linears[name].weight.detach().float()
                scales[name] = search_scales(weight, spec.codebook, spec.group_size, importance[name])
        return scales

    def summary(self) -> list[str]:
        """Return lines for people: how many layers were scaled, and which could not be."""
        lines = [f"AWQ: {counted(len(self.scaled), 'layer')} scaled"]
        if self.unscaled:
            kinds = sorted({name.rpartition(".")[2] for name in self.unscaled})
            lines.append(
                f"AWQ: {counted(len(self.unscaled), 'layer')} not scaled ({', '.join(kinds)}): no module before them "
                "can take the inverse without changing the model. Their scales are searched all the same."
            )
        return lines

    def _find_producer(self, block: Block, names: list[str]) -> InputProducer | None:
        """Find the module that produces the input of `names`; the one of the block before is tried first."""
        # Blocks are alike: names inside the block identify the same layers in the next one.
        prefix = _prefix(block)
        key = tuple(name.removeprefix(prefix) for name in names)
        candidates = candidate_producers(block, names)
        if key in self.producers:
            known = self.producers[key]
            candidates.sort(key=lambda one: (one.name.removeprefix(prefix), one.offset) != known)
        chosen = next((one for one in candidates if is_producer(block, one, names)), None)
        self.producers[key] = (
            None if chosen is None else _KnownProducer(chosen.name.removeprefix(prefix), chosen.offset)
        )
        return chosen


def candidate_producers(block: Block, names: list[str]) -> list[InputProducer]:
    """Return the norms and linear layers of the block that are as wide as the input of `names`."""
    width = block.linears[names[0]].weight.shape[1]
    found = [
        InputProducer(name, module, 0.0)
        for name, module in block.linears.items()
        if name not in names and module.weight.shape[0] == width
    ]
    for name, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.shape == (width,):
            found += [InputProducer(name, module, 0.0), InputProducer(name, module, 1.0)]
    return found


def is_producer(block: Block, candidate: InputProducer, names: list[str]) -> bool:
    """Return whether scaling the inputs of `names` and dividing in `candidate` leaves the block's outputs unchanged."""
    batch = block.batches[0]
    width = block.linears[names[0]].weight.shape[1]
    # Scaling by powers of two is exact, so any change means that the candidate is wrong.
    factors = torch.exp2((torch.arange(width, device=batch.hidden.device) * 7 % 5 - 2).float())
    layers = [block.linears[n] for n in names]

    # Fold, run, and undo.
    before = block.run(batch)
    with _restored([candidate.module, *layers]):
        fold(candidate, layers, factors)
        after = block.run(batch)

    update = token_rows(before - batch.hidden, batch.keep).norm(dim=-1)
    change = token_rows(after - before, batch.keep).norm(dim=-1)
    return bool((change / update.clamp(min=torch.finfo(torch.float32).tiny)).median() < UNCHANGED)


def fold(producer: InputProducer, layers: list[Any], factors: Tensor) -> None:
    """Multiply the columns of `layers` by `factors` (in,) and divide the outputs of `producer` by them, in place."""
    producer.divide(factors)
    for layer in layers:
        layer.weight.data.mul_(factors)


def search_factors(inputs: Tensor, weights: list[tuple[Tensor, WeightScheme]]) -> Tensor:
    """Search the alpha whose rounded layers come closest to the float ones.

    Args:
        inputs: Shape (tokens, in).
        weights: Matrices (out, in) that share these inputs, with their schemes. The error of each counts relative to
            its own output.

    Returns:
        Factors of that alpha, shape (in,).
    """
    # A channel that is always zero must not get a factor of zero.
    magnitude = inputs.abs().mean(dim=0)
    magnitude = magnitude.clamp(min=float(magnitude.max()) * 1e-4 + torch.finfo(torch.float32).tiny)
    best, least = torch.ones_like(magnitude), torch.inf
    expected = [inputs @ weight.T for weight, _ in weights]

    for alpha in ALPHAS:
        # Around 1, so that neither the weights nor the inputs grow as a whole.
        factors = magnitude**alpha
        factors = factors / (factors.max() * factors.min()).sqrt()
        rounded = numerics.fake_quantize_activation(inputs / factors)
        error = 0.0
        for (weight, spec), wanted in zip(weights, expected, strict=True):
            output = rounded @ numerics.fake_quantize_weight(weight * factors, spec.codebook, spec.group_size).T
            error += float((output - wanted).square().sum() / wanted.square().sum())
        if error < least:
            best, least = factors, error
    return best


def sample_inputs(block: Block, names: list[str]) -> dict[str, Tensor]:
    """Sample inputs of layers before they are rounded, evenly from all batches.

    Returns up to about `SAMPLE` tokens of each layer: (tokens, in) by name.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    per_batch = -(-SAMPLE // len(block.batches))
    for batch in block.batches:

        def sample(name: str, x: Tensor, keep: KeptTokens = batch.keep) -> None:
            if name in found:
                rows = token_rows(x, keep)
                every = -(-rows.shape[0] // per_batch)
                found[name].append(rows[::every].clone())

        block.observe(batch, sample)
    return {name: torch.cat(rows) for name, rows in found.items()}


@contextmanager
def _restored(modules: list[Any]) -> Iterator[None]:
    """Restore the weights and biases of these modules when the context closes."""
    parameters = [p for m in modules for p in (m.weight, getattr(m, "bias", None)) if p is not None]
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.data.copy_(values)


def _prefix(block: Block) -> str:
    """Return the part of a layer's name that names the block."""
    return next(iter(block.linears)).split(f".{block.index}.")[0] + f".{block.index}."
