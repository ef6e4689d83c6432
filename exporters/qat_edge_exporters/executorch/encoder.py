"""Trace and lower a frozen encoder: (input_ids, attention_mask), int64 (1, S) -> its output, in one call.

The output is a classifier's logits (1, labels), or a text's embedding (1, width) of length 1. Nothing is kept between
calls, S is any length up to the model's, and only ATen's operators and the embedding's are used. XNNPACK has no layer
norm, so it is written with matrix products:

    m = x @ (1/D, ..., 1/D)     c = x - m     c * (c^2 @ (1/D, ..., 1/D) + eps)^(-1/2) * w + b
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from executorch.exir import EdgeProgramManager
from torch import Tensor, nn
from torch.export import Dim

from qat_edge import progress
from qat_edge.models.tasks import ModelTask
from qat_edge_exporters.executorch.graph import lowering
from qat_edge_exporters.executorch.graph.attention import replace_attention
from qat_edge_exporters.executorch.graph.portable_attention import contiguous, rows_of
from qat_edge_exporters.executorch.graph.quantized_modules import quantize_modules
from qat_edge_exporters.executorch.graph.rewrites import XnnpackRewrites
from qat_edge_exporters.executorch.pte import runner_contract
from qat_edge_exporters.full_attention import FullAttention
from qat_edge_exporters.trace_check import EXECUTORCH, check_attention, tracing_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEWEST_TOKENS = 2  # of a text: its first and last are special ones


class SingleTextAttention(FullAttention):
    """Attention as batched products over the heads of one text, with one unknown dimension each."""

    def compute(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return outputs (1, S, heads, D) for queries, keys and values (1, heads, S, D)."""
        heads, width = query.shape[1], query.shape[3]
        rows = rows_of(query) * scaling
        columns = contiguous(key.transpose(2, 3)).view(heads, width, -1)
        weights = torch.softmax(torch.bmm(rows, columns) + self.mask, dim=-1)
        outputs = torch.bmm(weights, rows_of(value))
        return contiguous(outputs.permute(1, 0, 2)).view(1, -1, heads, width)


class Encoder(nn.Module):
    """The function that an app calls: input_ids and attention_mask (1, S) -> output of the task (1, width)."""

    def __init__(self, model: PreTrainedModel, task: ModelTask) -> None:
        super().__init__()
        self.model, self.task, self.attention = model, task, SingleTextAttention(EXECUTORCH)
        self.constants = nn.ParameterDict()  # of the rewritten calls, filled by the first run

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.attention.begin(attention_mask)
        with EncoderRewrites(self.constants):
            return self.task.predict(self.model, input_ids, attention_mask)


class EncoderRewrites(XnnpackRewrites):
    """The decoder's rewritten calls, and layer norms as products."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.layer_norm:
            return self._layer_norm(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _layer_norm(self, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        # The formula in this file's head; the norm's width is that of x.
        centred = x - self.mean(x)
        normed = centred * torch.rsqrt(self.mean(centred * centred, eps))
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias


class LoweredEncoder(NamedTuple):
    """A program for `export_pte`, and names of its frozen weights: the buffer's -> the module's."""

    edge: EdgeProgramManager
    names: dict[str, str]


def lower(model: PreTrainedModel, task: ModelTask, length: int, portable: bool) -> LoweredEncoder:
    """Lower a frozen encoder for texts of up to `length` tokens into XNNPACK's delegates.

    Raises:
        ExportError: attention of another form, or code that cannot be traced or compiled.
    """
    names = quantize_modules(model, portable)

    # Three tokens: torch.export takes lengths of 0 and 1 for constants.
    progress.info("exporting the graph")
    encoder = Encoder(model, task).eval()
    example = torch.zeros(1, FEWEST_TOKENS + 1, dtype=torch.int64), torch.ones(1, FEWEST_TOKENS + 1, dtype=torch.int64)
    with replace_attention(encoder.attention, model.config), tracing_errors(model, EXECUTORCH):
        # The first run creates the constants, so that tracing finds them, and gives the output's width.
        output = encoder(*example)
        check_attention(model, len(encoder.attention.layers), EXECUTORCH)
        tokens = {1: Dim("tokens", min=FEWEST_TOKENS, max=length)}
        program = torch.export.export(encoder, example, dynamic_shapes=(tokens, tokens), strict=False)

    width = output.shape[1]
    progress.info(f"texts of up to {length} tokens, an output of {width} numbers for each")
    progress.info("preparing the graph for XNNPACK")
    methods = runner_contract.encoder_methods(length, width)
    return LoweredEncoder(lowering.lower(program, methods), names)
