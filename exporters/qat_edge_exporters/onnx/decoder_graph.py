"""Trace a frozen decoder that onnxruntime-genai's builder does not know into an ONNX graph with a key-value cache.

    input_ids, position_ids (batch, tokens), attention_mask (batch, past + tokens), int64
    past_key_values.L.key, past_key_values.L.value (batch, heads, past, width)
        -> logits (batch, tokens, vocabulary), present.L.key, present.L.value (batch, heads, past + tokens, width)

These are the names and shapes of the builder's own graphs. Attention is the same operator as there,
GroupQueryAttention; all else is traced from the model's code, rotary embeddings included. Frozen layers become single
nodes (`traced_graph`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from qat_edge.quant.rotated_norm import ROTATION, output_rotations
from qat_edge_exporters.compat_transformers import replace_attention
from qat_edge_exporters.decoder_probe import SOFT_CAP, WINDOW
from qat_edge_exporters.onnx import decoder_names, names, traced_graph
from qat_edge_exporters.onnx.adapter_check import FoundInputs
from qat_edge_exporters.onnx.decoder_check import head_of
from qat_edge_exporters.onnx.decoder_signature import CacheShape
from qat_edge_exporters.onnx.half_steps import add_half_steps
from qat_edge_exporters.onnx.traced_graph import DOMAIN, OPSET
from qat_edge_exporters.onnx.traced_names import TABLE, module_of_node
from qat_edge_exporters.onnx.unmerged_adapters import add_adapter_inputs
from qat_edge_exporters.trace_check import ONNX, check_attention, tracing_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge.quant.frozen import FrozenWeight
    from qat_edge.quant.frozen_adapters import Adapter

ATTENTION_NAME = "qat_edge_onnx_decoder"  # in AttentionInterface; transformers builds no mask for an unknown name
# Arguments of transformers' attention call that change nothing in the operator.
IGNORED = ("cache_position", "dropout", "is_causal", "output_attentions", "position_ids", "use_cache")
# Sizes of the traced example: torch.export takes 0 and 1 for constants, and equal sizes for one.
BATCH, TOKENS, PAST = 2, 3, 4


class CachedAttention:
    """Attention of all layers as GroupQueryAttention over keys and values that the caller keeps.

    Attributes:
        shapes: cache of each layer, by its index; the first run finds them.
        present: keys and values of each layer with the new tokens, after a run.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, CacheShape] = {}
        self.present: dict[int, tuple[Tensor, Tensor]] = {}
        self._past: Sequence[Tensor] = ()
        self._last: Tensor
        self._total: Tensor
        self._length: Any = 0

    def begin(self, attention_mask: Tensor, past: Sequence[Tensor]) -> None:
        """Prepare for new tokens. past: keys and values of each layer in turn, none in the run that finds shapes."""
        self._past, self.present, self._length = past, {}, attention_mask.shape[1]
        # The operator gets the index of the last token of each text, and the size of the mask.
        self._last = (attention_mask.sum(1) - 1).to(torch.int32)
        self._total = torch.ones_like(attention_mask[0]).sum().to(torch.int32)

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
        """Return outputs (batch, S, heads, D) for queries, keys and values (batch, heads, S, D) of new tokens.

        Raises:
            ExportError: the layer passes an argument that the operator does not compute.
        """
        self._check_arguments(module, attention_mask, extras)
        layer: int = module.layer_idx  # type: ignore[assignment]
        batch, heads, tokens, width = query.shape
        if not self._past:
            self.shapes[layer] = CacheShape(key.shape[1], key.shape[3])
            return torch.zeros_like(query.transpose(1, 2)), None

        shape = self.shapes[layer]
        present = (batch, shape.heads, self._length, shape.width)
        inputs = [x.transpose(1, 2).reshape(batch, tokens, x.shape[1] * width) for x in (query, key, value)]
        outputs, keys, values = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{names.ATTENTION}",
            (*inputs, self._past[2 * layer], self._past[2 * layer + 1], self._last, self._total),
            self._attributes(heads, shape.heads, width**-0.5 if scaling is None else scaling, extras),
            dtypes=(torch.float32,) * 3,
            shapes=((batch, tokens, heads * width), present, present),
            version=1,
        )
        self.present[layer] = (keys, values)
        return outputs.reshape(batch, tokens, heads, width), None

    @staticmethod
    def _check_arguments(module: nn.Module, attention_mask: Tensor | None, extras: Mapping[str, Any]) -> None:
        known = (*IGNORED, WINDOW, SOFT_CAP)
        other = sorted(name for name, given in extras.items() if name not in known and given is not None)
        if other or attention_mask is not None:
            raise ExportError(
                f"{type(module).__name__} attends with {', '.join(other) or 'its own mask'}, which onnxruntime's "
                f"{names.ATTENTION} does not compute."
            )

    @staticmethod
    def _attributes(heads: int, key_heads: int, scaling: float, extras: Mapping[str, Any]) -> dict[str, Any]:
        found = {"num_heads": heads, "kv_num_heads": key_heads, "scale": float(scaling)}
        if extras.get(WINDOW) is not None:
            found["local_window_size"] = int(extras[WINDOW])
        if extras.get(SOFT_CAP) is not None:
            found["softcap"] = float(extras[SOFT_CAP])
        return found


class TracedDecoder(nn.Module):
    """The function that a runtime calls; see the module's docstring."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.attention = model, CachedAttention()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        self.attention.begin(attention_mask, past)
        logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        present = [tensor for layer in sorted(self.attention.present) for tensor in self.attention.present[layer]]
        return logits, *present


class DecoderGraph(NamedTuple):
    """A graph that is not yet written.

    Attributes:
        model: the graph; initializers of matrices have no values.
        tensors: their values, by name.
        inline: names of initializers that stay in the graph file: shapes, indices and single numbers.
        adapter: matrices of the unmerged adapter, by name of their input.
        cache: heads and width of every layer's keys and values.
    """

    model: onnx.ModelProto
    tensors: dict[str, NDArray[Any]]
    inline: frozenset[str]
    adapter: dict[str, NDArray[np.float32]]
    cache: CacheShape


def build(
    model: PreTrainedModel,
    weights: Mapping[str, FrozenWeight],
    context_length: int,
    is_table_shared: bool,
    adapters: Mapping[str, Adapter],
) -> DecoderGraph:
    """Trace a frozen decoder; its frozen layers are replaced in place.

    Args:
        model: the frozen model.
        weights: its matrices by module name.
        context_length: tokens that the cache holds at most.
        is_table_shared: embedding and head have equal codes and scales, which are stored once.
        adapters: unmerged adapters by module name.

    Raises:
        ExportError: attention of another form, or code that cannot be traced.
    """
    rotations = {name: rotation.numpy().copy() for name, rotation in output_rotations(model).items()}
    traced_graph.replace_layers(model, weights)
    decoder = TracedDecoder(model).eval()
    graph = _trace(decoder, context_length)
    tensors = traced_graph.bind(graph, weights)
    _name_rotations(graph, rotations)
    if is_table_shared:
        _share_table(graph, tensors, weights)
    add_half_steps(graph, weights, module_of_node)
    adapter = add_adapter_inputs(graph, adapters, module_of_node)
    helper.set_model_props(graph, {decoder_names.TRACED: decoder_names.FORMAT})

    shapes = set(decoder.attention.shapes.values())
    if len(shapes) > 1:
        raise ExportError(
            f"{type(model).__name__} has layers with caches of other sizes, which onnxruntime-genai has not."
        )
    return DecoderGraph(graph, tensors, traced_graph.inline(graph, tensors), adapter, shapes.pop())


def _trace(decoder: TracedDecoder, context_length: int) -> onnx.ModelProto:
    """Return the graph with tags in place of matrices."""
    model, attention = decoder.model, decoder.attention
    ids = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    positions = torch.arange(TOKENS).repeat(BATCH, 1)
    progress.info("exporting the graph")
    with replace_attention(ATTENTION_NAME, attention.attend, model.config), tracing_errors(model, ONNX):
        # The first run finds the layers' caches.
        decoder(ids, torch.ones_like(ids), positions, [])
        check_attention(model, len(attention.shapes), ONNX)
        layers = sorted(attention.shapes)
        past = [
            torch.zeros(BATCH, shape.heads, PAST, shape.width)
            for layer in layers
            for shape in [attention.shapes[layer]] * 2
        ]
        mask = torch.ones(BATCH, PAST + TOKENS, dtype=torch.int64)

        batch, tokens = Dim("batch_size"), Dim("sequence_length", max=context_length)
        before, total = (
            Dim("past_sequence_length", min=0, max=context_length),
            Dim("total_sequence_length", max=context_length),
        )
        sizes = {0: batch, 1: tokens}
        shapes = (sizes, {0: batch, 1: total}, sizes, [{0: batch, 2: before}] * len(past))
        # strict=False traces Python as it runs. Before torch.onnx, which would hide the reason of a failure.
        inputs = (ids, mask, positions, past)
        traced = torch.export.export(decoder, inputs, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced, dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, verbose=False,
            input_names=[*decoder_names.INPUTS, *decoder_names.cache_names(decoder_names.PAST, len(layers))],
            output_names=[decoder_names.LOGITS, *decoder_names.cache_names(decoder_names.PRESENT, len(layers))],
        )  # fmt: skip
    return traced_graph.plain_graph(program, model)


def _name_rotations(graph: onnx.ModelProto, rotations: Mapping[str, NDArray[np.float32]]) -> None:
    """Give the matrices that rotate outputs of norms the checkpoint's names; the graph has them transposed.

    Raises:
        ExportError: one is not in the graph.
    """
    for norm, rotation in rotations.items():
        stored = np.ascontiguousarray(rotation.T).tobytes()
        found = [
            each
            for each in graph.graph.initializer
            if list(each.dims) == list(rotation.shape)
            and each.data_type == onnx.TensorProto.FLOAT
            and onnx.numpy_helper.to_array(each).tobytes() == stored
        ]
        if not found:
            raise ExportError(f"onnx: the rotation of {norm} is not used by the model's own code.")
        name = f"{norm}.{ROTATION}"
        for node in graph.graph.node:
            for index, read in enumerate(node.input):
                node.input[index] = name if read == found[0].name else read
        found[0].name = name


def _share_table(graph: onnx.ModelProto, tensors: dict[str, NDArray[Any]], weights: Mapping[str, FrozenWeight]) -> None:
    """Let the embedding read the head's codes and scales, where both are stored without padding."""
    tables = [node for node in graph.graph.node if node.op_type == TABLE]
    head = head_of(graph, FoundInputs())  # no adapter has been added yet
    if len(tables) != 1 or head is None:
        return
    table = tables[0]
    codes, scales = table.input[0], table.input[2]
    if tensors[codes].size != tensors[head.input[1]].size:
        return
    shape, shared = f"{codes}.shape", f"{codes}.shared"
    nodes = [
        helper.make_node("Constant", [], [shape], name=f"{table.name}/Constant", value_ints=list(tensors[codes].shape)),
        helper.make_node("Reshape", [head.input[1], shape], [shared], name=f"{table.name}/Reshape"),
    ]
    table.input[0], table.input[2] = shared, head.input[2]
    for index, node in enumerate(nodes):
        graph.graph.node.insert(index, node)
    for name in (codes, scales):
        del tensors[name]
    kept = [each for each in graph.graph.initializer if each.name not in (codes, scales)]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
