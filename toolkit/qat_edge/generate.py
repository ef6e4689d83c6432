"""Answer a prompt with the run's frozen model in torch, or with an artifact through its own runtime."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qat_edge.errors import ArtifactError, RunError, UsageError
from qat_edge.quant import frozen
from qat_edge.run import Run

Emit = Callable[[str], None]


def generate(
    run: Run, prompt: str, source: str, emit: Emit, *, raw: bool, system: str | None, max_new_tokens: int
) -> None:
    """Give the answer to `prompt`, greedily, piece by piece to `emit`.

    source: "torch" for the frozen checkpoint, or an exported target. raw: no chat template.

    Raises:
        RunError: nothing to generate with.
        UsageError: a chat was asked for and the tokenizer has no template.
    """
    folder = run.quantized if source == "torch" else run.exports / source
    if not folder.is_dir():
        raise RunError(f"{folder} is missing. `qat-edge export {run.path}` makes it.")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = prompt if raw else chat_text(tokenizer, prompt, system)
    answer = {"torch": _torch, "executorch": _executorch, "onnx": _onnx}[source]
    answer(folder, tokenizer, text, emit, max_new_tokens)


def chat_text(tokenizer: Any, prompt: str, system: str | None) -> str:
    """The prompt as the model's chat template writes it, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise UsageError("This model's tokenizer has no chat template. Give --raw to continue the text as it is.")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _torch(folder: Path, tokenizer: Any, text: str, emit: Emit, max_new_tokens: int) -> None:
    import torch
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text)

    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    streamer = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        frozen.load(folder).generate(ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


def _executorch(folder: Path, tokenizer: Any, text: str, emit: Emit, max_new_tokens: int) -> None:
    import executorch.extension.llm.custom_ops
    import executorch.kernels.quantized  # noqa: F401  (registers the embedding operators)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    special = set(tokenizer.all_special_tokens)
    config = GenerationConfig(echo=False, max_new_tokens=max_new_tokens, temperature=0.0)
    try:
        with _native_output_hidden() as hidden:
            runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
            runner.generate(text, config, lambda piece: None if piece in special else hidden(emit, piece))
    except RuntimeError as error:
        raise ArtifactError(f"{folder / 'model.pte'}: ExecuTorch's runner refused it: {error}") from error


def _onnx(folder: Path, tokenizer: Any, text: str, emit: Emit, max_new_tokens: int) -> None:
    import onnxruntime_genai as genai

    try:
        model = genai.Model(str(folder))
        stream = genai.Tokenizer(model).create_stream()
        ids = tokenizer.encode(text, add_special_tokens=False)
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + max_new_tokens)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids)
        special = set(tokenizer.all_special_ids)
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token not in special:
                emit(stream.decode(token))
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: onnxruntime-genai refused it: {error}") from error


@contextmanager
def _native_output_hidden() -> Iterator[Callable[[Emit, str], None]]:
    """Keep what C++ prints to stdout and stderr out of the answer; the yielded function emits past it."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def point(out: int, err: int) -> None:
        os.dup2(out, 1)
        os.dup2(err, 2)

    def emit_past(emit: Emit, piece: str) -> None:
        point(*saved)
        try:
            emit(piece)
            sys.stdout.flush()
        finally:
            point(nowhere, nowhere)

    point(nowhere, nowhere)
    try:
        yield emit_past
    finally:
        point(*saved)
        for descriptor in (*saved, nowhere):
            os.close(descriptor)
