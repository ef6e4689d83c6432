"""Generate text with an ONNX folder in onnxruntime-genai, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge.data.conversation import Prompt
from qat_edge.errors import ArtifactError
from qat_edge_exporters.onnx import genai_runner
from qat_edge_exporters.runner_process import start_runner


def generate(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    emit: Callable[[str], None],
    max_new_tokens: int,
) -> None:
    """Continue `prompt` greedily; each piece of text goes to `emit` as it comes.

    Raises:
        ArtifactError: the runtime refused the folder, or crashed.
    """
    request = {"ids": prompt.ids, "special": tokenizer.all_special_ids}
    with start_runner(genai_runner, folder, max_new_tokens, request, {}) as runner:
        for line in runner.output:
            emit(json.loads(line))
        code, reason = runner.finish()
    if code != 0:
        raise ArtifactError(f"{folder}: onnxruntime-genai refused it: {reason}. Export it again.")
