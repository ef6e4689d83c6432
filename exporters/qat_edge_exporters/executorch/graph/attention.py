"""Key-value cache and attention as ExecuTorch's LLM operators, behind transformers' AttentionInterface.

The cache lives in buffers that `llama.update_cache` mutates; `llama.custom_sdpa` reads them causally from the
position it is given, so a mask is built only where a layer looks back over a window. Both take (batch, position,
head, channel). In int8, `llama.custom_quantized_sdpa` reads it: products of queries and keys are products of integers.
https://github.com/pytorch/executorch/blob/v1.4.1/extension/llm/custom_ops/op_sdpa_impl.h
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import executorch.kernels.quantized  # noqa: F401  registers what int8 keys and values are rounded by
import torch
import torch.ao.quantization.fx._decomposed
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers torch.ops.llama
from torch import Tensor, nn
from transformers import AttentionInterface

from qat_edge.errors import ExportError

MASKED = -1e9  # added to a score: exp() of it is 0, and a block of keys that are all masked leaves no NaN
NAME = "qat_edge_executorch"  # of the attention function while a model is traced; transformers builds no mask for it


class Attention(Protocol):
    """What answers a model's queries in its own attention's place."""

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
        """As transformers' AttentionInterface calls it."""


class KeyValueCache(nn.Module):
    """Static cache of every layer, `length` tokens long.

    The first call for a layer only makes its buffers, of the shapes its attention really has.
    """

    start: Any = 0  # position of the first new token: an int, or a symbol while tracing
    parts: tuple[str, ...] = ("keys", "values")  # what it keeps of every layer
    # Arguments that this attention ignores, and why: a model that gives one is refused.
    uncomputed: Mapping[str, str] = dict.fromkeys(
        ("softcap", "s_aux"), "which ExecuTorch's attention operator cannot compute"
    )
    kind = "float32"

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.layers: set[int] = set()
        self.positions: Tensor  # (S,) of the new tokens
        self.windows: dict[int, Tensor] = {}  # masks by window, alike in many layers

    @property
    def size_bytes(self) -> int:
        """Of all layers, as the first call has made them."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def describe(self) -> str:
        """What it takes, in words."""
        each = self.size_bytes // self.length
        return f"KV cache in {self.kind}: {each:,} bytes a token, {self.size_bytes / 1e6:.1f} MB for {self.length}"

    def begin(self, start: Any, positions: Tensor) -> None:
        """Take new tokens at `positions` (1, S), the first of them at `start`."""
        self.start, self.positions, self.windows = start, positions[0], {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **extras: Any,  # transformers passes whatever the architecture has
    ) -> tuple[Tensor, None]:
        """Append `key` and `value` (batch, head, position, channel) to the layer's cache and attend to all of it."""
        self._check(module, attention_mask, extras)
        layer: int = module.layer_idx  # type: ignore[assignment]
        if layer not in self.layers:
            self._make_buffers(layer, key, value)
            return torch.zeros_like(query.transpose(1, 2)), None
        kept = [self.get_buffer(f"{part}_{layer}") for part in self.parts]
        return self._answer((query, key, value), kept, scaling, extras), None

    def _check(self, module: nn.Module, attention_mask: Tensor | None, extras: dict[str, Any]) -> None:
        for name, why in self.uncomputed.items():
            if extras.get(name) is not None:
                raise ExportError(
                    f"{type(module).__name__} uses {name}, {why}; this architecture cannot be exported to executorch."
                )
        if attention_mask is not None:
            raise ExportError(f"{type(module).__name__} makes an attention mask of its own; only causal ones export.")

    def _answer(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        kept: Sequence[Tensor],
        scaling: float | None,
        extras: dict[str, Any],
    ) -> Tensor:
        """Append the new keys and values to those kept, and what the new queries find in all: (1, S, heads, D)."""
        (query, key, value), (keys, values) = new, kept
        torch.ops.llama.update_cache(key.transpose(1, 2), keys, self.start)
        torch.ops.llama.update_cache(value.transpose(1, 2), values, self.start)
        mask = self._window(extras.get("sliding_window"))
        answer: Tensor = torch.ops.llama.custom_sdpa(
            query.transpose(1, 2), keys, values, self.start, mask, 0.0, mask is None, scaling
        )
        return answer

    def _window(self, window: int | None) -> Tensor | None:
        """Added to the scores, (S, length): 0 for the last `window` positions, MASKED elsewhere; None: all may look."""
        if window is None or window >= self.length:
            return None
        if window not in self.windows:
            back = self.positions.unsqueeze(1) - torch.arange(self.length).unsqueeze(0)
            hidden = torch.logical_or(back < 0, back >= window)
            self.windows[window] = hidden.to(torch.float32) * MASKED
        return self.windows[window]

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        for name, new in (("keys", key), ("values", value)):
            batch, heads, _, width = new.shape
            empty = torch.zeros(batch, self.length, heads, width)
            self.register_buffer(f"{name}_{layer}", empty, persistent=False)
        self.layers.add(layer)


class Int8Cache(KeyValueCache):
    """Static cache in int8, one asymmetric scale and zero point for each token and head of keys and of values.

    Keys and values are rounded before anything reads them, so that a prompt sees what the tokens after it will see.
    Queries are rounded alike. Positions not yet written are zeros with a scale of zero.
    """

    parts = ("keys", "key_scales", "key_zeros", "values", "value_scales", "value_zeros")
    kind = "int8"

    def _answer(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        kept: Sequence[Tensor],
        scaling: float | None,
        extras: dict[str, Any],
    ) -> Tensor:
        queries, *rounded = (_rounded(x.transpose(1, 2)) for x in new)
        for tensor, cache in zip(itertools.chain(*rounded), kept, strict=True):
            torch.ops.llama.update_cache(tensor, cache, self.start)
        (codes, scales, zeros), mask = queries, self._window(extras.get("sliding_window"))
        keys, key_scales, key_zeros, values, value_scales, value_zeros = kept
        answer: Tensor = torch.ops.llama.custom_quantized_sdpa(
            codes, keys, values, self.start, mask, 0.0, mask is None, scaling,
            zeros, scales, key_zeros, key_scales, value_zeros, value_scales,
        )  # fmt: skip
        return answer

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        widths = (key.shape[3], 1, 1, value.shape[3], 1, 1)
        for part, width in zip(self.parts, widths, strict=True):
            dtype = torch.float32 if part.endswith("scales") else torch.int8
            empty = torch.zeros(key.shape[0], self.length, key.shape[1], width, dtype=dtype)
            self.register_buffer(f"{part}_{layer}", empty, persistent=False)
        self.layers.add(layer)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of (1, S, heads, D), and scales and zero points (1, S, heads, 1) as the attention operator reads them."""
    operators = torch.ops.quantized_decomposed
    scales, zeros = operators.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = operators.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
    return codes, scales.to(torch.float32), zeros.to(torch.int8)


@contextmanager
def attention_through(cache: Attention, config: Any) -> Iterator[None]:
    """Within the block, models of `config` attend through `cache`."""
    before = config._attn_implementation
    AttentionInterface.register(NAME, cache.attend)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del AttentionInterface._global_mapping[NAME]


def check_length(config: Any, context_length: int) -> None:
    """Refuse a context that the model's positions do not reach.

    Raises:
        ExportError: more positions were asked for than the model has.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and context_length > most:
        raise ExportError(
            f"--context-length {context_length}: {config.model_type} has positions for {most} tokens at most. "
            f"Give {most} or less."
        )


def settle_rotary(model: nn.Module, context_length: int) -> None:
    """Fix rotary frequencies that would change with the length of the text; a graph holds one set of them.

    Raises:
        ExportError: the context is longer than the length up to which they stay the same.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind = getattr(module, "rope_type", None)
        if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
            continue
        parameters = getattr(module.config, "rope_parameters", None) or {}
        fallback = module.config.max_position_embeddings
        fixed = parameters.get("original_max_position_embeddings", fallback)
        if context_length > fixed:
            raise ExportError(
                f"--context-length {context_length}: {kind} rotary embeddings change beyond {fixed} tokens, "
                f"and a static graph cannot follow. Give {fixed} or less."
            )
        module.rope_type = "default"  # what it computes up to that length, without looking at the positions
