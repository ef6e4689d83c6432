"""Generate text with the run's frozen model in torch, or with an artifact in its own runtime.

`chat` answers a whole conversation in the same way; `generate` is its first turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat_edge import progress
from qat_edge.data.answer_schema import SCHEMA_FILE
from qat_edge.data.chat_template import ChatTemplate
from qat_edge.data.conversation import ChatFormat, Prompt, text_prompt
from qat_edge.errors import DataError, RunError, UsageError
from qat_edge.export_command import export_again, export_targets
from qat_edge.manifest import MANIFEST, check_files
from qat_edge.models import tasks, tokenizer_check, weights_check
from qat_edge.models.artifact_options import context_of_artifact
from qat_edge.models.greedy_continuation import GreedyContinuation
from qat_edge.models.positions import positions_of_folder
from qat_edge.models.token_ids import TextStream
from qat_edge.models.tokenizer import end_tokens, load_tokenizer, trained_template_arguments
from qat_edge.quant import frozen
from qat_edge.readers import counted
from qat_edge.run import Run
from qat_edge_exporters.targets import TARGETS, Target, TextGenerator, target_named

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
    constrained: bool = False,
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
        constrained: permit only answers by the artifact's schema, of `export --schema`.

    Raises:
        RunError: there is nothing to generate with, the artifact was exported from another checkpoint, or it runs on
            other machines only.
        UsageError: the tokenizer has no chat template, the template refuses the messages, the prompt fills the
            context of the artifact or the model, or nothing constrains the answer.
    """
    model = find_model(run, source, "generate", constrained)
    if raw:
        if system is not None:
            raise UsageError("--system and --raw: a system message needs the chat template. Leave one out.")
        ready, block = text_prompt(prompt, model.tokenizer), ""
    else:
        ready = chat_prompt(model.tokenizer, prompt, system, model.template_arguments)
        block = ChatTemplate(model.tokenizer).empty_reasoning
    if not ready.ids:
        raise UsageError("The prompt is empty: it has no token to continue.")

    count = _tokens_that_fit(model, len(ready.ids), max_new_tokens)
    with model.open_generator() as generator:
        has_ended = answer(generator, ready, block, emit, count)
    if constrained and not has_ended:
        progress.warn(
            f"The answer was cut after {counted(count, 'token')}, so that it may not be valid. A larger "
            "--max-new-tokens permits longer ones."
        )


def _tokens_that_fit(model: FoundModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many new tokens fit after the prompt, `max_new_tokens` at most.

    Raises:
        UsageError: the prompt leaves no room.
    """
    if model.length is None:
        return max_new_tokens
    free = model.length - prompt_tokens
    if free <= 0:
        advice = "Shorten it, or export with a longer --context-length."
        if model.target is None:
            advice = "Shorten it: the model has no more positions."
        raise UsageError(
            f"The prompt is {prompt_tokens} tokens long and {model.folder} holds {model.length} with its answer. "
            f"{advice}"
        )
    if free < max_new_tokens:
        progress.info(
            f"The answer ends after {counted(free, 'token')} at most: the prompt has {prompt_tokens}, and "
            f"{model.folder} holds {model.length} together."
        )
    return min(free, max_new_tokens)


def answer(generator: TextGenerator, prompt: Prompt, block: str, emit: Emit, max_new_tokens: int) -> bool:
    """Pass the text of an answer to `emit`, without an empty block of reasoning before it.

    Args:
        generator: a loaded model.
        prompt: of the answer.
        block: the empty block, as the chat template writes it.
        emit: takes each piece of text as it comes.
        max_new_tokens: longest answer, in tokens.

    Returns:
        Whether the answer ended by itself.
    """
    shown = WithoutPrefix(emit, block)
    has_ended = generator.generate(prompt, shown, max_new_tokens)
    shown.finish()
    return has_ended


@dataclass(frozen=True)
class FoundModel:
    """The frozen checkpoint or an artifact, checked, not loaded yet.

    An artifact has a KV cache of a fixed length, and the torch model as many positions as it was trained for.

    Attributes:
        folder: its files.
        target: kind of artifact; None for the frozen checkpoint in torch.
        tokenizer: its own.
        template_arguments: further arguments of the chat template, as in training.
        length: tokens of prompt and answer together that it holds; None where it has no limit.
        constrained: answers follow the grammar next to the artifact.
    """

    folder: Path
    target: Target | None
    tokenizer: PreTrainedTokenizerBase
    template_arguments: Mapping[str, Any]
    length: int | None
    constrained: bool = False

    @contextmanager
    def open_generator(self) -> Iterator[TextGenerator]:
        """Load the model until the end of the block.

        Raises:
            ArtifactError: the artifact's runtime refused it.
        """
        if self.target is None:
            yield TorchGenerator(self.folder, self.tokenizer)
            return
        with self.target.open_generator(self.folder, self.tokenizer, self.constrained) as generator:
            yield generator


def find_model(run: Run, source: str, verb: str, constrained: bool = False) -> FoundModel:
    """Find the frozen checkpoint, or the folder of an artifact that runs here.

    Args:
        run: a finished run.
        source: "torch", or the name of an exported target.
        verb: that generates text, for messages.
        constrained: its answers have to follow the schema next to it.

    Raises:
        RunError: it is missing, was exported from another checkpoint, or runs on other machines only.
        UsageError: no such source, an encoder, or nothing there constrains answers.
        ArtifactError: its manifest records another context than its files have.
    """
    tasks.require_causal_lm(run, verb)
    if source != TORCH and source not in TARGETS:
        raise UsageError(f"--from {source}: not known. Known: {', '.join((TORCH, *TARGETS))}.")
    target = None if source == TORCH else target_named(source)
    if target is not None and target.runs_elsewhere:
        raise RunError(f"{target.runs_elsewhere} Use the same codes in another artifact, or the torch model.")
    folder = run.quantized if target is None else run.exports / target.name
    if not folder.is_dir():
        command = export_targets(run.path, [] if target is None else [target.name])
        raise RunError(f"{folder} is missing. `{command}` makes it.")
    check_files(folder)
    if constrained:
        _require_grammar(run, folder, source, target)
    # An artifact of another checkpoint answers for a model that this run does not hold. One can be shipped alone.
    if target is not None and (run.quantized / MANIFEST).is_file():
        run.require_current(target.name)

    # The token ids are those before an answer in training, whatever runs the model.
    tokenizer = load_tokenizer(folder)
    tokenizer_check.check_copy(tokenizer, folder)
    length = positions_of_folder(folder) if target is None else context_of_artifact(folder)
    return FoundModel(folder, target, tokenizer, trained_template_arguments(folder), length, constrained)


def _require_grammar(run: Run, folder: Path, source: str, target: Target | None) -> None:
    """Require an artifact with a schema, in a runtime that takes its grammar.

    Raises:
        UsageError: says what is lacking.
    """
    if target is None or target.grammar is None:
        able = " or ".join(f"--from {name}" for name, other in TARGETS.items() if other.grammar is not None)
        reason = "the frozen checkpoint in torch has no grammar." if target is None else target.without_grammar
        raise UsageError(f"--constrained and --from {source}: {reason} Give {able}.")
    if not (folder / SCHEMA_FILE).is_file():
        raise UsageError(
            f"--constrained: {folder} has no {SCHEMA_FILE}. Export it with one: "
            f"`{export_again(folder, schema='FILE')}`."
        )


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


class TorchGenerator:
    """The frozen checkpoint in torch."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        model = frozen.load(folder)
        weights_check.check_vocabulary(model, tokenizer, str(folder))
        self._tokenizer = tokenizer
        self._ends = end_tokens(folder)
        self._continuation = GreedyContinuation(model)
        self._is_stopped = False

    def generate(self, prompt: Prompt, emit: Emit, max_new_tokens: int) -> bool:
        """Continue `prompt` greedily; see `TextGenerator`."""
        text, count = TextStream(self._tokenizer, emit), 0

        def take(token: int) -> bool:
            nonlocal count
            text.take(token)
            count += 1
            return not self._is_stopped

        try:
            self._continuation.run(prompt.ids, self._ends, max_new_tokens, take)
        finally:
            self._is_stopped = False
        text.finish()
        return count < max_new_tokens

    def stop(self) -> None:
        """End the text in progress."""
        self._is_stopped = True
