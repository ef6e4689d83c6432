"""Key-value cache and attention in plain ATen operators, for a runtime without ExecuTorch's LLM operators.

The same function as `attention.KeyValueCache`: softmax(q k^T / sqrt(d) + mask) v over the cache. Shapes are chosen so
that XNNPACK takes all of it but the writes: one dimension, G S, is not known beforehand. Per layer, with N heads of
keys and values, G = heads / N queries for each, S new tokens, L positions and D channels:

    keys (N, D, L), values (N, L, D)   written in place by index_put_
    queries (N, G S, D), mask (1, G S, L)

All L positions are read at every step, so they must hold finite numbers before they are written: ExecuTorch's Module,
its Python binding and executor_runner give a program zeroed memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat_edge_exporters.executorch.graph.attention import MASKED, KeyValueCache


class PortableCache(KeyValueCache):
    """Static cache of every layer, `length` tokens long, that needs no operator beyond ATen's."""

    uncomputed: Mapping[str, str] = {"s_aux": "attention sinks that are learned"}

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.masks: dict[tuple[int, int | None], Tensor] = {}  # by queries per key and window, alike in many layers

    def begin(self, start: Any, positions: Tensor) -> None:
        """Take new tokens at `positions` (1, S), the first of them at `start`."""
        super().begin(start, positions)
        self.masks = {}

    def _answer(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        kept: Sequence[Tensor],
        scaling: float | None,
        extras: dict[str, Any],
    ) -> Tensor:
        (query, key, value), (keys, values) = new, kept
        torch.ops.aten.index_put_(keys, [None, None, self.positions], laid_out(rows_of(key).transpose(1, 2)))
        torch.ops.aten.index_put_(values, [None, self.positions], rows_of(value))
        return self._attend(query, keys, values, scaling, extras)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, extras: dict[str, Any]
    ) -> Tensor:
        """Answer (1, S, heads, D) to queries (1, heads, S, D) over keys (N, D, L) and values (N, L, D)."""
        heads, width = query.shape[1], query.shape[3]
        shared = heads // keys.shape[0]
        rows = rows_of(query).view(keys.shape[0], -1, width) * (width**-0.5 if scaling is None else scaling)
        scores = torch.bmm(rows, keys)
        if extras.get("softcap") is not None:
            scores = torch.tanh(scores / extras["softcap"]) * extras["softcap"]
        weights = torch.softmax(scores + self._mask(shared, extras.get("sliding_window")), dim=-1)
        answer = torch.bmm(weights, values).view(keys.shape[0], shared, -1, values.shape[2])
        return laid_out(answer.permute(2, 0, 1, 3)).view(1, -1, heads, values.shape[2])

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        heads = key.shape[1]
        shapes = {"keys": (heads, key.shape[3], self.length), "values": (heads, self.length, value.shape[3])}
        for name, shape in shapes.items():
            self.register_buffer(f"{name}_{layer}", torch.zeros(shape), persistent=False)
        self.layers.add(layer)

    def _mask(self, shared: int, window: int | None) -> Tensor:
        """Added to the scores, (1, G S, L): 0 where a token may look, MASKED elsewhere."""
        if (shared, window) not in self.masks:
            rows = self.positions.repeat(shared).unsqueeze(1)
            columns = torch.arange(self.length).unsqueeze(0)
            hidden = columns > rows
            if window is not None and window < self.length:
                hidden = hidden.logical_or(columns <= rows - window)
            self.masks[shared, window] = (hidden.to(torch.float32) * MASKED).unsqueeze(0)
        return self.masks[shared, window]


def rows_of(x: Tensor) -> Tensor:
    """(1, heads, S, D) as (heads, S, D), laid out in that order."""
    return laid_out(x).view(x.shape[1], -1, x.shape[3])


def laid_out(x: Tensor) -> Tensor:
    """A contiguous copy; `contiguous()` would ask first whether one is needed, which depends on S."""
    return x.clone(memory_format=torch.contiguous_format)
