"""A model of a run as lm-evaluation-harness sees one; imported only where the harness is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from qat_edge.data.chat_template import encode
from qat_edge.data.conversation import AnswerReader, ChatFormat, end_ids, extend_ids, lead_of, text_prompt
from qat_edge.data.tokenization import ScoredIds
from qat_edge.errors import RunError, UsageError
from qat_edge.models import tasks
from qat_edge.models.tokenizer import end_tokens, load_tokenizer, trained_template_arguments
from qat_edge.public_tasks.answering import TORCH, find_source, open_model
from qat_edge.run import Run

MAX_NEW_TOKENS = 256  # where a task sets no limit, as in the harness's own models


class HarnessModel(LM):
    """One model of a run.

    Attributes:
        tokenizer: The run's.
        context_length: Tokens of prompt and answer together; longer prompts lose their beginning.
    """

    def __init__(
        self,
        run: str,
        source: str = TORCH,
        threads: int = 2,
        context_length: int = 1024,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        """Find the model.

        Args:
            run: Run folder.
            source: The model, as `qat-edge eval --from` has it.
            threads: CPU threads of an artifact's runtime.
            context_length: Tokens of prompt and answer together.
            batch_size: Has no effect; the harness passes it.
            max_batch_size: Has no effect.
            device: Has no effect; models run on this machine's CPU.

        Raises:
            UsageError, RunError: The run has no such model.
        """
        super().__init__()
        self._run = Run.open(Path(run))
        tasks.require_causal_lm(self._run, "the harness")
        if not self._run.quantized.is_dir():
            raise RunError(f"{self._run.quantized} is missing. `qat-edge export {run}` makes it.")
        self._source, self._threads = find_source(self._run, source), threads
        self.context_length = min(context_length, self._source.context_length or context_length)
        self.tokenizer = load_tokenizer(self._run.quantized)
        self._eos_ids = end_tokens(self._run.quantized)
        self._template_arguments = trained_template_arguments(self._run.quantized)
        # A rendered chat template brings its own first tokens, which a plain text gets from us.
        self._is_chat = False

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return log-probability of each continuation, and whether it is the greedy one."""
        return self._scores([self._continuation(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the log-probability of each text, in windows that each begin with the last token of the one before."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._scores([window for each in windows for window in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return greedy answers, each cut before the first text that ends it."""
        answers: dict[int, str] = {}
        limits = [_greedy_limit(request.args[1]) for request in requests]
        reader = AnswerReader(self.tokenizer)
        pad_id = self._eos_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        with open_model(self._source, self._eos_ids, pad_id, self._threads) as model:
            # One call for each limit, because a model takes one limit for all prompts.
            for limit in sorted(set(limits)):
                chosen = [index for index, each in enumerate(limits) if each == limit]
                room = max(1, self.context_length - limit)
                prompts = [self._context_ids(requests[index].args[0])[-room:] for index in chosen]
                outputs = model.generate(prompts, min(limit, self.context_length - 1))
                for index, ids in zip(chosen, outputs, strict=True):
                    answers[index] = _before(reader.from_ids(ids), requests[index].args[1].get("until"))
        return [answers[index] for index in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation, as in training.

        Raises:
            UsageError: The prompt is to end inside of an answer.
        """
        if not add_generation_prompt:
            raise UsageError("qat-edge: a beginning of the answer (gen_prefix) is not supported. Use another task.")
        self._is_chat = True
        return ChatFormat(self.tokenizer).prompt(chat_history, self._template_arguments).text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template, for the harness's records."""
        return str(self.tokenizer.chat_template or "")

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache."""
        return str(self._run.quantized.resolve())

    # --- token ids ---------------------------------------------------------------------------------------------

    def _context_ids(self, text: str) -> list[int]:
        if self._is_chat:
            return encode(text, self.tokenizer)
        # A first token for a text that has none: the model cannot predict from nothing.
        return text_prompt(text, self.tokenizer).ids or end_ids(self.tokenizer) or self._eos_ids[:1]

    def _continuation(self, context: str, continuation: str) -> ScoredIds:
        """Return a context with its continuation, without what exceeds the context length at the beginning."""
        # A space belongs to the word after it, as in the tokens of running text.
        text = context.rstrip(" ")
        continuation = context[len(text) :] + continuation
        before = self._context_ids(text)
        if text:
            ids = extend_ids(before, text, text + continuation, self.tokenizer)
        else:
            ids = [*before, *encode(continuation, self.tokenizer)]
        predicted = len(ids) - len(before)
        ids = ids[-self.context_length :]
        first = max(len(ids) - predicted, 1)
        return ScoredIds(ids, list(range(first - 1, len(ids) - 1)))

    def _windows(self, text: str) -> list[ScoredIds]:
        """Cut a text into windows whose tokens are predicted once each."""
        ids = text_prompt(text, self.tokenizer).ids
        ids = ids if lead_of(self.tokenizer).ids else [*self._eos_ids[:1], *ids]
        step = self.context_length - 1
        windows = [ids[start : start + step + 1] for start in range(0, max(len(ids) - 1, 1), step)]
        return [ScoredIds(window, list(range(len(window) - 1))) for window in windows if len(window) > 1]

    def _scores(self, sequences: Sequence[ScoredIds]) -> list[tuple[float, bool]]:
        with open_model(self._source, self._eos_ids, self._eos_ids[0], self._threads) as model:
            return [(float(scores.log_probs.sum()), bool(scores.first.all())) for scores in model.score(sequences)]


def _greedy_limit(settings: dict[str, Any]) -> int:
    """Return the longest answer of a request.

    Raises:
        UsageError: The request is to be sampled.
    """
    if settings.get("do_sample") or settings.get("temperature", 0) not in (0, 0.0, None):
        raise UsageError("qat-edge: answers are greedy. Set do_sample to false and temperature to 0 in the task.")
    return int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS)


def _before(text: str, ends: str | Iterable[str] | None) -> str:
    """Return a text up to the first of the texts that end it."""
    for end in [ends] if isinstance(ends, str) else ends or ():
        if end:
            text = text.partition(end)[0]
    return text
