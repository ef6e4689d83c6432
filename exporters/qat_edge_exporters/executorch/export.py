"""Frozen checkpoint -> folder with model.pte and all that the LLM runner needs beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat_edge import tokenizer
from qat_edge.errors import ExportError
from qat_edge.quant import frozen as checkpoint
from qat_edge.run import disk_errors, write_text
from qat_edge_exporters.executorch import attention, contract, lowering, tracing

MODEL = "model.pte"
LAYERS = "layers.json"  # module names, those of linear layers in the order the .pte computes them


def export(frozen: Path, out: Path, context_length: int, say: Callable[[str], None]) -> None:
    """Write the frozen checkpoint into the empty folder `out` as a .pte for conversations of `context_length` tokens.

    Raises:
        ExportError: the architecture or the context length is beyond what ExecuTorch computes.
        RunError: no frozen checkpoint, or no space to write.
    """
    say("loading the frozen checkpoint")
    model = checkpoint.load(frozen)
    if not (frozen / "tokenizer.json").is_file():
        raise ExportError(f"{frozen}: no tokenizer.json, and ExecuTorch's runner reads no other kind of tokenizer.")
    attention.check_length(model.config, context_length)
    attention.settle_rotary(model, context_length)
    methods = contract.constant_methods(
        model.config, context_length, tokenizer.end_tokens(frozen), tokenizer.load(frozen).bos_token_id
    )
    embedding, head = _ends(model)
    names = tracing.quantize_modules(model)
    say("exporting the graph")
    program = tracing.trace(model, context_length)
    say("preparing the graph for XNNPACK")
    edge = lowering.lower(program, methods, say)
    order = [names[buffer] for buffer in lowering.linear_order(edge) if buffer in names]
    say("writing model.pte")
    with disk_errors(out), (out / MODEL).open("wb") as file:
        lowering.emit(edge).write_to_file(file)
    write_text(out / LAYERS, json.dumps({"embedding": embedding, "head": head, "linears": order}, indent=1) + "\n")
    tokenizer.copy_files(frozen, out)
    for name in contract.OTHER_FILES:
        if (frozen / name).is_file():
            with disk_errors(out):
                shutil.copyfile(frozen / name, out / name)


def _ends(model: Any) -> tuple[str, str]:
    """Module names of the token embedding and of the output head."""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
