"""A frozen encoder as one program: (input_ids, attention_mask), int64 (1, S) -> its answer, in one call.

The answer is a classifier's logits (1, labels), or a text's embedding (1, width) of length 1. Nothing is kept between
calls, S is any length up to the model's, and no operator beyond ATen's and the embedding's is used. Layer norms are
written with products, which XNNPACK takes where it has no such operator:

    m = x @ (1/D, ..., 1/D)     c = x - m     c * (c^2 @ (1/D, ..., 1/D) + eps)^(-1/2) * w + b
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from executorch.exir import EdgeProgramManager
from torch import Tensor, nn
from torch.export import Dim

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge.models.tasks import Kind
from qat_edge_exporters.executorch.graph import lowering, tracing
from qat_edge_exporters.executorch.graph.attention import MASKED, attention_through
from qat_edge_exporters.executorch.graph.portable_attention import laid_out, rows_of
from qat_edge_exporters.executorch.pte import runner_contract

LEAST = 2  # tokens of a text: its first and last are special ones


class FullAttention:
    """Attention of every token to all that are not padding: softmax(q k^T / sqrt(d) + mask) v."""

    def __init__(self) -> None:
        self.layers: set[int] = set()
        self.mask: Tensor  # (1, 1, S), added to the scores

    def begin(self, attention_mask: Tensor) -> None:
        """Take a text whose tokens are 1 in the mask (1, S), padding 0."""
        self.mask = ((1 - attention_mask.to(torch.float32)) * MASKED).unsqueeze(0)

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
        """Answer (1, S, heads, D) to queries, keys and values (1, heads, S, D)."""
        known = ("dropout", "is_causal", "use_cache", "output_attentions")
        other = sorted(name for name, value in extras.items() if name not in known and value is not None)
        if other or attention_mask is not None:
            raise ExportError(
                f"{type(module).__name__} attends with {', '.join(other) or 'a mask of its own'}, and executorch "
                "export computes plain attention of encoders only."
            )
        self.layers.add(id(module))
        heads, width = query.shape[1], query.shape[3]
        rows = rows_of(query) * (width**-0.5 if scaling is None else scaling)
        columns = laid_out(key.transpose(2, 3)).view(heads, width, -1)
        weights = torch.softmax(torch.bmm(rows, columns) + self.mask, dim=-1)
        answer = torch.bmm(weights, rows_of(value))
        return laid_out(answer.permute(1, 0, 2)).view(1, -1, heads, width), None


class Encoder(nn.Module):
    """What an app calls: input_ids and attention_mask (1, S) -> the answer of `kind` (1, width)."""

    def __init__(self, model: Any, kind: Kind) -> None:
        super().__init__()
        self.model, self.kind, self.attention = model, kind, FullAttention()
        self.constants = nn.ParameterDict()  # of the rewritten idioms, filled by the first run

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.attention.begin(attention_mask)
        with EncoderIdioms(self.constants):
            return self.kind.answer(self.model, input_ids, attention_mask)


class EncoderIdioms(tracing.Idioms):
    """The decoder's, and layer norms as products."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.layer_norm:
            return self._layer_norm(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _layer_norm(self, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        centred = x - self.mean(x)
        normed = centred * torch.rsqrt(self.mean(centred * centred, eps))
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias


def lower(model: Any, kind: Kind, length: int, portable: bool) -> tuple[EdgeProgramManager, dict[str, str]]:
    """A frozen encoder for texts of up to `length` tokens, in XNNPACK's delegates; names of its weights' buffers.

    Raises:
        ExportError: attention of another form, or code that cannot be traced or compiled.
    """
    names = tracing.quantize_modules(model, portable)
    progress.info("exporting the graph")
    encoder = Encoder(model, kind).eval()
    ids = torch.zeros(1, LEAST + 1, dtype=torch.int64), torch.ones(1, LEAST + 1, dtype=torch.int64)
    with attention_through(encoder.attention, model.config), tracing.traced(model):
        answer = encoder(*ids)  # makes the constants before they are traced
        tracing.check_attention(model, len(encoder.attention.layers))
        tokens = {1: Dim("tokens", min=LEAST, max=length)}
        program = torch.export.export(encoder, ids, dynamic_shapes=(tokens, tokens), strict=False)
    progress.info(f"texts of up to {length} tokens, answered by {answer.shape[1]} numbers")
    progress.info("preparing the graph for XNNPACK")
    methods = runner_contract.encoder_methods(length, answer.shape[1])
    return lowering.lower(program, methods), names
