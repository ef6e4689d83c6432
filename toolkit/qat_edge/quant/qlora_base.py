"""Frozen base weights held in 4 or 8 bits while adapters train: QLoRA (https://arxiv.org/abs/2305.14314).

    nf4   torchao's NF4Tensor: codes for the quantiles of a normal distribution, a scale for every 64 weights,
          those scales in int8 again; 0.52 bytes a weight
    int8  `numerics`: symmetric codes, one scale a row; 1 byte a weight

Weights are dequantized where they are used, in the forward and again in the backward pass, one layer at a time. What
they were before is gone: the dequantized weight is the base that adapters are added to, in training and in the merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

from qat_edge.quant import numerics

NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256  # weights a scale, scales a scale of their own: the paper's


class StoredWeight(nn.Module):
    """A weight (out, in) in few bits. Its tensors follow the model from device to device and are saved nowhere."""

    def dequantize(self) -> Tensor:
        """The weight that is trained on: (out, in), float32."""
        raise NotImplementedError

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.buffers()).device


class Nf4Weight(StoredWeight):
    """A weight as torchao's NF4Tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # Narrow layers have fewer scales than the paper's block of scales holds.
        block = math.gcd(NF4_BLOCK, weight.numel())
        scale_block = math.gcd(NF4_SCALE_BLOCK, weight.numel() // block)
        blocks = weight.float().reshape(-1, block).clone()
        # Nothing but zeros has no largest weight to divide by: one that is next to nothing lets the others be zero.
        blocks[blocks.abs().amax(1) == 0, 0] = torch.finfo(blocks.dtype).tiny
        self.data: Any
        self.register_buffer("data", to_nf4(blocks.reshape(weight.shape), block, scale_block), persistent=False)

    def dequantize(self) -> Tensor:
        return torch.as_tensor(self.data.get_original_weight())

    @property
    def size_bytes(self) -> int:
        names, _ = self.data.__tensor_flatten__()
        return sum(_size_bytes(getattr(self.data, name)) for name in names)


class Int8Weight(StoredWeight):
    """A weight as codes (out, in) and one scale a row (out, 1)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.float()
        scales = numerics.choose_scales(weight, 8, weight.shape[1])
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", numerics.quantize(weight, scales, 8), persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def dequantize(self) -> Tensor:
        return numerics.dequantize(self.codes, self.scales)

    @property
    def size_bytes(self) -> int:
        return _size_bytes(self.codes) + _size_bytes(self.scales)


KINDS: dict[str, type[Nf4Weight | Int8Weight]] = {"nf4": Nf4Weight, "int8": Int8Weight}


class DequantizedLinear(torch.autograd.Function):
    """`x W^T + b` that keeps neither the dequantized weight nor the input for the backward pass: dX = dY W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: StoredWeight, bias: Tensor | None) -> Tensor:
        """x: (..., in) -> (..., out). The bias is frozen like the weight."""
        device = x.device.type
        ctx.stored, ctx.x_dtype = stored, x.dtype
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            weight = stored.dequantize().to(ctx.dtype)
            return functional.linear(x.to(ctx.dtype), weight, None if bias is None else bias.to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        """Gradient of x alone."""
        with torch.autocast(grads[0].device.type, enabled=False):
            return (grads[0].to(ctx.dtype) @ ctx.stored.dequantize().to(ctx.dtype)).to(ctx.x_dtype), None, None


class StoredLinear(nn.Linear):
    """A linear layer whose weight is stored in few bits. `store` makes them, `make_dense` undoes it.

    dense_class: what the layer is once its weight is dense.
    """

    stored: StoredWeight
    dense_class: type[nn.Linear]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (out, in), anew at every call: writing into it changes nothing."""
        return self.stored.dequantize()

    def forward(self, input: Tensor) -> Tensor:
        return torch.as_tensor(DequantizedLinear.apply(input, self.stored, self.bias))


def store(model: nn.Module, names: Iterable[str], kind: str) -> tuple[int, int]:
    """Hold the weights of these linear layers as `kind`, one of KINDS, in place.

    Returns what they took in memory and what they take now, in bytes.
    """
    before = after = 0
    for name in names:
        module: Any = model.get_submodule(name)
        weight = module.weight.detach()
        stored = KINDS[kind](weight)
        before, after = before + _size_bytes(weight), after + stored.size_bytes
        del module.weight
        theirs = type(module)
        # A subclass keeps its forward, whose super() now reaches ours.
        plain = theirs is nn.Linear
        module.__class__ = StoredLinear if plain else type(f"Stored{theirs.__name__}", (theirs, StoredLinear), {})
        module.stored, module.dense_class = stored, theirs
    return before, after


def make_dense(layer: nn.Linear, weight: Tensor | None = None) -> None:
    """Give a layer a frozen float32 weight (out, in), its own dequantized one by default; it is stored no more."""
    found = layer.weight.detach() if weight is None else weight
    module: Any = layer
    if isinstance(layer, StoredLinear):
        module.__class__ = layer.dense_class
        del module.stored, module.dense_class
    module.weight = nn.Parameter(found, requires_grad=False)


def dense(weight: Tensor | StoredWeight) -> Tensor:
    """The weight (out, in) itself, whichever way it is held."""
    return weight.dequantize() if isinstance(weight, StoredWeight) else weight


def held(layer: nn.Linear) -> Tensor | StoredWeight:
    """A layer's weight the way it is held."""
    return layer.stored if isinstance(layer, StoredLinear) else layer.weight


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
