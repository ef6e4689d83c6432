"""Memory of tensors: their bytes at every moment, counted while code runs on real tensors or on fake ones.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes, types and storages without memory, so that a training step
of the real code can be run for its memory alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ATEN = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operators have returned inside the block and that still exist.

    Attributes:
        live_bytes: Now.
        peak_bytes: Largest value of `live_bytes` since the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak_bytes = self.live_bytes

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that no operator returned inside the block, and return the bytes of those that were new."""
        before = self.live_bytes
        for tensor in tensors:
            # A quantized tensor consists of others.
            inner = getattr(tensor, "__tensor_flatten__", None)
            if inner is not None:
                self.add(getattr(tensor, name) for name in inner()[0])
            else:
                self._add_storage(tensor.untyped_storage())
        return self.live_bytes - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count the storages that it returns."""
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _add_storage(self, storage: torch.UntypedStorage) -> None:
        # Views share the storage, whose Python object may be another one each time.
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live_bytes += self._sizes[key]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


class AssumedValues(TorchDispatchMode):
    """Let code that reads values of tensors run on fake ones: every flag and every element of a mask is True.

    Other numbers are 1 if they are floats, and 0 if they are integers, which are codes of errors.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the assumed value of a number, and run all other operators without masks."""
        if func is ATEN._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 0
        if func is ATEN.equal.default:
            return True
        return func(*tree_map(_as_positions, args, is_leaf=_is_indices), **(kwargs or {}))


def _is_indices(value: Any) -> bool:
    """Return whether an argument is a list of indices with a mask among them."""
    return isinstance(value, list) and any(isinstance(each, Tensor) and each.dtype is torch.bool for each in value)


def _as_positions(value: Any) -> Any:
    """Replace masks in a list of indices by the positions of all their elements, as torch does where all are True."""
    if not _is_indices(value):
        return value
    positions: list[Any] = []
    for each in value:
        if isinstance(each, Tensor) and each.dtype is torch.bool:
            positions += [torch.zeros(each.numel(), dtype=torch.int64, device=each.device) for _ in each.shape]
        else:
            positions.append(each)
    return positions
