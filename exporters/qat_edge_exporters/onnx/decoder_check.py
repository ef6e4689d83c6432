"""Find nodes of a traced decoder's graph that the exporter does not make: equal matrices say nothing about the others.

As in `graph_check`, a graph that computes another function for rare inputs alone has to decide on tokens, and a run on
a few prompts does not find it. So every value is one of these, and each input reaches only what its class may:

    ids        choose rows of the embedding, and nothing else; some models give them another shape first
    mask       its counts and sizes go into the attention
    position   becomes the angles of rotary embeddings, or chooses rows of a table in float
    cache      keys and values, which the attention alone reads and appends to
    shape      sizes of the inputs, and whole numbers
    number     float32, computed from rows of the embedding, matrices, constants and angles
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from qat_edge import readers
from qat_edge_exporters.onnx import names, query_scaling
from qat_edge_exporters.onnx.adapter_check import FoundInputs
from qat_edge_exporters.onnx.decoder_names import IDS, LOGITS, MASK, PAST, POSITIONS, PRESENT
from qat_edge_exporters.onnx.encoder_check import FLOAT_TYPES, INTEGERS, NUMBERS, casts_to_float, is_float
from qat_edge_exporters.onnx.traced_names import LINEAR, TABLE

IDS_CLASS, MASK_CLASS, POSITION, CACHE, SHAPE, NUMBER = "ids", "mask", "position", "cache", "shape", "number"
INPUTS = {IDS: IDS_CLASS, MASK: MASK_CLASS, POSITIONS: POSITION}
# Classes of the operator's inputs: queries, keys, values, cache of keys and of values, last tokens, size of the mask.
ATTENTION_INPUTS = (NUMBER, NUMBER, NUMBER, CACHE, CACHE, MASK_CLASS, SHAPE)
COUNTS = INTEGERS - {"CumSum", "Equal", "GatherElements", "Not", "Range"}  # none of them compares or lists values
# Operators that count the tokens of a mask, and those that make angles, or rows of a table, of positions. None of them
# has a limit at which it begins to act.
OF_MASK = ("Cast", "Expand", "Gather", "ReduceSum", "Shape", "Squeeze", "Sub", "Unsqueeze")
OF_POSITIONS = ("Add", "Cast", "Expand", "Reshape", "Squeeze", "Unsqueeze")
# Besides an encoder's: those of `half_steps`, of parts of a head that are assigned in turn, and of `query_scaling`.
PRODUCTS = NUMBERS | {"FusedMatMul", "ReduceSum", "ScatterND", *query_scaling.OPERATORS}
SCALING = ("Mul", "Div", "Tanh")  # of logits: multipliers and soft caps


def graph_faults(model: onnx.ModelProto, adapter: FoundInputs) -> list[str]:
    """Return a fault for each node that an export does not have, a sentence each.

    Args:
        model: the graph.
        adapter: its inputs for an adapter; their faults, and those of other inputs, are not repeated.
    """
    classes, faults = _classes_of_inputs(model), []
    for node, kinds in _walk(model, classes):
        fault = _fault_of(node, kinds)
        if fault:
            faults.append(f"the node '{readers.shorten(node.name)}' ({readers.shorten(node.op_type)}) {fault}.")
    faults += _output_faults(model, classes, adapter)
    return [f"{names.MODEL_FILE}: {fault}" for fault in faults]


def position_tables(model: onnx.ModelProto) -> set[str]:
    """Return the names of float tables whose rows positions choose, as in models without rotary embeddings."""
    walk = _walk(model, _classes_of_inputs(model))
    return {node.input[0] for node, kinds in walk if node.op_type == "Gather" and kinds == [NUMBER, POSITION]}


def _walk(model: onnx.ModelProto, classes: dict[str, str]) -> Iterator[tuple[onnx.NodeProto, list[str]]]:
    """Yield each node in the order of computation with the classes of its inputs, and enter those of its outputs."""
    for node in model.graph.node:
        kinds = [classes.get(name, "") for name in node.input]
        yield node, kinds
        classes.update(_classes_of_outputs(node, kinds))


def _classes_of_inputs(model: onnx.ModelProto) -> dict[str, str]:
    """Return the classes of initializers and inputs."""
    classes = {each.name: NUMBER if each.data_type in FLOAT_TYPES else SHAPE for each in model.graph.initializer}
    for each in model.graph.input:
        if each.name not in classes:  # those for adapters have defaults
            classes[each.name] = CACHE if each.name.startswith(f"{PAST}.") else INPUTS.get(each.name, "")
    return classes


def head_of(model: onnx.ModelProto, adapter: FoundInputs) -> onnx.NodeProto | None:
    """Return the node whose product the logits are, scaled or capped at most; None where there is none.

    Args:
        model: the graph.
        adapter: its inputs for an adapter, which may be added to that product.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {each.name for each in model.graph.initializer}
    constants |= {output for output, node in producers.items() if node.op_type == "Constant"}
    value = LOGITS
    for _ in range(len(producers) + 1):  # a graph of anyone may have a cycle
        node = producers.get(value)
        if node is None or node.op_type == LINEAR:
            return node
        others = [name for name in node.input if name not in constants]
        is_part = node.op_type == "Add" and (value in adapter.sums or node.name.endswith("/half_step/Add"))
        is_single = len(others) == 1 and node.op_type in (*SCALING, "Add")
        if not (is_single or is_part) or not others:
            return None
        value = others[0]
    return None


def _fault_of(node: onnx.NodeProto, kinds: list[str]) -> str:
    """Return what a node does that the exporter does not write, as a phrase; empty where nothing."""
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return "holds a graph of its own"
    if node.op_type == TABLE:
        return "" if kinds[1:2] == [IDS_CLASS] else "does not look up the prompt's ids"
    if node.op_type == names.ATTENTION:
        return "" if tuple(kinds) == ATTENTION_INPUTS else "attends to something other than its layer's values"
    if node.op_type == "Shape":
        return ""
    given = {kind for kind in kinds if kind}
    for kind, name in ((IDS_CLASS, IDS), (CACHE, "the cache"), (MASK_CLASS, MASK), (POSITION, POSITIONS)):
        if kind in given:
            return "" if _may_count(node, given, kind) else f"reads {name}"
    return _other_operator(node, NUMBER in given)


def _may_count(node: onnx.NodeProto, given: set[str], kind: str) -> bool:
    """Return whether a node only counts the tokens of a mask, or makes angles of positions."""
    if kind == POSITION and node.op_type == "Gather":
        return given == {NUMBER, POSITION}
    if not given <= {kind, SHAPE}:
        return False
    if kind == IDS_CLASS:
        return node.op_type == "Reshape"
    if kind == POSITION:
        return node.op_type in OF_POSITIONS
    return kind == MASK_CLASS and node.op_type in OF_MASK and not casts_to_float(node)


def _other_operator(node: onnx.NodeProto, has_numbers: bool) -> str:
    if node.op_type == "Cast" and has_numbers:
        return "" if casts_to_float(node) else "turns numbers into integers"
    permitted = PRODUCTS if has_numbers else COUNTS | {"ConstantOfShape", "Range"}
    return "" if node.op_type in permitted else "is no operator that the exporter writes"


def _classes_of_outputs(node: onnx.NodeProto, kinds: list[str]) -> dict[str, str]:
    """Return the classes of a node's outputs."""
    if node.op_type == names.ATTENTION:
        return {name: CACHE if index else NUMBER for index, name in enumerate(node.output)}
    if node.op_type == "Shape":
        return dict.fromkeys(node.output, SHAPE)
    is_constant = node.op_type == "Constant" and any(map(is_float, node.attribute))
    is_angle = node.op_type == "Cast" and casts_to_float(node) and MASK_CLASS not in kinds
    # Zeros in float, unless its value is an integer.
    is_filled = node.op_type == "ConstantOfShape" and all(map(is_float, node.attribute))
    if node.op_type == TABLE or is_constant or is_filled or is_angle:
        return dict.fromkeys(node.output, NUMBER)
    kind = next((each for each in (NUMBER, IDS_CLASS, CACHE, MASK_CLASS, POSITION) if each in kinds), SHAPE)
    return dict.fromkeys(node.output, kind)


def _output_faults(model: onnx.ModelProto, classes: Mapping[str, str], adapter: FoundInputs) -> list[str]:
    """Name outputs that the exporter does not write, and logits that are not those of the head."""
    faults = []
    for each in model.graph.output:
        is_cache = each.name.startswith(f"{PRESENT}.") and classes.get(each.name) == CACHE
        if each.name != LOGITS and not is_cache:
            faults.append(f"the output '{readers.shorten(each.name)}' is not one that the exporter writes.")
    return faults if head_of(model, adapter) is not None else [*faults, "its logits are not those of the head."]
