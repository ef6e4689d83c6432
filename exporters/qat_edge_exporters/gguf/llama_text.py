"""Generate text with a GGUF file in llama.cpp. Prompt and answer are token ids: the tokenizer is the checkpoint's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge_exporters.gguf import gguf_reader, llama_runner
from qat_edge_exporters.runner_process import IdRunner, run_ids


def open_generator(
    folder: Path, tokenizer: PreTrainedTokenizerBase, grammar: str | None = None
) -> AbstractContextManager[IdRunner]:
    """Load the file until the end of the block; see `IdRunner`. grammar: that all answers follow."""
    settings: dict[str, object] = {"ends": gguf_reader.end_tokens(folder)}
    settings |= {} if grammar is None else {"grammar": grammar}
    return run_ids(llama_runner, folder, tokenizer, settings, "llama.cpp")
