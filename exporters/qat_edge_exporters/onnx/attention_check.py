"""Compare the numbers of a decoder's attention nodes with those of the model's own code.

A run on a few prompts does not show a window that is longer than they are, so verify reads these numbers from the file.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import onnx

from qat_edge import readers
from qat_edge_exporters import decoder_probe
from qat_edge_exporters.onnx import names
from qat_edge_exporters.onnx.decoder_names import PAST

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qat_edge_exporters.decoder_probe import AttentionSettings

CACHE_INPUT = 3  # of the operator: the keys of the layer
NO_WINDOW, NO_SOFT_CAP = -1, 0.0  # defaults of the operator
# Attributes that say how rotary embeddings are applied inside, which any prompt shows.
ROTARY = ("do_rotary", "rotary_interleaved")
_LAYER = re.compile(rf"{PAST}\.(\d+)\.key")


def attention_faults(model: onnx.ModelProto, config: PretrainedConfig, context_length: int) -> list[str]:
    """Return a fault for each number of an attention node that is not the model's, a sentence each.

    Args:
        model: the graph.
        config: of the checkpoint.
        context_length: of the export; a window of as many tokens hides nothing.
    """
    expected = decoder_probe.attention_settings(config)
    faults = []
    for node in model.graph.node:
        if node.op_type != names.ATTENTION or not expected:
            continue
        read = _LAYER.fullmatch(node.input[CACHE_INPUT]) if len(node.input) > CACHE_INPUT else None
        settings = expected.get(int(read[1])) if read else None
        if settings is None:
            faults.append(f"the node '{readers.shorten(node.name)}' ({names.ATTENTION}) reads the cache of no layer.")
        else:
            faults += _faults_of(node, settings, context_length)
    return [f"{names.MODEL_FILE}: {fault}" for fault in faults]


def _faults_of(node: onnx.NodeProto, settings: AttentionSettings, context_length: int) -> list[str]:
    found: dict[str, Any] = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    wanted = {
        "num_heads": settings.heads,
        "kv_num_heads": settings.key_heads,
        "scale": settings.scale,
        "softcap": NO_SOFT_CAP if settings.soft_cap is None else settings.soft_cap,
        "local_window_size": _effective(settings.window, context_length),
    }
    given = {"softcap": NO_SOFT_CAP, "local_window_size": NO_WINDOW, **found}
    window = given["local_window_size"]
    given["local_window_size"] = _effective(window if isinstance(window, int) and window > 0 else None, context_length)

    label = f"the node '{readers.shorten(node.name)}' ({names.ATTENTION})"
    faults = [
        f"{label} has {name} {readers.show(given.get(name))}, and the model's code {value:g}."
        for name, value in wanted.items()
        if not _is_equal(given.get(name), value)
    ]
    other = sorted(name for name, value in found.items() if name not in (*wanted, *ROTARY) and value)
    return faults + [f"{label} has {readers.shorten(name)}, which the exporter does not write." for name in other]


def _effective(window: int | None, context_length: int) -> int:
    """Return the window, or that of all tokens where it covers the context."""
    return NO_WINDOW if window is None or window >= context_length else window


def _is_equal(found: Any, wanted: float) -> bool:
    return isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)
