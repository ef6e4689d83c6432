"""Answer a prompt with the run's frozen model in torch, or with an artifact through its own runtime."""

from __future__ import annotations

import codecs
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from qat_edge.errors import ArtifactError, RunError, UsageError
from qat_edge.models import tasks, tokenizer
from qat_edge.quant import frozen
from qat_edge.run import Run, read_manifest
from qat_edge_exporters.executorch import llm_runner
from qat_edge_exporters.executorch.backends.registry import runs_elsewhere

Emit = Callable[[str], None]


def generate(
    run: Run, prompt: str, source: str, emit: Emit, *, raw: bool, system: str | None, max_new_tokens: int
) -> None:
    """Give the answer to `prompt`, greedily, piece by piece to `emit`.

    source: "torch" for the frozen checkpoint, or an exported target. raw: no chat template.

    Raises:
        RunError: nothing to generate with, or an artifact for another machine.
        UsageError: a chat was asked for and the tokenizer has no template, or the prompt fills the context.
    """
    tasks.require_generating(run, "generate")
    elsewhere = runs_elsewhere(source)
    if elsewhere:
        raise RunError(f"{elsewhere} Ask the same codes in another artifact, or the torch model.")
    folder = run.quantized if source == "torch" else run.exports / source
    if not folder.is_dir():
        raise RunError(f"{folder} is missing. `qat-edge export {run.path}` makes it.")
    words = tokenizer.load(folder)
    text = prompt if raw else chat_text(words, prompt, system)
    if source != "torch":
        max_new_tokens = min(max_new_tokens, _room(folder, len(words.encode(text, add_special_tokens=False))))
    answer = {"torch": _torch, "executorch": _executorch, "onnx": _onnx}[source]
    answer(folder, words, text, emit, max_new_tokens)


def chat_text(words: Any, prompt: str, system: str | None) -> str:
    """The prompt as the model's chat template writes it, up to where the answer begins."""
    if not words.chat_template:
        raise UsageError("This model's tokenizer has no chat template. Give --raw to continue the text as it is.")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return str(words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _room(folder: Path, prompt_tokens: int) -> int:
    """Tokens the artifact's context leaves for the answer.

    Raises:
        UsageError: none.
    """
    context_length: int = read_manifest(folder)["options"]["context_length"]
    if prompt_tokens >= context_length:
        raise UsageError(
            f"The prompt is {prompt_tokens} tokens long and {folder} holds {context_length} with its answer. "
            "Shorten it, or export with a longer --context-length."
        )
    return context_length - prompt_tokens


def _torch(folder: Path, words: Any, text: str, emit: Emit, max_new_tokens: int) -> None:
    import torch
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text)

    ids = torch.tensor([words.encode(text, add_special_tokens=False)])
    streamer = Pieces(words, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        frozen.load(folder).generate(ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


def _executorch(folder: Path, words: Any, text: str, emit: Emit, max_new_tokens: int) -> None:
    command = [sys.executable, "-m", llm_runner.__name__, str(folder), str(max_new_tokens)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command, env=os.environ | llm_runner.ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(text.encode())
        process.stdin.close()
        for piece in _without_last_newlines(_answer(process.stdout, words.all_special_tokens)):
            emit(piece)
        if process.wait() != 0:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            reason = next((line for line in reversed(lines) if line.startswith("E ")), lines[-1] if lines else "")
            raise ArtifactError(
                f"{folder / 'model.pte'}: ExecuTorch's runner refused it: {reason}. Export it again, with the "
                "installed versions."
            )


def _answer(stream: IO[bytes], special: Sequence[str]) -> Iterator[str]:
    """Text as the runner prints it, up to its statistics and without special tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending = ""
    for byte in iter(lambda: stream.read(1), b""):
        pending += decoder.decode(byte)
        for token in special:
            pending = pending.replace(token, "")
        if pending.startswith(llm_runner.STATISTICS):
            stream.read()
            return
        # What may yet become a special token or the statistics is held back.
        while pending and not any(mark.startswith(pending) for mark in (llm_runner.STATISTICS, *special)):
            yield pending[0]
            pending = pending[1:]
    yield pending


def _without_last_newlines(pieces: Iterable[str]) -> Iterator[str]:
    """The runner ends an answer with a line feed of its own; one is shown only once something follows it."""
    held = ""
    for piece in pieces:
        if piece == "\n":
            held += piece
            continue
        yield held + piece
        held = ""


def _onnx(folder: Path, words: Any, text: str, emit: Emit, max_new_tokens: int) -> None:
    import onnxruntime_genai as genai

    try:
        model = genai.Model(str(folder))
        stream = genai.Tokenizer(model).create_stream()
        ids = words.encode(text, add_special_tokens=False)
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + max_new_tokens)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids)
        special = set(words.all_special_ids)
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token not in special:
                emit(stream.decode(token))
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: onnxruntime-genai refused it: {error}") from error
