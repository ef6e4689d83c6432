"""Generate text with a GGUF file in llama.cpp. Prompt and answer are token ids: the tokenizer is the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge.data.conversation import Prompt
from qat_edge_exporters.gguf import gguf_reader, llama_runner
from qat_edge_exporters.runner_process import emit_generated_ids


def generate(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    emit: Callable[[str], None],
    max_new_tokens: int,
) -> None:
    """Continue `prompt` greedily; each piece of text goes to `emit` as it comes.

    Raises:
        ArtifactError: llama.cpp refused the file, or crashed.
    """
    ends = gguf_reader.read(folder).end_tokens or []
    request = {"ids": prompt.ids, "ends": ends}
    emit_generated_ids(llama_runner, folder, max_new_tokens, request, tokenizer, emit, "llama.cpp refused it")
