"""Trace a frozen encoder into an ONNX graph: input_ids and attention_mask (batch, tokens) -> one output for each text.

The output is a classifier's logits, or a text's embedding of length 1. The function is `ModelTask.predict`, with token
types and pooling inside, as in a .pte.

Frozen layers become single nodes of onnxruntime (`traced_graph`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim

from qat_edge import progress
from qat_edge.models.tasks import ModelTask
from qat_edge_exporters.compat_transformers import replace_attention
from qat_edge_exporters.full_attention import FullAttention
from qat_edge_exporters.onnx import encoder_names, traced_graph
from qat_edge_exporters.onnx.traced_graph import OPSET
from qat_edge_exporters.trace_check import ONNX, check_attention, tracing_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge.quant.frozen import FrozenWeight

ATTENTION_NAME = "qat_edge_onnx"  # in AttentionInterface; transformers builds no mask for a name it does not know
FEWEST_TOKENS = 2  # of a text: its first and last are special ones


class BatchedAttention(FullAttention):
    """Attention as products over all texts and heads of a batch."""

    def compute(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return outputs (batch, S, heads, D) for queries, keys and values (batch, heads, S, D)."""
        scores = torch.matmul(query * scaling, key.transpose(2, 3)) + self.mask.unsqueeze(1)
        return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2)


class TracedEncoder(nn.Module):
    """The function that an app calls: input_ids and attention_mask (batch, tokens) -> output of the task."""

    def __init__(self, model: PreTrainedModel, task: ModelTask) -> None:
        super().__init__()
        self.model, self.task, self.attention = model, task, BatchedAttention(ONNX)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.attention.begin(attention_mask)
        return self.task.predict(self.model, input_ids, attention_mask)


class EncoderGraph(NamedTuple):
    """A graph that is not yet written.

    Attributes:
        model: the graph; initializers of matrices have no values.
        tensors: their values, by name.
        inline: names of initializers that stay in the graph file: shapes, indices and single numbers.
        width: numbers in the output for a text.
    """

    model: onnx.ModelProto
    tensors: dict[str, NDArray[Any]]
    inline: frozenset[str]
    width: int


def build(model: PreTrainedModel, task: ModelTask, weights: Mapping[str, FrozenWeight], length: int) -> EncoderGraph:
    """Trace a frozen encoder for texts of up to `length` tokens; its frozen layers are replaced in place.

    Raises:
        ExportError: attention of another form, or code that cannot be traced.
    """
    traced_graph.replace_layers(model, weights)
    graph = _trace(model, task, length)
    tensors = traced_graph.bind(graph, weights)

    width = graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    settings = {encoder_names.MAX_LENGTH: str(length), encoder_names.OUTPUT_WIDTH: str(width)}
    helper.set_model_props(graph, settings)
    return EncoderGraph(graph, tensors, traced_graph.inline(graph, tensors), width)


def _trace(model: PreTrainedModel, task: ModelTask, length: int) -> onnx.ModelProto:
    """Return the graph with tags in place of matrices."""
    encoder = TracedEncoder(model, task).eval()
    # Two texts of three tokens: torch.export takes sizes of 0 and 1 for constants.
    ids = torch.ones(2, FEWEST_TOKENS + 1, dtype=torch.int64)
    sizes = {0: Dim("batch"), 1: Dim("tokens", min=FEWEST_TOKENS, max=length)}
    progress.info("exporting the graph")
    with replace_attention(ATTENTION_NAME, encoder.attention.attend, model.config), tracing_errors(model, ONNX):
        # strict=False traces Python as it runs. Before torch.onnx, which would hide the reason of a failure.
        traced = torch.export.export(encoder, (ids, torch.ones_like(ids)), dynamic_shapes=(sizes, sizes), strict=False)
        check_attention(model, len(encoder.attention.layers), ONNX)
        program = torch.onnx.export(
            traced, dynamo=True, dynamic_shapes=(sizes, sizes), opset_version=OPSET, verbose=False,
            input_names=encoder_names.INPUTS, output_names=[encoder_names.output_name(task)],
        )  # fmt: skip
    return traced_graph.plain_graph(program, model)
