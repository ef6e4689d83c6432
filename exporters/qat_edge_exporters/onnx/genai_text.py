"""Generate text with an ONNX folder in onnxruntime-genai, in a process of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge_exporters.onnx import genai_runner
from qat_edge_exporters.onnx.genai_config import check_config
from qat_edge_exporters.runner_process import IdRunner, run_ids


def open_generator(
    folder: Path, tokenizer: PreTrainedTokenizerBase, grammar: str | None = None
) -> AbstractContextManager[IdRunner]:
    """Load the folder until the end of the block; see `IdRunner`. grammar: that all answers follow."""
    config = check_config(folder)
    model, ends = config.get("model", {}), config.get("model", {}).get("eos_token_id", [])
    settings = {
        "ends": ends if isinstance(ends, list) else [ends],
        "context": config.get("search", {}).get("max_length", 0),
        # A cache that slides has lost what is before its window.
        "keep": "sliding_window" not in model.get("decoder", {}),
        **({} if grammar is None else {"grammar": grammar}),
    }
    return run_ids(genai_runner, folder, tokenizer, settings, "onnxruntime-genai")
