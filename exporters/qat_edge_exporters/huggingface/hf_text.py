"""Generate text with a Hugging Face folder in transformers and compressed-tensors, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge.data.conversation import Prompt
from qat_edge_exporters.huggingface import hf_reader, hf_runner
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
        ArtifactError: transformers cannot load the folder.
    """
    ends = hf_reader.read(folder).end_tokens or []
    request = {"ids": prompt.ids, "ends": ends}
    emit_generated_ids(hf_runner, folder, max_new_tokens, request, tokenizer, emit, "transformers cannot run it")
