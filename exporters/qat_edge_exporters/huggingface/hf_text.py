"""Generate text with a Hugging Face folder in transformers and compressed-tensors, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qat_edge.data.conversation import Prompt
from qat_edge.errors import ArtifactError
from qat_edge_exporters.huggingface import hf_reader, hf_runner
from qat_edge_exporters.runner_process import start_runner

INCOMPLETE = "\ufffd"  # at the end of a text whose last character has further bytes


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
    ids: list[int] = []
    shown = ""
    with start_runner(hf_runner, folder, max_new_tokens, {"ids": prompt.ids, "ends": ends}, {}) as runner:
        for line in runner.output:
            ids.append(int(line))
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            if not text.endswith(INCOMPLETE):
                emit(text[len(shown) :])
                shown = text
        code, reason = runner.finish()
    emit(str(tokenizer.decode(ids, skip_special_tokens=True))[len(shown) :])
    if code != 0:
        raise ArtifactError(f"{folder}: transformers cannot run it: {reason}. Export it again.")
