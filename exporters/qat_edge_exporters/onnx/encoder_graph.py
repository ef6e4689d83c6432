"""Trace a frozen encoder into an ONNX graph: input_ids and attention_mask (batch, tokens) -> one output for each text.

The output is a classifier's logits, or a text's embedding of length 1. The function is `ModelTask.predict`, with token
types and pooling inside, as in a .pte.

torch.onnx traces the model of transformers. Its frozen layers are replaced before by modules that are traced as one
node of onnxruntime each, MatMulNBits or GatherBlockQuantized, and that read a tag in place of their matrix: a number
of its own for each module, so that no pass of the exporter merges two of them, and no matrix is copied. `_bind` then
puts codes and scales in place of the tags, as a decoder's graph stores them (`olive_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge.models.tasks import ModelTask
from qat_edge_exporters.compat_transformers import replace_attention
from qat_edge_exporters.full_attention import FullAttention
from qat_edge_exporters.onnx import encoder_names, graph_file, names
from qat_edge_exporters.onnx.encoder_names import LINEAR, TABLE
from qat_edge_exporters.onnx.export_onnx import ACCURACY_LEVEL
from qat_edge_exporters.onnx.olive_checkpoint import block_scales, block_size, packed_codes
from qat_edge_exporters.trace_check import ONNX, check_attention, tracing_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge.quant.frozen import FrozenWeight

OPSET = 20  # of ai.onnx; the first one with Gelu
DOMAIN = "com.microsoft"
ATTENTION_NAME = "qat_edge_onnx"  # in AttentionInterface; transformers builds no mask for a name it does not know
FEWEST_TOKENS = 2  # of a text: its first and last are special ones
WRAPPED = "model."  # begins the names of the traced model's tensors
TAG = "tag"  # buffer in place of a matrix
FIRST_TAG = 2**40  # no constant of a model has this value
TAG_INPUTS = {LINEAR: 1, TABLE: 0}  # position of the matrix among a node's inputs


class BatchedAttention(FullAttention):
    """Attention as products over all texts and heads of a batch."""

    def compute(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Return outputs (batch, S, heads, D) for queries, keys and values (batch, heads, S, D)."""
        scores = torch.matmul(query * scaling, key.transpose(2, 3)) + self.mask.unsqueeze(1)
        return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2)


class LinearNode(nn.Module):
    """Frozen linear layer that is traced as MatMulNBits, and a sum with the bias."""

    def __init__(self, tag: int, weight: FrozenWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.rows, width = weight.codes.shape
        self.attributes = {
            "N": self.rows, "K": width, "bits": weight.bits, "block_size": block_size(weight),
            "accuracy_level": ACCURACY_LEVEL,
        }  # fmt: skip
        self.register_buffer(TAG, torch.tensor([tag]))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.rows)
        product = _symbolic(LINEAR, (x, self.get_buffer(TAG)), self.attributes, shape)
        return product if self.bias is None else product + self.bias


class TableNode(nn.Module):
    """Frozen embedding that is traced as GatherBlockQuantized."""

    def __init__(self, tag: int, weight: FrozenWeight) -> None:
        super().__init__()
        self.width = weight.codes.shape[1]
        self.attributes = {
            "bits": weight.bits, "block_size": block_size(weight), "gather_axis": 0, "quantize_axis": 1,
        }  # fmt: skip
        self.register_buffer(TAG, torch.tensor([tag]))

    def forward(self, ids: Tensor) -> Tensor:
        return _symbolic(TABLE, (self.get_buffer(TAG), ids), self.attributes, (*ids.shape, self.width))


def _symbolic(operator: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: tuple[Any, ...]) -> Tensor:
    """Return a float tensor of that shape, which is traced as the output of an operator of onnxruntime."""
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, attributes, dtype=torch.float32, shape=shape, version=1
    )
    return found


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
    _replace_layers(model, weights)
    graph = _trace(model, task, length)

    _remove_notes(graph)
    tensors = _bind(graph, weights)
    _name_after_checkpoint(graph)

    width = graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    settings = {encoder_names.MAX_LENGTH: str(length), encoder_names.OUTPUT_WIDTH: str(width)}
    helper.set_model_props(graph, settings)
    return EncoderGraph(graph, tensors, _inline(graph, tensors), width)


def _replace_layers(model: PreTrainedModel, weights: Mapping[str, FrozenWeight]) -> None:
    """Replace every frozen layer by a module that is traced as one node.

    Raises:
        ExportError: an embedding does more than look up rows.
    """
    for index, (name, weight) in enumerate(weights.items()):
        module: Any = model.get_submodule(name)
        if not isinstance(module, nn.Embedding):
            model.set_submodule(name, LinearNode(FIRST_TAG + index, weight, module.bias))
        elif type(module).forward is nn.Embedding.forward:
            model.set_submodule(name, TableNode(FIRST_TAG + index, weight))
        else:
            raise ExportError(
                f"{type(module).__name__} does more than look up rows, and {ONNX} export does not know what."
            )


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
    if program is None or program.model_proto.functions:
        raise ExportError(
            f"{type(model).__name__}: torch.onnx returned no plain graph. `pip show onnxscript` should say 0.7."
        )
    return program.model_proto


def _remove_notes(graph: onnx.ModelProto) -> None:
    """Remove where in the source code a node comes from, and shapes of values, which onnxruntime infers."""
    del graph.graph.value_info[:], graph.graph.metadata_props[:], graph.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for initializer in graph.graph.initializer:
        del initializer.metadata_props[:]


def _bind(graph: onnx.ModelProto, weights: Mapping[str, FrozenWeight]) -> dict[str, NDArray[Any]]:
    """Name nodes after their modules and let them read codes and scales; return the values of these by name.

    Raises:
        ExportError: a matrix has no node.
    """
    tensors: dict[str, NDArray[Any]] = {}
    tags = set()
    for node in graph.graph.node:
        if node.domain != DOMAIN:
            continue
        position = TAG_INPUTS[node.op_type]
        tags.add(node.input[position])
        module = node.input[position].removeprefix(WRAPPED).removesuffix(f".{TAG}")
        node.name = encoder_names.node_name(module, node.op_type)
        stem, weight = names.initializer_stem(node.name), weights[module]
        codes, scales = f"{stem}.qweight", f"{stem}.scales"
        tensors |= {codes: _stored_codes(weight, node.op_type), scales: block_scales(weight).numpy()}
        node.input[position] = codes
        node.input.append(scales)

    if len(tensors) != 2 * len(weights):
        bound = {encoder_names.module_of_node(node.name) for node in graph.graph.node}
        raise ExportError(f"onnx: {sorted(set(weights) - bound)[0]} is not used by the model's own code.")
    kept = [initializer for initializer in graph.graph.initializer if initializer.name not in tags]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    for name in tensors:
        graph.graph.initializer.add(name=name)
    return tensors


def _stored_codes(weight: FrozenWeight, operator: str) -> NDArray[np.uint8]:
    """Return a matrix's codes as its operator stores them."""
    rows, width = weight.codes.shape
    packed = packed_codes(weight)
    if operator == TABLE:  # no padding of the last block
        return np.ascontiguousarray(packed[:, : width * weight.bits // 8].numpy())
    return packed.reshape(rows, -1, block_size(weight) * weight.bits // 8).contiguous().numpy()


def _name_after_checkpoint(graph: onnx.ModelProto) -> None:
    """Give norms and biases the names of the checkpoint's tensors."""
    renamed = {
        each.name: each.name.removeprefix(WRAPPED)
        for each in graph.graph.initializer
        if each.name.startswith(WRAPPED) and each.data_type == onnx.TensorProto.FLOAT
    }
    for initializer in graph.graph.initializer:
        initializer.name = renamed.get(initializer.name, initializer.name)
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _inline(graph: onnx.ModelProto, tensors: Mapping[str, NDArray[Any]]) -> frozenset[str]:
    """Return the names of initializers that are no float tensors of the checkpoint."""
    return frozenset(
        each.name
        for each in graph.graph.initializer
        if each.name not in tensors and (each.data_type != onnx.TensorProto.FLOAT or graph_file.size(each) == 1)
    )
