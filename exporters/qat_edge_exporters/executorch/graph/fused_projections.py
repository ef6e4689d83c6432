"""Linear layers that read one tensor, such as q, k and v, as one matrix product whose columns are then split.

Rows are concatenated: codes, scales and results stay as they are, bit for bit. A token of SmolLM2-135M then takes 120
products instead of 210. Layers are found by running the model: those that are called one after the other with the same
tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat_edge.quant.autocast import trial_pass
from qat_edge_exporters.executorch.graph.quantized_modules import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEPARATOR = "+"  # between the names of the layers in the name of their product


class FusedLinear(QuantizedLinear):
    """Several layers of one input as one product."""

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        nn.Module.__init__(self)
        first = layers[0]
        self.quantize_input, self.bits, self.group_size = first.quantize_input, first.bits, first.group_size
        for name in ("codes", "scales", "zeros"):
            self.register_buffer(name, torch.cat([layer.get_buffer(name) for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self._ends = list(accumulate(len(layer.get_buffer("codes")) for layer in layers))
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    def columns_of(self, index: int, x: Tensor) -> Tensor:
        """Return the output of one of the layers, (..., its rows), for their input (..., in)."""
        # By identity: the layers are called one after the other with the same tensor.
        if self._input is not x:
            product = self(x)
            # Slices, because XNNPACK takes no operator that splits.
            begins = [0, *self._ends[:-1]]
            self._outputs = [product[..., begin:end] for begin, end in zip(begins, self._ends, strict=True)]
            self._input = x
        return self._outputs[index]


class FusedPart(nn.Module):
    """One of the layers that a `FusedLinear` computes. The first of them has it as a submodule."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self._index = index
        if index == 0:
            self.fused = fused
        else:
            vars(self)["fused"] = fused  # not a submodule, of which each buffer has one name

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.columns_of(self._index, x)


def fuse_projections(
    model: PreTrainedModel, names: dict[str, str], excluded: Collection[str] = ()
) -> dict[str, dict[str, int]]:
    """Fuse the layers of one input, in place.

    Args:
        model: with `QuantizedLinear` layers.
        names: of the frozen weights, the buffer's -> the module's. Those of fused layers are replaced by one.
        excluded: names of layers that stay by themselves.

    Returns:
        Rows of each layer, by the name of the product and the name of the layer.
    """
    rows = {}
    for group in _groups(model, excluded):
        layers: list[Any] = [model.get_submodule(name) for name in group]
        fused, title = FusedLinear(layers), SEPARATOR.join(group)
        for index, name in enumerate(group):
            model.set_submodule(name, FusedPart(fused, index))
            del names[_buffer(name)]
        names[_buffer(f"{group[0]}.fused")] = title
        rows[title] = {name: len(layer.codes) for name, layer in zip(group, layers, strict=True)}
    return rows


def _buffer(module: str) -> str:
    """Return the name of a layer's codes; the traced module holds the model as its attribute `model`."""
    return f"model.{module}.codes"


def _groups(model: PreTrainedModel, excluded: Collection[str]) -> list[list[str]]:
    """Return the names of layers that can be fused, at least two each."""
    calls: list[tuple[str, QuantizedLinear, Tensor]] = []
    with _recorded_calls(model, calls), trial_pass(model) as device:
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)

    counts = Counter(name for name, _, _ in calls)
    groups: list[list[str]] = []
    previous: tuple[Any, Tensor] | None = None
    for name, layer, x in calls:
        # A layer that is called twice, as in a shared block, has no one place.
        alone = name in excluded or counts[name] > 1
        key = (layer.bits, layer.group_size, layer.bias is None)
        if previous is not None and not alone and previous[0] == key and previous[1] is x:
            groups[-1].append(name)
        else:
            groups.append([name])
        previous = None if alone else (key, x)
    return [group for group in groups if len(group) > 1]


@contextmanager
def _recorded_calls(model: nn.Module, calls: list[tuple[str, QuantizedLinear, Tensor]]) -> Iterator[None]:
    """Record calls of all `QuantizedLinear` layers inside the block; they return zeros, without multiplying."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}

    def record(name: str, layer: QuantizedLinear, x: Tensor) -> Tensor:
        calls.append((name, layer, x))
        return x.new_zeros((*x.shape[:-1], len(layer.get_buffer("codes"))))

    for name, layer in layers.items():
        vars(layer)["forward"] = lambda x, name=name, layer=layer: record(name, layer, x)
    try:
        yield
    finally:
        for layer in layers.values():
            del vars(layer)["forward"]
