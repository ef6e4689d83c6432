"""Generate text with a Hugging Face folder in transformers and compressed-tensors, in a process of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge_exporters.huggingface import hf_reader, hf_runner
from qat_edge_exporters.runner_process import IdRunner, run_ids


def open_generator(folder: Path, tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[IdRunner]:
    """Load the folder until the end of the block; see `IdRunner`."""
    settings = {"ends": hf_reader.end_tokens(folder)}
    return run_ids(hf_runner, folder, tokenizer, settings, "transformers")
