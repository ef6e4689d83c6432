"""Read the rows of a training, report what is to know about them, and make the dataset of the Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat_edge import progress
from qat_edge.data import training_examples
from qat_edge.data.formats import RowStream
from qat_edge.data.packed_rows import PackedRows
from qat_edge.data.rows import Row
from qat_edge.data.streamed_rows import StreamedRows, first_rows
from qat_edge.data.token_table import TokenTable
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.models import load, weights_check
from qat_edge.models.tasks import ModelTask
from qat_edge.models.tokenizer import end_token_origins, model_end_tokens
from qat_edge.options import FinetuneOptions
from qat_edge.readers import counted
from qat_edge.train.option_checks import row_length

TrainingData = TokenTable | PackedRows | StreamedRows  # what the Trainer draws from


@dataclass(frozen=True)
class RowReader:
    """Reads and tokenizes rows for a model.

    Attributes:
        options: Of finetune.
        task: The task the model is trained for.
        model: The base model.
        tokenizer: Its tokenizer.
        identity: Where the model comes from.
    """

    options: FinetuneOptions
    task: ModelTask
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: load.ModelIdentity

    def read(self, stream: RowStream) -> TokenizedRows:
        """Read the rows of a file or data set, of a stream those of the first block, and report their counts."""
        first = first_rows(stream) if stream.streamed else None
        rows = self._tokenize(stream if first is None else first, stream.source)
        name = stream.split if first is None else f"{stream.split}, the first {counted(len(first), 'row')}"
        progress.info(f"{name}: {rows.summary()}")
        for note in rows.notes:
            progress.info(f"{name}: {note}.")
        return rows

    def training_data(
        self, stream: RowStream, rows: TokenizedRows, eval_rows: TokenizedRows | None, conversation: dict[str, Any]
    ) -> TrainingData:
        """Return the dataset of the Trainer.

        Args:
            stream: The training rows.
            rows: What `read` returned for them.
            eval_rows: Rows of --eval-data; None without.
            conversation: Entry of the manifests about conversations, which a stream keeps true.
        """
        capacity = row_length(self.options, self.model.config) if self.options.packing else None
        packed = None if capacity is None else PackedRows(rows.rows, capacity)
        if packed is not None:
            progress.info(f"{stream.split}: {packed.describe(self.options.batch_size)}")
        if not stream.streamed:
            return rows.rows if packed is None else packed

        held_out = None if eval_rows is None else eval_rows.rows
        known = [*rows.notes, self._early_ends(rows)]
        seed = self.options.seed
        return StreamedRows(stream, self._tokenize_block, seed, capacity, held_out, conversation, known)

    def report(self, rows: TokenizedRows, eval_rows: TokenizedRows | None) -> None:
        """Report evaluation rows that are trained on, new end tokens, and answers that end early."""
        shared = 0 if eval_rows is None else eval_rows.rows.shared_rows(rows.rows)
        if eval_rows is not None and shared:
            progress.info(
                f"eval: {shared} of {len(eval_rows.rows)} evaluation rows are also training rows: figures flatter "
                "the model."
            )
        known = model_end_tokens(self.model, self.tokenizer)
        for token in rows.end_of_turn:
            if token not in known:
                progress.warn(
                    f"Answers end with {self.tokenizer.convert_ids_to_tokens(token)!r} (token {token}), which is not "
                    f"among the model's end tokens {known}. It becomes one in every artifact."
                )
        early = self._early_ends(rows)
        if early:
            progress.warn(f"train: {early}.")

    def _tokenize(self, rows: Iterable[Row], source: str, may_be_empty: bool = False) -> TokenizedRows:
        # An encoder's rows are cut to its positions below.
        is_encoder = self.task.is_encoder
        length = self.options.max_length if is_encoder else row_length(self.options, self.model.config)
        # A packed sequence keeps rows apart, so texts are not joined either.
        tokenized = training_examples.tokenize_for_task(
            self.task, rows, self.model, self.tokenizer, length,
            join_texts=not self.options.packing, may_be_empty=may_be_empty,
        )  # fmt: skip
        if not is_encoder:
            weights_check.check_ids(self.model, self.tokenizer, tokenized.rows, source)
        return tokenized

    def _tokenize_block(self, rows: list[Row]) -> TokenizedRows:
        """Tokenize a block of a stream. A note says which of its answers end early."""
        tokenized = self._tokenize(rows, self.options.data, may_be_empty=True)
        early = self._early_ends(tokenized)
        return dataclasses.replace(tokenized, notes=(*tokenized.notes, early)) if early else tokenized

    def _early_ends(self, rows: TokenizedRows) -> str:
        """Return a sentence about answers with an end token inside, at which every runtime would stop."""
        origins = end_token_origins(self.model, self.tokenizer)
        if self.identity.kind == "gguf":
            origins = dict.fromkeys(origins, f"tokenizer.ggml of {self.identity.name}")
        return rows.early_ends.describe(origins, self.tokenizer)
