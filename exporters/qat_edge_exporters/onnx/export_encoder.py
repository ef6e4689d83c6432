"""Export a frozen encoder to an ONNX folder that plain onnxruntime loads. Nothing is rounded here.

onnxruntime-genai's builder knows no encoders, so the graph is traced from the model's own code (`encoder_graph`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge.models import tasks, tokenizer
from qat_edge.quant import frozen as checkpoint
from qat_edge.storage import disk_errors
from qat_edge_exporters import encoder_support
from qat_edge_exporters.onnx import encoder_graph, graph_file
from qat_edge_exporters.onnx.names import CONFIG


def export(frozen: Path, out: Path, context_length: int) -> None:
    """Write model.onnx, model.onnx.data, config.json and the tokenizer into the empty folder `out`.

    Args:
        frozen: a frozen checkpoint.
        out: empty folder.
        context_length: tokens of the longest text, if the model has positions for as many.

    Raises:
        ExportError: the checkpoint is not frozen, or the model cannot be traced.
    """
    encoder_support.require_frozen(frozen, tasks.task_of_folder(frozen))
    progress.info("loading the frozen checkpoint")
    model = checkpoint.load(frozen)
    reason = encoder_support.missing(model.config)
    if reason:
        raise ExportError(f"onnx: {reason} Leave this target out with --target executorch.")

    task = tasks.task_of_model(model)
    longest = min(context_length, tasks.max_text_tokens(model, tokenizer.load_tokenizer(frozen)))
    graph = encoder_graph.build(model, task, checkpoint.read_weights(frozen), longest)
    progress.info(f"texts of up to {longest} tokens, an output of {graph.width} numbers for each")

    with disk_errors(out):
        graph_file.save(graph.model, graph.tensors, out, out, graph.inline)
        shutil.copyfile(frozen / CONFIG, out / CONFIG)
    tokenizer.copy_tokenizer_files(frozen, out)
