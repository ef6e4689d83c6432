"""Find nodes that the exporter does not make: equal matrices say nothing about what a graph adds to their products.

A run on a few prompts finds another function, but not one that differs for rare inputs alone. Such a graph has to
decide on tokens. So ids may only choose rows of the embedding, masks may only reach the attention, nothing may be
added to the products of the head, and no operator may compare values.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from qat_edge import readers
from qat_edge_exporters.onnx import names
from qat_edge_exporters.onnx.adapter_check import FoundInputs
from qat_edge_exporters.onnx.half_steps import has_half_step

MATRICES = ("MatMulNBits", "MatMul")
EMBEDDINGS = ("Gather", "GatherBlockQuantized")
NORMS = (
    "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
)  # fmt: skip
ACTIVATIONS = ("Sigmoid", "Tanh", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Relu", "Pow")
MASK = ("Cast", "Gather", "ReduceSum", "Shape", "Sub")  # operators that count the tokens of a mask
# Of the builder's decoders, and of the nodes that `repair` adds. None of them compares values.
OPERATORS = frozenset(
    (
        names.ATTENTION, *MATRICES, *EMBEDDINGS, *NORMS, *ACTIVATIONS, *MASK, "Add", "Concat", "Constant", "Div",
        "FusedMatMul", "Gemm", "Mul", "Reshape", "RotaryEmbedding", "Slice", "Split", "Transpose", "Unsqueeze",
    )
)  # fmt: skip
SCALING = ("Mul", "Div", "Tanh")  # of logits: multipliers and soft caps


def graph_faults(model: onnx.ModelProto, adapter: FoundInputs) -> list[str]:
    """Return a fault for each kind of node or input that an export does not have, a sentence each.

    Args:
        model: the graph.
        adapter: its inputs for an adapter.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {output for output, node in producers.items() if node.op_type == "Constant"}
    unknown = sorted({node.op_type for node in model.graph.node} - OPERATORS)
    faults = [f"the operator {readers.shorten(kind)} is not one that the exporter writes." for kind in unknown]
    faults += adapter.faults + _input_faults(model)
    faults += _logit_faults(producers, constants | adapter.input_names, adapter.sums)
    return [f"{names.MODEL_FILE}: {fault}" for fault in faults]


def _input_faults(model: onnx.ModelProto) -> list[str]:
    """Name nodes that read the inputs of the graph, or counts of a mask, and that the exporter does not make."""
    counts = {"attention_mask"}
    faults = []
    for node in model.graph.node:  # in the order of computation
        read = set(node.input)
        is_embedding = node.op_type in EMBEDDINGS and node.name.startswith("/model/embed_tokens/")
        if "input_ids" in read and not (is_embedding and node.input[1] == "input_ids"):
            faults.append(_reads(node, "input_ids"))
        if node.op_type == names.ATTENTION:
            continue
        if counts & read:
            if node.op_type in MASK:
                counts.update(node.output)
            else:
                faults.append(_reads(node, "attention_mask"))
        if "position_ids" in read and node.op_type != "RotaryEmbedding":
            faults.append(_reads(node, "position_ids"))
        if any(name.startswith("past_key_values.") for name in read):
            faults.append(_reads(node, "the cache"))
    return faults


def _logit_faults(producers: Mapping[str, onnx.NodeProto], constants: set[str], adapted: set[str]) -> list[str]:
    """Name the node that makes logits of something other than the product of the head.

    Args:
        producers: nodes by their outputs.
        constants: values that are no tensors of the run.
        adapted: sums of a layer's product and its adapter's.
    """
    value = "logits"
    for _ in range(len(producers) + 1):  # a graph of anyone may have a cycle
        node = producers.get(value)
        if node is None:
            return ["no node computes logits from the head."]
        if node.op_type in MATRICES and names.module_of_node(node.name) == names.HEAD:
            return []
        others = [name for name in node.input if name not in constants]
        is_scaled = node.op_type in SCALING and len(others) == 1
        is_part = value in adapted or _has_half_step(node, producers)
        is_sum = node.op_type == "Add" and (len(others) == 1 or is_part)
        if is_scaled or is_sum:
            value = others[0]
        else:
            return [f"the node '{readers.shorten(node.name)}' ({node.op_type}) changes the logits of the head."]
    return ["the logits depend on themselves."]


def _has_half_step(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Return whether a node is the sum that adds half steps."""
    product = producers.get(node.input[0]) if node.input else None
    if product is None or product.op_type != "MatMulNBits":
        return False
    return node.name == f"{names.half_step_stem(product.name)}/Add" and has_half_step(product, producers)


def _reads(node: onnx.NodeProto, what: str) -> str:
    return f"the node '{readers.shorten(node.name)}' ({node.op_type}) reads {what}, which the exporter does not make."
