"""Questions of a task as token ids: the prompts that training and generation use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from qat_edge import progress
from qat_edge.data.conversation import ChatFormat, extend_ids, text_prompt
from qat_edge.data.tokenization import ScoredIds
from qat_edge.errors import UsageError
from qat_edge.evaluate.prompts import describe_cut_answers
from qat_edge.models.tokenizer import trained_template_arguments
from qat_edge.options import EvalOptions
from qat_edge.public_tasks import function_calls
from qat_edge.public_tasks.questions import GENERATE, PREDICT, Question, Task
from qat_edge.readers import counted
from qat_edge.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prepared(NamedTuple):
    """A question as token ids.

    Attributes:
        question: The question.
        prompt_ids: Prompt of a generated answer; empty for other forms.
        sequences: Text with each choice, or the text alone, scored at the tokens that are predicted.
    """

    question: Question
    prompt_ids: list[int]
    sequences: list[ScoredIds]

    @property
    def tokens(self) -> int:
        """Tokens of the longest input."""
        return max(len(self.prompt_ids), *(len(sequence.ids) for sequence in self.sequences), 0)


class TaskPrompts:
    """Turns the questions of a task into token ids.

    Attributes:
        settings: What decides the answers besides model and questions.
    """

    def __init__(self, run: Run, task: Task, options: EvalOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        _require_used(task, options)
        self._task, self._options, self._tokenizer = task, options, tokenizer
        self._chat_format = ChatFormat(tokenizer)
        self._arguments = trained_template_arguments(run.quantized)
        self.max_new_tokens = options.max_new_tokens or task.max_new_tokens if task.form == GENERATE else 0
        self._as_text = False
        if task.form == GENERATE:
            is_tokenized = bool(task.test and task.test[0].ids)
            if not tokenizer.chat_template and not is_tokenized:
                raise UsageError(f"--task {task.name}: this model's tokenizer has no chat template for the questions.")
            self._as_text = self._writes_calls_as_text()
        calls = {"calls": "text" if self._as_text else "template"} if task.test and task.test[0].tools else {}
        self.settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, **calls}

    def prepare(self) -> list[Prepared]:
        """Return the questions that fit, at most --limit of them.

        Raises:
            UsageError: None fits.
        """
        limit = self._options.limit or len(self._task.test)
        fitting: list[Prepared] = []
        left_out = 0
        for question in self._task.test:
            if len(fitting) == limit:
                break
            prepared = self._prepared(question)
            if prepared.tokens + self.max_new_tokens > self._options.context_length:
                left_out += 1
            else:
                fitting.append(prepared)
        if not fitting:
            raise UsageError(
                f"--context-length {self._options.context_length}: no question of {self._task.name} fits, with "
                f"{self.max_new_tokens} tokens for the answer. Give a longer one."
            )
        if left_out:
            progress.warn(
                f"Left out {counted(left_out, 'question that is', 'questions that are')} longer than "
                f"{self._options.context_length} tokens with the answer"
            )
        cut = describe_cut_answers([each.question.answer_tokens for each in fitting], self.max_new_tokens)
        if cut and self._task.form == GENERATE:
            progress.warn(cut)
        return fitting

    def _prepared(self, question: Question) -> Prepared:
        if question.ids:
            is_prompt = self._task.form == GENERATE
            sequences = [] if is_prompt else [ScoredIds(question.ids, question.positions)]
            return Prepared(question, question.ids if is_prompt else [], sequences)
        if self._task.form == GENERATE:
            shown = function_calls.as_text(question) if self._as_text else question
            prompt = self._chat_format.prompt(
                shown.messages, self._arguments, shown.tools, f"{self._task.name}, question {question.id}"
            )
            return Prepared(question, prompt.ids, [])

        prompt = text_prompt(question.text, self._tokenizer)
        if self._task.form == PREDICT:
            return Prepared(question, [], [ScoredIds(prompt.ids, list(range(len(prompt.ids) - 1)))])
        choices = []
        for choice in question.choices:
            ids = extend_ids(prompt.ids, question.text, question.text + choice, self._tokenizer)
            choices.append(ScoredIds(ids, list(range(len(prompt.ids) - 1, len(ids) - 1))))
        return Prepared(question, [], choices)

    def _writes_calls_as_text(self) -> bool:
        """Return whether functions are described in the system message.

        Raises:
            UsageError: --calls template, and the chat template takes no tools.
        """
        tools = next((question.tools for question in self._task.test if question.tools), None)
        if tools is None or self._options.calls == "text":
            return tools is not None
        takes_tools = self._chat_format.takes_tools(tools)
        if self._options.calls == "template" and not takes_tools:
            raise UsageError(
                "--calls template: this model's chat template leaves tools out, so the model would not see the "
                "functions. Give --calls text."
            )
        return not takes_tools


def _require_used(task: Task, options: EvalOptions) -> None:
    """Refuse options that have no effect on a task.

    Raises:
        UsageError: It has --max-new-tokens and generates nothing, or --calls and no functions.
    """
    if options.max_new_tokens is not None and task.form != GENERATE:
        raise UsageError(
            f"--max-new-tokens and --task {task.name}: this task generates no answers. Leave --max-new-tokens out."
        )
    if options.calls != "auto" and not any(question.tools for question in task.test):
        raise UsageError(f"--calls and --task {task.name}: this task has no functions to call. Leave --calls out.")
