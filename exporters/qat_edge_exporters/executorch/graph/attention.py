"""Key-value cache and attention as ExecuTorch's LLM operators, behind transformers' AttentionInterface.

The cache is kept in buffers that `llama.update_cache` changes in place. `llama.custom_sdpa` reads them causally from a
given position, so a mask is built only for a layer with a sliding window. Both take (batch, position, head, channel).
A cache in int8 is read by `llama.custom_quantized_sdpa`, which multiplies queries and keys as integers.
https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/custom_ops/op_sdpa_impl.h
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import executorch.kernels.quantized  # noqa: F401  registers the operators that quantize keys and values
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers torch.ops.llama
from torch import SymInt, Tensor, nn

from qat_edge.errors import ExportError
from qat_edge.models import positions
from qat_edge_exporters import compat_transformers
from qat_edge_exporters.executorch import compat  # noqa: F401  registers torch.ops.quantized_decomposed
from qat_edge_exporters.full_attention import MASKED

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION_NAME = "qat_edge_executorch"  # in AttentionInterface; transformers builds no mask for a name it does not know
INT8 = (-128, 127)

Position = int | SymInt  # of a token; a symbol while tracing


class QueryKeyValue(NamedTuple):
    """Queries (1, heads, S, D), keys and values (1, KV heads, S, D) of S new tokens."""

    query: Tensor
    key: Tensor
    value: Tensor


class AttentionFunction(Protocol):
    """Replacement for the attention of a model's layers."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **extras: Any,
    ) -> tuple[Tensor, None]:
        """Compute attention; the signature is that of transformers' AttentionInterface."""


class KeyValueCache(nn.Module):
    """Static float32 cache of all layers.

    The first call for a layer only creates its buffers, in the shapes that its attention really has.

    Attributes:
        length: tokens that it holds.
        layers: indices of the layers that have called it.
        start: position of the first new token.
        positions: positions of the new tokens, (S,).
        parts: names of the buffers of one layer, without its index.
        unsupported: arguments that this attention ignores, and why; a model that passes one is rejected.
        precision: for messages.
    """

    start: Position = 0
    parts: tuple[str, ...] = ("keys", "values")
    unsupported: Mapping[str, str] = dict.fromkeys(
        ("softcap", "s_aux"), "which ExecuTorch's attention operator cannot compute"
    )
    precision = "float32"

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.layers: set[int] = set()
        self.positions: Tensor
        self._window_masks: dict[int, Tensor] = {}  # by window, the same for many layers

    @property
    def size_bytes(self) -> int:
        """Bytes of all layers' buffers, which the first call creates."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def describe(self) -> str:
        """Return its precision and size as one line."""
        each = self.size_bytes // self.length
        return (
            f"KV cache in {self.precision}: {each:,} bytes per token, {self.size_bytes / 1e6:.1f} MB for {self.length}"
        )

    def begin(self, start: Position, positions: Tensor) -> None:
        """Prepare for new tokens at `positions`, (1, S), the first of them at `start`."""
        self.start, self.positions, self._window_masks = start, positions[0], {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **extras: Any,  # transformers passes what the architecture has
    ) -> tuple[Tensor, None]:
        """Append `key` and `value` (batch, head, position, channel) to the layer's cache, and attend to all of it.

        Returns:
            Outputs (batch, position, head, channel), and no attention weights.

        Raises:
            ExportError: the layer passes an argument that this attention does not compute.
        """
        self._check_arguments(module, attention_mask, extras)
        layer: int = module.layer_idx  # type: ignore[assignment]

        # The first run only shows the shapes: its output is not used, and nothing is cached yet.
        if layer not in self.layers:
            self._make_buffers(layer, key, value)
            return torch.zeros_like(query.transpose(1, 2)), None

        buffers = [self.get_buffer(f"{part}_{layer}") for part in self.parts]
        return self._update_and_attend(QueryKeyValue(query, key, value), buffers, scaling, extras), None

    def _check_arguments(self, module: nn.Module, attention_mask: Tensor | None, extras: dict[str, Any]) -> None:
        for name, why in self.unsupported.items():
            if extras.get(name) is not None:
                raise ExportError(
                    f"{type(module).__name__} uses {name}, {why}; this architecture cannot be exported to executorch."
                )
        if attention_mask is not None:
            raise ExportError(f"{type(module).__name__} builds its own attention mask; only causal ones export.")

    def _update_and_attend(
        self, new: QueryKeyValue, buffers: Sequence[Tensor], scaling: float | None, extras: dict[str, Any]
    ) -> Tensor:
        """Write the new keys and values into the buffers, and return the outputs (1, S, heads, D)."""
        keys, values = buffers
        # (batch, head, position, channel) -> (batch, position, head, channel)
        torch.ops.llama.update_cache(new.key.transpose(1, 2), keys, self.start)
        torch.ops.llama.update_cache(new.value.transpose(1, 2), values, self.start)

        # Arguments: dropout 0, and whether the operator masks causally by itself.
        mask = self._window_mask(extras.get("sliding_window"))
        outputs: Tensor = torch.ops.llama.custom_sdpa(
            new.query.transpose(1, 2), keys, values, self.start, mask, 0.0, mask is None, scaling
        )
        return outputs

    def _window_mask(self, window: int | None) -> Tensor | None:
        """Return what is added to the scores, (S, length): 0 for the last `window` positions, MASKED elsewhere.

        None if the window covers the whole cache: then the operator masks causally by itself.
        """
        if window is None or window >= self.length:
            return None
        if window not in self._window_masks:
            # How far back each position of the cache is from each new token; negative: it is later.
            distance = self.positions.unsqueeze(1) - torch.arange(self.length).unsqueeze(0)
            hidden = torch.logical_or(distance < 0, distance >= window)
            self._window_masks[window] = hidden.to(torch.float32) * MASKED
        return self._window_masks[window]

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        for name, new in (("keys", key), ("values", value)):
            batch, heads, _, width = new.shape
            empty = torch.zeros(batch, self.length, heads, width)
            self.register_buffer(f"{name}_{layer}", empty, persistent=False)
        self.layers.add(layer)


class Int8Cache(KeyValueCache):
    """Static int8 cache with an asymmetric scale and zero point for each token and head of keys and of values.

    Keys and values are quantized before anything reads them, so a prompt sees the numbers that later tokens will see.
    Queries are quantized the same way. Positions that are not written yet are zeros with a scale of zero.
    """

    parts = ("keys", "key_scales", "key_zeros", "values", "value_scales", "value_zeros")
    precision = "int8"

    def _update_and_attend(
        self, new: QueryKeyValue, buffers: Sequence[Tensor], scaling: float | None, extras: dict[str, Any]
    ) -> Tensor:
        query, key, value = (_quantize_per_token(x.transpose(1, 2)) for x in new)
        # In the order of `parts`: codes, scales and zero points of keys, then those of values.
        for tensor, buffer in zip((*key, *value), buffers, strict=True):
            torch.ops.llama.update_cache(tensor, buffer, self.start)

        mask = self._window_mask(extras.get("sliding_window"))
        keys, key_scales, key_zeros, values, value_scales, value_zeros = buffers
        outputs: Tensor = torch.ops.llama.custom_quantized_sdpa(
            query.codes, keys, values, self.start, mask, 0.0, mask is None, scaling,
            query.zeros, query.scales, key_zeros, key_scales, value_zeros, value_scales,
        )  # fmt: skip
        return outputs

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        widths = (key.shape[3], 1, 1, value.shape[3], 1, 1)
        for part, width in zip(self.parts, widths, strict=True):
            dtype = torch.float32 if part.endswith("scales") else torch.int8
            empty = torch.zeros(key.shape[0], self.length, key.shape[1], width, dtype=dtype)
            self.register_buffer(f"{part}_{layer}", empty, persistent=False)
        self.layers.add(layer)


class QuantizedTokens(NamedTuple):
    """int8 codes (1, S, heads, D), with float32 scales and int8 zero points (1, S, heads, 1)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def _quantize_per_token(x: Tensor) -> QuantizedTokens:
    """Quantize (1, S, heads, D) as `custom_quantized_sdpa` reads it."""
    operators = torch.ops.quantized_decomposed
    # The same parameters as for a linear layer's input: from the extremes of each token and head.
    scales, zeros = operators.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = operators.quantize_per_token(x, scales, zeros, *INT8, torch.int8)
    return QuantizedTokens(codes, scales.to(torch.float32), zeros.to(torch.int8))


def replace_attention(cache: AttentionFunction, config: PretrainedConfig) -> AbstractContextManager[None]:
    """Inside the block, models of `config` compute attention through `cache`."""
    return compat_transformers.replace_attention(ATTENTION_NAME, cache.attend, config)


def check_length(config: PretrainedConfig, context_length: int) -> None:
    """Refuse a context that is longer than the model's positions.

    Raises:
        ExportError: `context_length` exceeds the number of positions that the model has.
    """
    positions.require_positions(context_length, getattr(config, "max_position_embeddings", None))
