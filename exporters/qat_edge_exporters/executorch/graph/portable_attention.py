"""Key-value cache and attention in plain ATen operators, for a runtime without ExecuTorch's LLM operators.

The same function as `attention.KeyValueCache`: softmax(q k^T / sqrt(d) + mask) v over the cache. The shapes are chosen
so that XNNPACK takes everything except the writes: one dimension only, G S, is not known in advance. Per layer, with N
KV heads, G = heads / N queries for each, S new tokens, L positions and D channels:

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

from qat_edge_exporters.executorch.graph.attention import KeyValueCache, Position, QueryKeyValue
from qat_edge_exporters.full_attention import MASKED


class PortableCache(KeyValueCache):
    """Static float32 cache of all layers that needs no operator except ATen's."""

    unsupported: Mapping[str, str] = {"s_aux": "attention sinks that are learned"}

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._masks: dict[tuple[int, int | None], Tensor] = {}  # by G and window, the same for many layers

    def begin(self, start: Position, positions: Tensor) -> None:
        """Prepare for new tokens at `positions`, (1, S), the first of them at `start`."""
        super().begin(start, positions)
        self._masks = {}

    def _update_and_attend(
        self, new: QueryKeyValue, buffers: Sequence[Tensor], scaling: float | None, extras: dict[str, Any]
    ) -> Tensor:
        keys, values = buffers
        # By positions, not by a slice that begins at `start`: XNNPACK takes no shape with two unknowns.
        torch.ops.aten.index_put_(keys, [None, None, self.positions], contiguous(rows_of(new.key).transpose(1, 2)))
        torch.ops.aten.index_put_(values, [None, self.positions], rows_of(new.value))
        return self._attend(new.query, keys, values, scaling, extras)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, extras: dict[str, Any]
    ) -> Tensor:
        """Return outputs (1, S, heads, D) for queries (1, heads, S, D), keys (N, D, L) and values (N, L, D)."""
        # Sizes are numbers here, except for S.
        heads, width = query.shape[1], query.shape[3]
        queries_per_key = heads // keys.shape[0]

        # Grouped-query attention as one batched product: the G queries of a key are rows of one matrix.
        rows = rows_of(query).view(keys.shape[0], -1, width) * (width**-0.5 if scaling is None else scaling)
        scores = torch.bmm(rows, keys)
        # Gemma 2: scores are limited to a range by tanh before they are masked.
        if extras.get("softcap") is not None:
            scores = torch.tanh(scores / extras["softcap"]) * extras["softcap"]
        weights = torch.softmax(scores + self._mask(queries_per_key, extras.get("sliding_window")), dim=-1)

        # (N, G, S, D) -> (1, S, heads, D)
        outputs = torch.bmm(weights, values).view(keys.shape[0], queries_per_key, -1, values.shape[2])
        return contiguous(outputs.permute(2, 0, 1, 3)).view(1, -1, heads, values.shape[2])

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        heads = key.shape[1]
        shapes = {"keys": (heads, key.shape[3], self.length), "values": (heads, self.length, value.shape[3])}
        for name, shape in shapes.items():
            self.register_buffer(f"{name}_{layer}", torch.zeros(shape), persistent=False)
        self.layers.add(layer)

    def _mask(self, queries_per_key: int, window: int | None) -> Tensor:
        """Return what is added to the scores, (1, G S, L): 0 for positions that a token sees, MASKED elsewhere."""
        if (queries_per_key, window) not in self._masks:
            # Rows are the S tokens, repeated for the G queries of a key; columns are positions of the cache.
            rows = self.positions.repeat(queries_per_key).unsqueeze(1)
            columns = torch.arange(self.length).unsqueeze(0)
            hidden = columns > rows
            if window is not None and window < self.length:
                hidden = hidden.logical_or(columns <= rows - window)
            self._masks[queries_per_key, window] = (hidden.to(torch.float32) * MASKED).unsqueeze(0)
        return self._masks[queries_per_key, window]


def rows_of(x: Tensor) -> Tensor:
    """Return (1, heads, S, D) as a contiguous (heads, S, D)."""
    return contiguous(x).view(x.shape[1], -1, x.shape[3])


def contiguous(x: Tensor) -> Tensor:
    """Return a contiguous copy. `Tensor.contiguous` first checks whether one is needed, which depends on S."""
    return x.clone(memory_format=torch.contiguous_format)
