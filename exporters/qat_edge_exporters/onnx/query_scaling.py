"""Compare the factor by which some decoders multiply queries, which grows with the position, with the model's own.

Ministral 3 multiplies queries by `1 + beta * log(1 + floor(position / length))` (Llama 4's scaling, with the length of
the first training). The factor is 1 for every shorter prompt, so a run on a few prompts shows neither number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import onnx
from onnx import numpy_helper

from qat_edge import readers
from qat_edge_exporters.onnx import names
from qat_edge_exporters.onnx.decoder_names import POSITIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPERATORS = ("Floor", "Log")  # no other part of a traced decoder has them
BETA, LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"  # in rope_parameters


class Scaling(NamedTuple):
    """Numbers of the factor."""

    beta: float
    length: float


class _Graph:
    """Makers and readers of the values of a graph, and its constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {each.name: each for each in model.graph.initializer if not each.external_data}

    def number(self, name: str) -> float:
        """Return the value of a constant of one element; not a number for anything else."""
        tensor = self.constants.get(name)
        if tensor is None:
            return math.nan
        value = numpy_helper.to_array(tensor)
        return float(value.reshape(-1)[0]) if value.size == 1 else math.nan

    def next(self, name: str, operator: str) -> tuple[str, float]:
        """Return output and constant operand of the one node that reads a value; empty and nan where it is another."""
        nodes = self.readers.get(name, [])
        if len(nodes) != 1 or nodes[0].op_type != operator:
            return "", math.nan
        others = [each for each in nodes[0].input if each != name]
        return nodes[0].output[0], self.number(others[0]) if len(others) == 1 else math.nan


def scaling_faults(model: onnx.ModelProto, config: PretrainedConfig) -> list[str]:
    """Return a fault for each node of the factor that is not the model's, a sentence each.

    Args:
        model: a traced graph.
        config: of the checkpoint.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    wanted = Scaling(parameters[BETA], parameters[LENGTH]) if parameters.get(BETA) and LENGTH in parameters else None
    graph, faults, found = _Graph(model), [], []
    logarithms = {node.output[0] for node in model.graph.node if node.op_type == "Log"}
    for node in model.graph.node:
        if node.op_type == "Floor":
            scaling, logarithm = _read(graph, node)
            logarithms.discard(logarithm)
            found.append(scaling)
            if wanted is None or not _is_equal(scaling, wanted):
                faults.append(f"the node '{readers.shorten(node.name)}' (Floor) {_difference(scaling, wanted)}.")
    if wanted is not None and not found:
        faults.append(f"no node multiplies queries by the factor of {BETA}.")
    faults += [f"the value '{readers.shorten(name)}' (Log) is no part of a factor of queries." for name in logarithms]
    return [f"{names.MODEL_FILE}: {fault}" for fault in sorted(faults)]


def _read(graph: _Graph, floor: onnx.NodeProto) -> tuple[Scaling, str]:
    """Return the numbers of the factor around its Floor, and its logarithm's output; not numbers where it is none."""
    nothing = Scaling(math.nan, math.nan)
    quotient = graph.makers.get(floor.input[0])
    if quotient is None or quotient.op_type != "Div":
        return nothing, ""
    cast = graph.makers.get(quotient.input[0])
    if cast is None or cast.op_type != "Cast" or cast.input[0] != POSITIONS:
        return nothing, ""
    shifted, one = graph.next(floor.output[0], "Add")
    logarithm, _ = graph.next(shifted, "Log")
    product, beta = graph.next(logarithm, "Mul")
    _, last = graph.next(product, "Add")
    if not one == last == 1.0:
        return nothing, logarithm
    return Scaling(beta, graph.number(quotient.input[1])), logarithm


def _is_equal(found: Scaling, wanted: Scaling) -> bool:
    return all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(found, wanted, strict=True))


def _difference(found: Scaling, wanted: Scaling | None) -> str:
    if any(map(math.isnan, found)):
        return "is no part of a factor of queries that the exporter writes"
    given = f"has the factor of {BETA} {found.beta:g} and {LENGTH} {found.length:g}"
    if wanted is None:
        return f"{given}, and the model's code has none"
    return f"{given}, and the model's code of {wanted.beta:g} and {wanted.length:g}"
