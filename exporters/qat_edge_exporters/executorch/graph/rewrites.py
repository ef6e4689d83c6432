"""Calls that are rewritten, while a model is traced, into ones that XNNPACK takes.

A part of the graph that XNNPACK does not take ends a delegate, and each delegate costs time in lowering and at every
token. Each call is rewritten to the same function up to float rounding, which tests check:

    x.mean(-1, keepdim=True)    x @ (1/D, ..., 1/D)          RMSNorm would end five delegates a layer
    the same, + epsilon         the product's bias           one operator fewer in each norm
    rotate_half(x)              x @ R, of zeros and ±1        slices of a dynamic shape are not taken
    x.view(1, S, heads, -1)     x.view(1, -1, heads, width)   nor is a shape with a symbol in it
    gelu(x, "tanh")             0.5 x (1 + tanh(...))         XNNPACK takes it for the exact one, 5e-4 off
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import pi, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qat_edge_exporters import compat_transformers


class XnnpackRewrites(TorchFunctionMode):
    """Rewrites the calls of a model inside the block.

    Args:
        constants: receives the matrices that this needs, as parameters of the traced module.
    """

    def __init__(self, constants: nn.ParameterDict) -> None:
        super().__init__()
        self.constants = constants
        # Both keep the tensors they were made from, so that an id stays that of the same tensor.
        self._unsqueezed: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}
        self._means: dict[int, tuple[Tensor, Tensor]] = {}  # by the mean's id: the mean, and what it is the mean of

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.mean, torch.mean) and _is_row_mean(args, kwargs):
            mean = self.mean(args[0])
            # Remembered, as a norm adds its epsilon next.
            self._means[id(mean)] = mean, args[0]
            return mean

        # mean + epsilon: one product with a bias. The product without it is then unused, and is removed.
        if func in (torch.Tensor.add, torch.Tensor.__add__) and id(args[0]) in self._means and type(args[1]) is float:
            return self.mean(self._means[id(args[0])][1], args[1])

        # XNNPACK's partitioner does not look at `approximate`.
        if func is nn.functional.gelu and kwargs.get("approximate") == "tanh":
            return _gelu_tanh(args[0])

        # Heads are split and merged by views whose length is a symbol.
        if func in (torch.Tensor.view, torch.Tensor.reshape) and not kwargs:
            return func(args[0], _shape_without_symbol(args[0].shape, args[1:]))

        # All layers use the same cosines and sines, each of which is unsqueezed in every layer.
        if func is torch.Tensor.unsqueeze and not kwargs:
            key = (id(args[0]), args[1])
            if key not in self._unsqueezed:
                self._unsqueezed[key] = (args[0], _unsqueeze(*args))
            return self._unsqueezed[key][1]

        return func(*args, **kwargs)

    def mean(self, x: Tensor, offset: float | None = None) -> Tensor:
        """Return the mean over channels, (..., 1), plus a norm's epsilon, as one matrix product."""
        width = x.shape[-1]
        # A constant is created in the first run, outside of tracing, and is a parameter afterwards.
        row = self._constant(f"mean_{width}", lambda: torch.full((1, width), 1 / width))
        bias = None if offset is None else self._constant(f"offset_{offset}", lambda: torch.tensor([offset]))
        return nn.functional.linear(x, row, bias)

    def _constant(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        name = name.replace(".", "_")  # a parameter's name may not contain a dot
        if name not in self.constants:
            self.constants[name] = nn.Parameter(make(), requires_grad=False)
        return self.constants[name]


def rotate_half_as_product(model: nn.Module, constants: nn.ParameterDict) -> AbstractContextManager[None]:
    """Inside the block, `rotate_half` of the model's own source file is a product with its matrix.

    Args:
        model: a model of transformers.
        constants: receives the matrices.
    """

    def make(original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def rotate(x: Tensor) -> Tensor:
            name = f"rotate_{x.shape[-1]}"
            if name not in constants:
                rows = original(torch.eye(x.shape[-1]))  # of each unit vector: the matrix, transposed
                constants[name] = nn.Parameter(rows.T.contiguous(), requires_grad=False)
            if x.dim() == 4 and isinstance(x.stride(1), int) and x.stride(1) != x.shape[-1]:
                # Part of each head. The product has the strides of x, as torch would otherwise check, when both are
                # multiplied, whether strides that depend on S are equal.
                return nn.functional.linear(x.transpose(1, 2), constants[name]).transpose(1, 2)
            return nn.functional.linear(x, constants[name])

        return rotate

    return compat_transformers.replace_rotate_half(model, make)


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    """Unsqueeze by a view, which XNNPACK takes if one length is unknown."""
    if dim < 0 or x.dtype != torch.float32 or sum(not isinstance(d, int) for d in x.shape) != 1:
        return x.unsqueeze(dim)
    shape = [d if isinstance(d, int) else -1 for d in x.shape]
    return x.view([*shape[:dim], 1, *shape[dim:]])


def _gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU's approximation by tanh (https://arxiv.org/abs/1606.08415, section 2)."""
    inner = x * (x * x * 0.044715 + 1) * sqrt(2 / pi)
    return x * 0.5 * (torch.tanh(inner) + 1)


def _is_row_mean(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of `mean` is over the last dimension alone, keeps it, and its length is known."""
    if not args:
        return False
    # Positional and keyword arguments by name.
    named = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
    over_channels = named.get("dim") in (-1, [-1], (-1,)) and named.get("keepdim") is True
    return over_channels and set(named) == {"input", "dim", "keepdim"} and isinstance(args[0].shape[-1], int)


def _shape_without_symbol(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """Return the shape of a view with -1 in place of a symbol.

    Args:
        old: sizes of the tensor.
        new: arguments of `view` or `reshape`.

    Returns:
        `new` as it is if it has not exactly the one symbol that `old` has.
    """
    # view(1, 2) and view((1, 2)) are the same.
    if len(new) == 1 and isinstance(new[0], tuple | list):
        new = new[0]
    symbols = [d for d in new if not isinstance(d, int)]
    if len(symbols) != 1 or [d for d in old if not isinstance(d, int)] != symbols:
        return list(new)

    # A -1 that is there already becomes a number: the known sizes of both shapes have the same product.
    known = prod(d for d in old if isinstance(d, int))
    rest = prod(d for d in new if isinstance(d, int) and d != -1)
    return [-1 if not isinstance(d, int) else known // rest if d == -1 else d for d in new]
