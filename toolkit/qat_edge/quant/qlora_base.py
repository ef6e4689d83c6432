"""Frozen base weights in 4 or 8 bits while adapters train: QLoRA (https://arxiv.org/abs/2305.14314).

    nf4   torchao's NF4Tensor: codes for the quantiles of a normal distribution, a scale for every 64 weights, those
          scales in int8 again; 0.52 bytes per weight
    int8  `numerics`: symmetric codes, one scale per row; 1 byte per weight

Weights are dequantized where they are used, in the forward pass and again in the backward pass, one layer at a time.
The original values are not kept: the dequantized weight is the base that adapters are added to, in training and in the
merge.
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
from qat_edge.quant.autocast import compute_dtype
from qat_edge.quant.module_class import insert_base

NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256  # weights per scale, scales per scale of their own: the paper's


class QloraWeight(nn.Module):
    """A quantized weight (out, in). Its tensors follow the model from device to device and are never saved."""

    def dequantize(self) -> Tensor:
        """Return the weight that training sees: (out, in), float32."""
        raise NotImplementedError

    @property
    def size_bytes(self) -> int:
        """Memory of codes and scales."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of codes and scales."""
        return next(self.buffers()).device


class Nf4Weight(QloraWeight):
    """A weight as torchao's NF4Tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # Narrow layers have fewer scales than one of the paper's blocks of scales.
        block = math.gcd(NF4_BLOCK, weight.numel())
        scale_block = math.gcd(NF4_SCALE_BLOCK, weight.numel() // block)
        blocks = weight.float().reshape(-1, block).clone()
        # A block of zeros has no largest weight to divide by: give it one value close to zero.
        blocks[blocks.abs().amax(1) == 0, 0] = torch.finfo(blocks.dtype).tiny
        self.data: Any  # NF4Tensor
        self.register_buffer("data", to_nf4(blocks.reshape(weight.shape), block, scale_block), persistent=False)

    def dequantize(self) -> Tensor:
        return torch.as_tensor(self.data.get_original_weight())

    @property
    def size_bytes(self) -> int:
        # Codes, scales, scales of scales, their mean and the codebook.
        names, _ = self.data.__tensor_flatten__()
        return sum(_size_bytes(getattr(self.data, name)) for name in names)


class Int8Weight(QloraWeight):
    """A weight as int8 codes (out, in) and one scale per row (out, 1)."""

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


FORMATS: dict[str, type[Nf4Weight | Int8Weight]] = {"nf4": Nf4Weight, "int8": Int8Weight}


class FrozenLinear(torch.autograd.Function):
    """`x W^T + b` for a W in fewer bits than x, of which nothing is kept for the backward pass: dX = dY W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor | QloraWeight, bias: Tensor | None) -> Tensor:
        """Apply the layer: x (..., in) -> (..., out). The bias is frozen like the weight.

        stored: W (out, in), quantized or in 16 bits.
        """
        # Neither x nor the wide weight is kept: only x needs a gradient, and W is widened again for it.
        ctx.stored, ctx.x_dtype, ctx.dtype = stored, x.dtype, compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = dequantized(stored).to(ctx.dtype)
            return functional.linear(x.to(ctx.dtype), weight, None if bias is None else bias.to(ctx.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        """Return the gradient of x; nothing else is trained."""
        with torch.autocast(grads[0].device.type, enabled=False):
            weight = dequantized(ctx.stored).to(ctx.dtype)
            return (grads[0].to(ctx.dtype) @ weight).to(ctx.x_dtype), None, None


class QloraLinear(nn.Linear):
    """A linear layer with a quantized weight. `quantize_base` makes them, `restore_dense` undoes it.

    Attributes:
        qlora_weight: The quantized weight (out, in).
        dense_class: Class of the layer once its weight is dense again.
    """

    qlora_weight: QloraWeight
    dense_class: type[nn.Linear]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (out, in), computed at every access: writing into it changes nothing."""
        return self.qlora_weight.dequantize()

    def forward(self, input: Tensor) -> Tensor:
        return torch.as_tensor(FrozenLinear.apply(input, self.qlora_weight, self.bias))


def quantize_base(model: nn.Module, names: Iterable[str], format: str) -> tuple[int, int]:
    """Quantize the weights of linear layers, in place.

    Args:
        model: Any model; its layers change their class, not their names.
        names: Linear layers by module name.
        format: One of `FORMATS`.

    Returns:
        Memory of these weights before and after, in bytes.
    """
    before = after = 0
    for name in names:
        module: Any = model.get_submodule(name)
        weight = module.weight.detach()
        quantized = FORMATS[format](weight)
        before, after = before + _size_bytes(weight), after + quantized.size_bytes

        # The parameter goes first: `QloraLinear.weight` is a property of the same name.
        del module.weight
        # Changing the class keeps the layer's place in the model, its bias and its hooks.
        dense_class = type(module)
        module.__class__ = insert_base(dense_class, nn.Linear, QloraLinear, "Qlora")
        module.qlora_weight, module.dense_class = quantized, dense_class
    return before, after


def restore_dense(layer: nn.Linear, weight: Tensor | None = None) -> None:
    """Give a layer a frozen float32 weight (out, in), by default its own dequantized one, and its former class."""
    values = layer.weight.detach() if weight is None else weight
    module: Any = layer
    if isinstance(layer, QloraLinear):
        # Before the weight is set: as a property it could not be.
        module.__class__ = layer.dense_class
        del module.qlora_weight, module.dense_class
    module.weight = nn.Parameter(values, requires_grad=False)


def dequantized(weight: Tensor | QloraWeight) -> Tensor:
    """Return the float weight (out, in) of a quantized or a dense one."""
    return weight.dequantize() if isinstance(weight, QloraWeight) else weight


def base_weight(layer: nn.Linear | nn.Embedding) -> Tensor | QloraWeight:
    """Return a layer's weight as it is stored: quantized or dense."""
    return layer.qlora_weight if isinstance(layer, QloraLinear) else layer.weight


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
