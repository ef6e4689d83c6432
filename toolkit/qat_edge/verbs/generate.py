"""Generate text with the run's frozen model in torch, or with an artifact in its own runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from qat_edge import progress
from qat_edge.data.chat_template import ChatTemplate
from qat_edge.data.conversation import ChatFormat, Prompt, text_prompt
from qat_edge.errors import DataError, RunError, UsageError
from qat_edge.manifest import MANIFEST, check_files
from qat_edge.models import tasks, tokenizer_check, weights_check
from qat_edge.models.artifact_options import context_of_artifact
from qat_edge.models.generation_settings import greedy_decoding
from qat_edge.models.positions import positions_of_folder
from qat_edge.models.tokenizer import end_tokens, load_tokenizer, trained_template_arguments
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
        RunError: there is nothing to generate with, the artifact was exported from another checkpoint, or it runs on
            other machines only.
        UsageError: the tokenizer has no chat template, the template refuses the messages, or the prompt fills the
            context of the artifact or the model.
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
    # An artifact of another checkpoint answers for a model that this run does not hold. One can be shipped alone.
    if target is not None and (run.quantized / MANIFEST).is_file():
        run.require_current(target.name, f"qat-edge export {run.path} --force")

    # The token ids are those before an answer in training, whatever runs the model.
    tokenizer = load_tokenizer(folder)
    tokenizer_check.check_copy(tokenizer, folder)
    if raw:
        if system is not None:
            raise UsageError("--system and --raw: a system message needs the chat template. Leave one out.")
        ready, block = text_prompt(prompt, tokenizer), ""
    else:
        ready = chat_prompt(tokenizer, prompt, system, trained_template_arguments(folder))
        block = ChatTemplate(tokenizer).empty_reasoning
    if not ready.ids:
        raise UsageError("The prompt is empty: it has no token to continue.")
    shown = WithoutPrefix(emit, block)
    count = _tokens_that_fit(folder, target is not None, len(ready.ids), max_new_tokens)
    if target is None:
        _generate_in_torch(folder, tokenizer, ready.ids, shown, count)
    else:
        target.generate(folder, tokenizer, ready, shown, count)
    shown.finish()


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, template_arguments: Mapping[str, Any]
) -> Prompt:
    """Return the prompt in the model's chat template, up to where the assistant's message begins.

    Args:
        tokenizer: the model's.
        prompt: the user's message.
        system: system message before it.
        template_arguments: further arguments of the chat template, as in training.

    Raises:
        UsageError: the tokenizer has no chat template, it refuses or leaves out a message, or the prompt is empty.
    """
    if not tokenizer.chat_template:
        raise UsageError("This model's tokenizer has no chat template. Give --raw to continue the text as it is.")
    if not prompt.strip():
        raise UsageError("The prompt is empty, so there is no message to answer. Give --raw to continue white space.")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    try:
        where = "prompt" if system is None else "prompt with --system"
        return ChatFormat(tokenizer).prompt(messages, template_arguments, where=where)
    except DataError as error:
        raise UsageError(str(error)) from error


class WithoutPrefix:
    """Passes text on to `emit`, without a prefix such as an empty block of reasoning, and white space after it."""

    def __init__(self, emit: Emit, prefix: str) -> None:
        self._emit = emit
        self._prefix = prefix.strip()
        self._held = ""  # text that may still become the prefix
        self._passing = not self._prefix

    def __call__(self, text: str) -> None:
        """Take a piece of text."""
        if self._passing:
            self._emit(text)
            return
        self._held += text
        begun = self._held.lstrip()
        if begun.startswith(self._prefix):
            rest = begun.removeprefix(self._prefix).lstrip()
        elif self._prefix.startswith(begun):
            return
        else:
            rest = self._held
        if rest:
            self._passing = True
            self._emit(rest)

    def finish(self) -> None:
        """Pass on what was held back, if the text ended inside the prefix."""
        if not self._passing and not self._held.lstrip().startswith(self._prefix):
            self._emit(self._held)


def _tokens_that_fit(folder: Path, is_artifact: bool, prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many new tokens fit after the prompt, `max_new_tokens` at most.

    An artifact has a KV cache of a fixed length, and the torch model as many positions as it was trained for.

    Raises:
        UsageError: the prompt leaves no room.
    """
    if is_artifact:
        length: int | None = context_of_artifact(folder)
        advice = "Shorten it, or export with a longer --context-length."
    else:
        length, advice = positions_of_folder(folder), "Shorten it: the model has no more positions."
    if length is None:
        return max_new_tokens
    if prompt_tokens >= length:
        raise UsageError(
            f"The prompt is {prompt_tokens} tokens long and {folder} holds {length} with its answer. {advice}"
        )
    free = length - prompt_tokens
    if free < max_new_tokens:
        progress.info(
            f"The answer ends after {free} tokens at most: the prompt has {prompt_tokens}, and {folder} holds {length} "
            "together."
        )
    return min(free, max_new_tokens)


class _Pieces(TextStreamer):
    """Streamer that passes finished text on instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Emit) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._emit(text)


def _generate_in_torch(
    folder: Path, tokenizer: PreTrainedTokenizerBase, ids: list[int], emit: Emit, max_new_tokens: int
) -> None:
    """Continue the ids of a prompt with the frozen checkpoint in torch."""
    model, eos_ids = frozen.load(folder), end_tokens(folder)
    weights_check.check_vocabulary(model, tokenizer, str(folder))
    prompt = torch.tensor([ids])
    # One prompt needs no padding, so any id will do; the mask says that every token counts.
    with torch.no_grad(), greedy_decoding(model, eos_ids, eos_ids[0], max_new_tokens):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=_Pieces(tokenizer, emit))
