"""Names in the graph of an encoder: its inputs and outputs, its metadata, and the nodes and tensors of a matrix."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qat_edge.models.tasks import ModelTask

INPUTS = ("input_ids", "attention_mask")  # int64 (batch, tokens)
LOGITS, EMBEDDING = "logits", "sentence_embedding"  # float32 (batch, width), as optimum names them
# Metadata of the graph: tokens of the longest text, and numbers in an output.
MAX_LENGTH, OUTPUT_WIDTH = "max_length", "output_width"
LINEAR, TABLE = "MatMulNBits", "GatherBlockQuantized"  # operators that read a frozen matrix

_NODE = re.compile(rf"/([A-Za-z_]\w*(?:\.\w+)*)/(?:{LINEAR}|{TABLE})")


def output_name(task: ModelTask) -> str:
    """Return the name of the graph's output."""
    # It imports torch, which the process that runs a graph does without.
    from qat_edge.models.tasks import SentenceEncoder

    return EMBEDDING if isinstance(task, SentenceEncoder) else LOGITS


def node_name(module: str, operator: str) -> str:
    """Return the name of the node that reads a module's matrix, such as "/bert.pooler.dense/MatMulNBits"."""
    return f"/{module}/{operator}"


def module_of_node(node: str | bytes) -> str | None:
    """Return the module whose matrix a node reads, or None for other names; a name that is not UTF-8 is bytes."""
    found = _NODE.fullmatch(node) if isinstance(node, str) else None
    return None if found is None else found[1]
