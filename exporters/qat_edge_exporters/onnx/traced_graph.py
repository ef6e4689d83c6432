"""Parts of every graph that torch.onnx traces from the model of transformers, with frozen layers as single nodes.

Frozen layers are replaced before by modules that are traced as one node of onnxruntime each, MatMulNBits or
GatherBlockQuantized, and that read a tag in place of their matrix: a number of its own for each module, so that no pass
of the exporter merges two of them, and no matrix is copied. `bind` then puts codes and scales in place of the tags, as
the builder's graphs store them (`olive_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat_edge.errors import ExportError
from qat_edge_exporters.onnx import graph_file, names
from qat_edge_exporters.onnx.builder_process import ACCURACY_LEVEL
from qat_edge_exporters.onnx.olive_checkpoint import block_scales, block_size, packed_codes
from qat_edge_exporters.onnx.traced_names import LINEAR, TABLE, module_of_node, node_name
from qat_edge_exporters.trace_check import ONNX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge.quant.frozen import FrozenWeight

OPSET = 20  # of ai.onnx; the first one with Gelu
DOMAIN = "com.microsoft"
WRAPPED = "model."  # begins the names of the traced model's tensors
TAG = "tag"  # buffer in place of a matrix
FIRST_TAG = 2**40  # no constant of a model has this value
TAG_INPUTS = {LINEAR: 1, TABLE: 0}  # position of the matrix among a node's inputs


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
    """Frozen embedding that is traced as GatherBlockQuantized, and a product with the factor of a scaled one."""

    def __init__(self, tag: int, weight: FrozenWeight, factor: float | None) -> None:
        super().__init__()
        self.width, self.factor = weight.codes.shape[1], factor
        self.attributes = {
            "bits": weight.bits, "block_size": block_size(weight), "gather_axis": 0, "quantize_axis": 1,
        }  # fmt: skip
        self.register_buffer(TAG, torch.tensor([tag]))

    def forward(self, ids: Tensor) -> Tensor:
        rows = _symbolic(TABLE, (self.get_buffer(TAG), ids), self.attributes, (*ids.shape, self.width))
        return rows if self.factor is None else rows * self.factor


def _symbolic(operator: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], shape: tuple[Any, ...]) -> Tensor:
    """Return a float tensor of that shape, which is traced as the output of an operator of onnxruntime."""
    found: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, attributes, dtype=torch.float32, shape=shape, version=1
    )
    return found


def replace_layers(model: PreTrainedModel, weights: Mapping[str, FrozenWeight]) -> None:
    """Replace every frozen layer by a module that is traced as one node.

    Raises:
        ExportError: an embedding does more than look up rows.
    """
    for index, (name, weight) in enumerate(weights.items()):
        module: Any = model.get_submodule(name)
        if not isinstance(module, nn.Embedding):
            model.set_submodule(name, LinearNode(FIRST_TAG + index, weight, module.bias))
        elif type(module).forward is nn.Embedding.forward or hasattr(module, "scalar_embed_scale"):
            factor = getattr(module, "scalar_embed_scale", None)  # of Gemma's class, see `onnx_compat`
            model.set_submodule(name, TableNode(FIRST_TAG + index, weight, factor))
        else:
            raise ExportError(
                f"{type(module).__name__} does more than look up rows, and {ONNX} export does not know what."
            )


def plain_graph(program: torch.onnx.ONNXProgram | None, model: PreTrainedModel) -> onnx.ModelProto:
    """Return the graph that torch.onnx made, without notes on where each node comes from.

    Raises:
        ExportError: it has functions of its own, which no reader of ours knows.
    """
    if program is None or program.model_proto.functions:
        raise ExportError(
            f"{type(model).__name__}: torch.onnx returned no plain graph. `pip show onnxscript` should say 0.7."
        )
    graph = program.model_proto
    _remove_notes(graph)
    return graph


def _remove_notes(graph: onnx.ModelProto) -> None:
    """Remove where in the source code a node comes from, and shapes of values, which onnxruntime infers."""
    del graph.graph.value_info[:], graph.graph.metadata_props[:], graph.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for initializer in graph.graph.initializer:
        del initializer.metadata_props[:]


def bind(graph: onnx.ModelProto, weights: Mapping[str, FrozenWeight]) -> dict[str, NDArray[Any]]:
    """Name nodes after their modules and let them read codes and scales; return the values of these by name.

    Norms and biases get the names of the checkpoint's tensors.

    Raises:
        ExportError: a matrix has no node.
    """
    tensors: dict[str, NDArray[Any]] = {}
    tags = set()
    for node in graph.graph.node:
        if node.op_type not in TAG_INPUTS:
            continue
        position = TAG_INPUTS[node.op_type]
        tags.add(node.input[position])
        module = node.input[position].removeprefix(WRAPPED).removesuffix(f".{TAG}")
        node.name = node_name(module, node.op_type)
        stem, weight = names.initializer_stem(node.name), weights[module]
        codes, scales = f"{stem}.qweight", f"{stem}.scales"
        tensors |= {codes: _stored_codes(weight, node.op_type), scales: block_scales(weight).numpy()}
        node.input[position] = codes
        node.input.append(scales)

    if len(tensors) != 2 * len(weights):
        bound = {module_of_node(node.name) for node in graph.graph.node}
        raise ExportError(f"onnx: {sorted(set(weights) - bound)[0]} is not used by the model's own code.")
    kept = [initializer for initializer in graph.graph.initializer if initializer.name not in tags]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    for name in tensors:
        graph.graph.initializer.add(name=name)
    _name_after_checkpoint(graph)
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


def inline(graph: onnx.ModelProto, tensors: Mapping[str, NDArray[Any]]) -> frozenset[str]:
    """Return the names of initializers that are no float tensors of the checkpoint, defaults of adapters included."""
    return frozenset(
        each.name
        for each in graph.graph.initializer
        if each.name not in tensors and (each.data_type != onnx.TensorProto.FLOAT or graph_file.size(each) <= 1)
    )
