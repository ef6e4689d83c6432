"""Find nodes of an encoder's graph that the exporter does not make: equal matrices say nothing about the others.

As in `graph_check`, a graph that computes another function for rare texts alone has to decide on tokens, and a run on a
few texts does not find it. An encoder's own graph compares ids, to number positions or to find the second text of a
pair. So every value is one of three, and tokens reach numbers only by choosing rows of tables:

    shape     sizes of the inputs, and constants
    content   computed from ids or mask, in integers
    number    float32, computed from rows of tables, matrices and constants; and the mask itself

`encoder_settings` requires that the ids themselves choose the rows of the token table. Which positions and token types
are computed from them is only known from a run.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from qat_edge import readers
from qat_edge_exporters.onnx import encoder_names, names
from qat_edge_exporters.onnx.traced_names import LINEAR, TABLE

SHAPE, CONTENT, NUMBER = "shape", "content", "number"
IDS, MASK = encoder_names.INPUTS
FLOAT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
STRUCTURE = (
    "Concat", "Constant", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
ARITHMETIC = ("Add", "Clip", "Div", "Max", "Min", "Mul", "ReduceSum", "Sub")
# Operators on integers: they may find equal ones.
INTEGERS = frozenset(
    (
        *STRUCTURE, *ARITHMETIC, "Cast", "CumSum", "Equal", "GatherElements", "Not", "Range", "Shape",
    )
)  # fmt: skip
# Operators on numbers: none of them compares two values.
NUMBERS = frozenset(
    (
        *STRUCTURE, *ARITHMETIC, LINEAR, "Cos", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
        "LayerNormalization", "LeakyRelu", "MatMul", "Mish", "Neg", "Pow", "Reciprocal", "ReduceL2", "ReduceMean",
        "Relu", "Sigmoid", "Sin", "Softmax", "Softplus", "Sqrt", "Tanh",
    )
)  # fmt: skip


def graph_faults(model: onnx.ModelProto) -> list[str]:
    """Return a fault for each node that an export does not have, a sentence each."""
    classes = {each.name: NUMBER if each.data_type in FLOAT_TYPES else SHAPE for each in model.graph.initializer}
    inputs = [each.name for each in model.graph.input]
    faults = [f"the input '{readers.shorten(name)}' has a default." for name in inputs if name in classes]
    classes |= dict.fromkeys(inputs, CONTENT)
    for node in model.graph.node:  # in the order of computation
        kinds = {classes.get(name, CONTENT) for name in node.input if name}
        fault = _fault_of(node, kinds)
        if fault:
            faults.append(f"the node '{readers.shorten(node.name)}' ({readers.shorten(node.op_type)}) {fault}.")
        classes.update(dict.fromkeys(node.output, _class_of_output(node, kinds)))
    faults += _output_faults(model)
    return [f"{names.MODEL_FILE}: {fault}" for fault in faults]


def _fault_of(node: onnx.NodeProto, kinds: set[str]) -> str:
    """Return what a node does that the exporter does not write, as a phrase; empty where nothing."""
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return "holds a graph of its own"
    if node.op_type in (TABLE, "Shape"):
        return ""
    if node.op_type == "Cast":
        is_mask = list(node.input) == [MASK]
        if NUMBER in kinds:
            return "turns numbers into integers"
        return "turns tokens into numbers" if CONTENT in kinds and casts_to_float(node) and not is_mask else ""
    if NUMBER not in kinds:
        return "" if node.op_type in INTEGERS else "is no operator that the exporter writes"
    if node.op_type not in NUMBERS:
        return "is no operator that the exporter writes"
    return "computes numbers from tokens" if CONTENT in kinds else ""


def _class_of_output(node: onnx.NodeProto, kinds: set[str]) -> str:
    if node.op_type == "Shape":
        # The size of anything else may depend on tokens.
        return SHAPE if set(node.input) <= {IDS, MASK} else CONTENT
    if node.op_type == TABLE or (node.op_type == "Cast" and casts_to_float(node)):
        return NUMBER
    if node.op_type == "Constant" and any(is_float(attribute) for attribute in node.attribute):
        return NUMBER
    return next((kind for kind in (NUMBER, CONTENT) if kind in kinds), SHAPE)


def is_float(attribute: onnx.AttributeProto) -> bool:
    """Return whether an attribute of a node that makes a constant holds numbers in float."""
    return attribute.name in ("value_float", "value_floats") or attribute.t.data_type in FLOAT_TYPES


def casts_to_float(node: onnx.NodeProto) -> bool:
    """Return whether a Cast node makes numbers in float."""
    return any(attribute.name == "to" and attribute.i in FLOAT_TYPES for attribute in node.attribute)


def _output_faults(model: onnx.ModelProto) -> list[str]:
    """Name a node that changes the logits of the head, and outputs that the exporter does not name."""
    outputs = [output.name for output in model.graph.output]
    if outputs not in ([encoder_names.LOGITS], [encoder_names.EMBEDDING]):
        return [f"its outputs are {readers.show(outputs)}."]
    if outputs == [encoder_names.EMBEDDING]:
        return []

    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    node = producers.get(encoder_names.LOGITS)
    if node is not None and node.op_type == "Add":
        node = _summand(node, producers, constants)
    if node is None or node.op_type != LINEAR:
        return ["its logits are not those of the head."]
    return []


def _summand(
    node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], constants: set[str]
) -> onnx.NodeProto | None:
    """Return the product that a bias is added to; None where anything else is."""
    others = [name for name in node.input if name not in constants]
    return producers.get(others[0]) if len(others) == 1 else None
