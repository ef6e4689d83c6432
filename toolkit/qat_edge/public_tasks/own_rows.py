"""The user's own held-out rows as tasks, so that models can be compared on them row by row.

    rows        a greedy answer to each prompt, which has to equal the row's own: JSON by value, all else as text
    rows_loss   nats per token at the positions that have a loss in training

Prompts, positions and the comparison are those of `validate`, which reports the means alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qat_edge import config, option_paths, progress
from qat_edge.data import tokenization
from qat_edge.data.changed_rows import EVAL_DATA, warn_of_change
from qat_edge.data.conversation import AnswerReader
from qat_edge.data.formats import RowStream
from qat_edge.data.rows import Text
from qat_edge.errors import DataError
from qat_edge.evaluate.metrics import outputs_match
from qat_edge.evaluate.prompts import describe_early_ends, eval_prompts
from qat_edge.models.tokenizer import stored_end_token_origins
from qat_edge.options import MOST_DATA_TOKENS, EvalOptions, ValidateOptions
from qat_edge.public_tasks.questions import GENERATE, PREDICT, Question, Task
from qat_edge.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS, LOSS = "rows", "rows_loss"
TASKS = (ANSWERS, LOSS)


def load(run: Run, options: EvalOptions, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Load rows as a task; its questions are tokenized.

    Args:
        run: A run; its --eval-data is taken where `options` name no other rows.
        options: The task, its rows, and the length of a sequence.
        tokenizer: Of the run's models.

    Raises:
        DataError: There are no rows, or they cannot be used.
    """
    trained = config.load_trained(run.config).eval_data
    source = options.data or trained
    if source is None:
        raise DataError(f"No rows for --task {options.task}: finetune had no --eval-data. Give --data FILE.")
    if source == trained:
        option_paths.require_data(source, "eval --data")
    stream = RowStream(source, "eval")
    rows = list(stream)
    warn_of_change(run, EVAL_DATA, stream, "eval --data", options.data)

    if options.task == LOSS:
        sequences = tokenization.scored_ids(
            rows, tokenizer, options.context_length, MOST_DATA_TOKENS, "--context-length"
        )
        questions = [Question(f"row-{i}", ids=s.ids, positions=s.positions) for i, s in enumerate(sequences)]
        return Task(LOSS, "held-out rows", source, PREDICT, questions)

    reader, prompts = AnswerReader(tokenizer), list(eval_prompts(rows, tokenizer))
    questions = [
        Question(
            f"prompt-{index}",
            expected=reader.from_text(prompt.expected),
            ids=prompt.ids,
            answer_tokens=prompt.answer_tokens,
        )
        for index, prompt in enumerate(prompts)
    ]
    if not questions:
        raise DataError(
            f"{source}: no row has a prompt and an answer, so --task {ANSWERS} has nothing to ask. Give --task {LOSS}."
        )
    early = describe_early_ends(prompts, stored_end_token_origins(run.quantized), tokenizer)
    if early:
        progress.warn(f"{source}: {early}")
    texts = sum(isinstance(row, Text) for row in rows)
    if texts:
        progress.warn(
            f"{source}: {texts} of {len(rows)} rows are a 'text' without a prompt and are left out; --task {LOSS} "
            "measures them"
        )
    return Task(
        ANSWERS, "answers to held-out rows", source, GENERATE, questions,
        grade=_is_right, max_new_tokens=ValidateOptions.max_new_tokens,
    )  # fmt: skip


def _is_right(question: Question, answer: str) -> bool:
    return outputs_match(answer, question.expected)
