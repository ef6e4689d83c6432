"""Names in a graph that was traced from the model's own code: the nodes that read a frozen matrix."""

from __future__ import annotations

import re

LINEAR, TABLE = "MatMulNBits", "GatherBlockQuantized"  # operators that read a frozen matrix

_NODE = re.compile(rf"/([A-Za-z_]\w*(?:\.\w+)*)/(?:{LINEAR}|{TABLE})")


def node_name(module: str, operator: str) -> str:
    """Return the name of the node that reads a module's matrix, such as "/bert.pooler.dense/MatMulNBits"."""
    return f"/{module}/{operator}"


def module_of_node(node: str | bytes) -> str | None:
    """Return the module whose matrix a node reads, or None for other names; a name that is not UTF-8 is bytes."""
    found = _NODE.fullmatch(node) if isinstance(node, str) else None
    return None if found is None else found[1]
