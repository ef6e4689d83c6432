"""Generate text with the run's frozen model in torch, or with an artifact in its own runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import check_files, read_manifest
from qat_edge.models import tasks
from qat_edge.models.tokenizer import load_tokenizer
from qat_edge.quant import frozen
from qat_edge.run import Run
from qat_edge_exporters.targets import TARGETS, target_named

TORCH = "torch"  # the source that is no artifact

Emit = Callable[[str], None]


def generate(
    run: Run,
    prompt: str,
    source: str,
    emit: Emit,
    *,
    raw: bool = False,
    system: str | None = None,
    max_new_tokens: int = 128,
) -> None:
    """Continue `prompt` greedily and pass each piece of text to `emit`.

    Args:
        run: a finished run.
        prompt: the user's message, or the text itself with `raw`.
        source: "torch" for the frozen checkpoint, or the name of an exported target.
        emit: is called with each piece of text as it comes.
        raw: continue the prompt as it is, without the chat template.
        system: system message before the prompt.
        max_new_tokens: longest continuation, in tokens.

    Raises:
        RunError: there is nothing to generate with, or the artifact runs on other machines only.
        UsageError: the tokenizer has no chat template, or the prompt fills the artifact's context.
    """
    # Find the model: the frozen checkpoint, or the folder of an artifact that runs here.
    tasks.require_causal_lm(run, "generate")
    if source != TORCH and source not in TARGETS:
        raise UsageError(f"--from {source}: not known. Known: {', '.join((TORCH, *TARGETS))}.")
    target = None if source == TORCH else target_named(source)
    if target is not None and target.runs_elsewhere:
        raise RunError(f"{target.runs_elsewhere} Use the same codes in another artifact, or the torch model.")
    folder = run.quantized if target is None else run.exports / target.name
    if not folder.is_dir():
        raise RunError(f"{folder} is missing. `qat-edge export {run.path}` makes it.")
    check_files(folder)

    tokenizer = load_tokenizer(folder)
    text = prompt if raw else chat_text(tokenizer, prompt, system)
    if target is None:
        _generate_in_torch(folder, tokenizer, text, emit, max_new_tokens)
        return

    # An artifact has a KV cache of a fixed length; the torch model does not.
    free = _free_context(folder, len(tokenizer.encode(text, add_special_tokens=False)))
    target.generate(folder, tokenizer, text, emit, min(max_new_tokens, free))


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> str:
    """Write the prompt with the model's chat template, up to where the assistant's message begins.

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UsageError("This model's tokenizer has no chat template. Give --raw to continue the text as it is.")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _free_context(folder: Path, prompt_tokens: int) -> int:
    """Return how many tokens the artifact's context leaves after the prompt.

    Raises:
        UsageError: the prompt fills the context.
    """
    context_length: int = read_manifest(folder)["options"]["context_length"]
    if prompt_tokens >= context_length:
        raise UsageError(
            f"The prompt is {prompt_tokens} tokens long and {folder} holds {context_length} with its answer. "
            "Shorten it, or export with a longer --context-length."
        )
    return context_length - prompt_tokens


class _Pieces(TextStreamer):
    """Streamer that passes finished text on instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Emit) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._emit(text)


def _generate_in_torch(
    folder: Path, tokenizer: PreTrainedTokenizerBase, text: str, emit: Emit, max_new_tokens: int
) -> None:
    """Continue `text` with the frozen checkpoint in torch."""
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        frozen.load(folder).generate(
            ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=_Pieces(tokenizer, emit)
        )
