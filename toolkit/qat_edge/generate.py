"""Answer a prompt with the run's frozen model in torch, or with an artifact through its own runtime."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
    special = set(tokenizer.all_special_tokens)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            with _native_output_into(log) as past:
                _run_llm_runner(
                    folder, text, lambda piece: None if piece in special else past(emit, piece), max_new_tokens
                )
        except RuntimeError as error:
            log.seek(0)
            last = [line.strip() for line in log if line.startswith("E ")][-1:] or [str(error)]
            raise ArtifactError(
                f"{folder / 'model.pte'}: ExecuTorch's runner refused it: {last[0]}. Export it again, with the "
                "installed versions."
            ) from error


def _run_llm_runner(folder: Path, text: str, on_piece: Emit, max_new_tokens: int) -> None:
    """ExecuTorch's own LLM runner, the one inside its phone apps. It prints while it is imported already."""
    import executorch.kernels.quantized  # noqa: F401  (registers the embedding operators)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the attention operators)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    config = GenerationConfig(echo=False, max_new_tokens=max_new_tokens, temperature=0.0)
    runner.generate(text, config, on_piece)


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
def _native_output_into(log: IO[str]) -> Iterator[Callable[[Emit, str], None]]:
    """Send what C++ prints to stdout and stderr into `log`; the yielded function emits past that."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)

    def point(out: int, err: int) -> None:
        os.dup2(out, 1)
        os.dup2(err, 2)

    def emit_past(emit: Emit, piece: str) -> None:
        point(*saved)
        try:
            emit(piece)
            sys.stdout.flush()
        finally:
            point(log.fileno(), log.fileno())

    point(log.fileno(), log.fileno())
    try:
        yield emit_past
    finally:
        point(*saved)
        os.close(saved[0])
        os.close(saved[1])
