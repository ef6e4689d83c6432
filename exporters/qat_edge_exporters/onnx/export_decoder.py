"""Export a frozen decoder that onnxruntime-genai's builder does not know to an ONNX folder. Nothing is rounded here.

The graph is traced from the model's own code (`decoder_graph`); genai_config.json says what the builder would write.
"""

from __future__ import annotations

import json
from pathlib import Path

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge.models import tokenizer
from qat_edge.models.positions import max_positions, require_positions
from qat_edge.quant import frozen as checkpoint
from qat_edge.quant.frozen_adapters import read_adapters
from qat_edge.storage import disk_errors
from qat_edge_exporters.checkpoint import is_frozen
from qat_edge_exporters.onnx import adapter_format, decoder_graph, decoder_support, expected_config, graph_file, names
from qat_edge_exporters.onnx.export_onnx import ERRORS_ONLY
from qat_edge_exporters.rotary_frequencies import fix_rotary_frequencies

LEAVE_OUT = "Leave this target out with --target executorch."
# Of a decoder on the CPU, as the builder writes them: GroupQueryAttention can append to the cache in place.
SESSION = {"log_id": "onnxruntime-genai", "provider_options": []}
SHARED_CACHE = {"past_present_share_buffer": True}


def export(frozen: Path, out: Path, context_length: int) -> None:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer into the empty folder `out`.

    Args:
        frozen: a frozen checkpoint.
        out: empty folder.
        context_length: tokens of prompt and completion together; onnxruntime-genai allocates its KV cache for them.

    Raises:
        ExportError: the checkpoint is not frozen, or the model cannot be traced.
    """
    if not is_frozen(frozen):
        raise ExportError(
            f"onnx: {frozen} holds float weights, and a graph traced from the model's code holds codes. {LEAVE_OUT}"
        )
    adapters = read_adapters(frozen)
    progress.info("loading the frozen checkpoint")
    model = checkpoint.load(frozen, with_adapters=False)
    reason = decoder_support.missing(model.config)
    if reason:
        raise ExportError(f"onnx: {reason} {LEAVE_OUT}")
    require_positions(context_length, max_positions(model.config))
    fix_rotary_frequencies(model, context_length)

    scheme, weights = checkpoint.read_scheme(frozen), checkpoint.read_weights(frozen)
    ends = [weights[name] for name in (scheme.embedding, scheme.head) if name in weights]
    is_table_shared = len(ends) == 2 and ends[0].equals(ends[1])
    graph = decoder_graph.build(model, weights, context_length, is_table_shared, adapters)
    with disk_errors(out):
        graph_file.save(graph.model, graph.tensors, out, out, graph.inline)
        config = expected_config.written(frozen, context_length, graph.cache.heads, graph.cache.width)
        config["model"]["decoder"]["session_options"] = {**SESSION}
        if adapters:
            adapter_format.write(out / names.ADAPTER_FILE, graph.adapter)
            config["model"]["decoder"]["session_options"]["log_severity_level"] = ERRORS_ONLY
        config["search"] |= SHARED_CACHE
        (out / names.GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")
    tokenizer.copy_tokenizer_files(frozen, out)
