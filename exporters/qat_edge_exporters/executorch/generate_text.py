"""Generate text with a .pte in ExecuTorch's own LLM runner, the one inside its phone apps."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from transformers import PreTrainedTokenizerBase

from qat_edge.data.conversation import Prompt
from qat_edge.errors import ArtifactError
from qat_edge_exporters.executorch import llm_runner, runner_tokenizer
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
        ArtifactError: the runner refused the program, or its tokenizer splits the prompt otherwise than training.
    """
    request = {"text": prompt.text, "ids": prompt.ids}
    with start_runner(llm_runner, folder, max_new_tokens, request, llm_runner.ENVIRONMENT) as runner:
        for piece in without_last_newlines(generated_text(runner.output, tokenizer.all_special_tokens)):
            emit(piece)
        code, reason = runner.finish()
    if code == llm_runner.OTHER_IDS:
        fault = runner_tokenizer.describe_split(folder / runner_tokenizer.TOKENIZER, "this prompt", reason)
        raise ArtifactError(
            f"{folder}: {fault} `generate` takes --from torch or onnx; `qat-edge doctor {folder}` compares other texts."
        )
    if code != 0:
        raise ArtifactError(
            f"{folder / 'model.pte'}: ExecuTorch's runner refused it: {reason}. Export it again, with the installed "
            "versions."
        )


def generated_text(stream: IO[bytes], special_tokens: Sequence[str]) -> Iterator[str]:
    """Yield the text that the runner prints, without special tokens and without the statistics at its end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    marks = (llm_runner.STATISTICS, *special_tokens)
    pending = ""
    for byte in iter(lambda: stream.read(1), b""):
        pending += decoder.decode(byte)
        for token in special_tokens:
            pending = pending.replace(token, "")

        if pending.startswith(llm_runner.STATISTICS):
            stream.read()
            return

        # Text that may still become a special token or the statistics waits for the next bytes.
        while pending and not any(mark.startswith(pending) for mark in marks):
            yield pending[0]
            pending = pending[1:]
    yield pending


def without_last_newlines(pieces: Iterable[str]) -> Iterator[str]:
    """Drop the newlines at the end: the runner prints one of its own. Others appear once text follows them."""
    newlines = ""
    for piece in pieces:
        if piece == "\n":
            newlines += piece
            continue
        yield newlines + piece
        newlines = ""
