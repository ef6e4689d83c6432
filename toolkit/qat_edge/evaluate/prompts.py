"""Prompts with their expected answers, and which of these cannot be generated: too long for the limits of a run.

An answer is cut at --max-new-tokens, and at the end of the context that an artifact was exported with. A cut output
never equals its expected answer, so both are reported before any model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from qat_edge import progress
from qat_edge.data import tokenization
from qat_edge.data.conversation import AnswerReader
from qat_edge.data.early_ends import EarlyEnds
from qat_edge.data.rows import Row
from qat_edge.errors import UsageError
from qat_edge.evaluate.metrics import outputs_match
from qat_edge.readers import counted, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EvalPrompt(NamedTuple):
    """A prompt of evaluation rows.

    Attributes:
        ids: Token ids of the prompt.
        expected: Text of the answer.
        answer_tokens: Least number of tokens to generate for that answer, reasoning before it included.
        where: File and line of the row.
        answer_ids: Token ids of these tokens, as trained.
    """

    ids: list[int]
    expected: str
    answer_tokens: int
    where: str
    answer_ids: Sequence[int] = ()


class Context(NamedTuple):
    """Shortest context of the artifacts that answer.

    Attributes:
        tokens: Tokens of a prompt and its answer together.
        holder: What holds them, for messages.
    """

    tokens: int
    holder: str


def eval_prompts(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[EvalPrompt]:
    """Yield the prompts of `tokenization.prompts` with what has to be generated for each.

    Report the first prompt without a token, and the first answer that the chat template changes. An empty prompt has no
    token where the tokenizer puts none before a text, and no model can predict from nothing.
    """
    reader = AnswerReader(tokenizer)
    reported: set[str] = set()

    def report_once(where: str, finding: str, example: str = "") -> None:
        if finding not in reported:
            progress.warn(f"{where}: {finding}{example}")
        reported.add(finding)

    for each in tokenization.prompts(rows, tokenizer):
        if not each.ids:
            report_once(each.where, "the prompt is empty. Such rows are left out of the prompts")
            continue
        if each.is_rewritten:
            report_once(
                each.where,
                "the chat template changes the text of the answer, and training does as well. Such answers are "
                "expected as the template writes them",
                f", here {show(each.expected)}",
            )
        needed = _tokens_needed(each.answer_ids, each.expected, reader)
        yield EvalPrompt(each.ids, each.expected, needed, each.where, each.answer_ids[:needed])


def _tokens_needed(answer_ids: Sequence[int], expected: str, reader: AnswerReader) -> int:
    """Return how many of a trained answer's tokens have to be generated: not its end token, nor white space there."""
    wanted, count = reader.from_text(expected), len(answer_ids)
    while count > 0 and outputs_match(reader.from_ids(answer_ids[: count - 1]), wanted):
        count -= 1
    return count


def fitting_prompts(prompts: Iterable[EvalPrompt], count: int, context: Context | None) -> list[EvalPrompt]:
    """Return the first `count` prompts that leave room for an answer, and report how many were left out.

    Args:
        prompts: Prompts of all rows.
        count: Number to return at most.
        context: The limit; None for no limit.

    Raises:
        UsageError: There are prompts, and none fits.
    """
    if context is None:
        return list(islice(prompts, count))
    found: list[EvalPrompt] = []
    too_long: list[EvalPrompt] = []
    for prompt in islice(prompts, 0 if count == 0 else None):
        # One token of the answer has to fit, too.
        (found if len(prompt.ids) < context.tokens else too_long).append(prompt)
        if len(found) == count:
            break
    if not too_long:
        return found

    reason = (
        f"the first is {too_long[0].where} with {len(too_long[0].ids)} tokens, and {context.holder} holds "
        f"{context.tokens} together with an answer"
    )
    if not found:
        raise UsageError(
            f"None of {len(too_long)} prompts leaves room for an answer: {reason}. Shorten the rows, export with a "
            "longer --context-length, or give --prompts 0."
        )
    progress.warn(
        f"Left out {counted(len(too_long), 'prompt that leaves', 'prompts that leave')} no room for an answer: "
        f"{reason}. Export with a longer --context-length to ask them"
    )
    return found


def describe_cut_answers(answer_tokens: Sequence[int], max_new_tokens: int) -> str:
    """Return how many expected answers are longer than --max-new-tokens, as a sentence; empty if none is.

    Args:
        answer_tokens: `EvalPrompt.answer_tokens` of each prompt.
        max_new_tokens: Value of the flag.
    """
    longer = [tokens for tokens in answer_tokens if tokens > max_new_tokens]
    if not longer:
        return ""
    return (
        f"{len(longer)} of {len(answer_tokens)} expected answers are longer than --max-new-tokens {max_new_tokens} and "
        f"cannot match: give --max-new-tokens {max(longer)}"
    )


def describe_early_ends(
    prompts: Iterable[EvalPrompt], origins: Mapping[int, str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return how many expected answers have an end token inside, as a sentence; empty if none has.

    Args:
        prompts: Prompts with their answers.
        origins: The end tokens, each with the file that names it.
        tokenizer: The model's tokenizer.
    """
    early = EarlyEnds()
    for prompt in prompts:
        early.add(next((token for token in prompt.answer_ids if token in origins), None))
    return early.describe(origins, tokenizer)


def describe_lack_of_room(prompts: Sequence[EvalPrompt], context: Context | None) -> str:
    """Return how many expected answers go past the end of the context, as a sentence; empty if none does."""
    if context is None:
        return ""
    totals = [len(prompt.ids) + prompt.answer_tokens for prompt in prompts]
    past = [total for total in totals if total > context.tokens]
    if not past:
        return ""
    return (
        f"{len(past)} of {len(prompts)} expected answers go past the {context.tokens} tokens that {context.holder} "
        f"holds with their prompts and cannot match: export with --context-length {max(past)}"
    )
