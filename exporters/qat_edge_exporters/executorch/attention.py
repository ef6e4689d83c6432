"""Key-value cache and attention as ExecuTorch's LLM operators, behind transformers' AttentionInterface.

The cache lives in buffers that `llama.update_cache` mutates; `llama.custom_sdpa` reads them causally from the
position it is given, so a mask is built only where a layer looks back over a window. Both take (batch, position,
head, channel).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers torch.ops.llama
from torch import Tensor, nn
from transformers import AttentionInterface

from qat_edge.errors import ExportError

MASKED = -1e9  # added to a score: exp() of it is 0, and a block of keys that are all masked leaves no NaN
NAME = "qat_edge_executorch"  # of the attention function while a model is traced; transformers builds no mask for it


class KeyValueCache(nn.Module):
    """Static cache of every layer, `length` tokens long.

    The first call for a layer only makes its buffers, of the shapes its attention really has.
    """

    start: Any = 0  # position of the first new token: an int, or a symbol while tracing

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.layers: set[int] = set()
        self.positions: Tensor  # (S,) of the new tokens
        self.windows: dict[int, Tensor] = {}  # masks by window, alike in many layers

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
        keys, values = self.get_buffer(f"keys_{layer}"), self.get_buffer(f"values_{layer}")
        return self._answer((query, key, value), (keys, values), scaling, extras), None

    def _check(self, module: nn.Module, attention_mask: Tensor | None, extras: dict[str, Any]) -> None:
        _refuse(module, attention_mask, extras)

    def _answer(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        kept: tuple[Tensor, Tensor],
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


@contextmanager
def attention_through(cache: KeyValueCache, config: Any) -> Iterator[None]:
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


def _refuse(module: nn.Module, mask: Tensor | None, extras: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux"):
        if extras.get(name) is not None:
            raise ExportError(
                f"{type(module).__name__} uses {name}, which ExecuTorch's attention operator cannot compute; "
                "this architecture cannot be exported to executorch."
            )
    if mask is not None:
        raise ExportError(f"{type(module).__name__} makes an attention mask of its own; only causal ones export.")
