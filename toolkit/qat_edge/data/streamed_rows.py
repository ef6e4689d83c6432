"""Training rows that are read and tokenized as they are needed, in blocks, again and again from the beginning.

A block has the next rows of the data, as many as fit into BLOCK_ROWS and BLOCK_BYTES. Its rows are tokenized, packed
with --packing, and shuffled with a seed that depends on the pass and the block. So a place in the stream is two
numbers, and the rows from there on follow from the data alone: a resumed training reads up to its block, tokenizes it,
and goes on in its middle. The rows up to there must be those that the run has read; later ones may have been mended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from qat_edge import progress
from qat_edge.data.formats import RowStream, identity
from qat_edge.data.packed_rows import PackedRows
from qat_edge.data.rows import Chat, Row
from qat_edge.data.token_table import TokenRow, TokenTable
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import RunError
from qat_edge.readers import counted, read_object, show

POSITION_FILE = "stream.json"  # in a checkpoint
BLOCK_ROWS = 10_000
MOST = 2**60  # of the numbers of a position
BLOCK_BYTES = 16 * 1024**2  # of texts, before they are tokenized


class RowBlock(NamedTuple):
    """Consecutive rows.

    Attributes:
        rows: The rows.
        sha256: Identity of all rows of the data up to the last one of them.
    """

    rows: list[Row]
    sha256: str


def blocks(rows: Iterable[Row]) -> Iterator[RowBlock]:
    """Yield the blocks of the data, without tokenizing them."""
    digest = hashlib.sha256()
    block, size = [], 0
    for row in rows:
        content = identity(row)
        digest.update(content)
        block.append(row)
        size += len(content)
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield RowBlock(block, digest.hexdigest())
            block, size = [], 0
    if block:
        yield RowBlock(block, digest.hexdigest())


def first_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the first block, which stand for all rows where all of them cannot be looked at."""
    return next((block.rows for block in blocks(rows)), [])


def sample_of(stream: RowStream) -> Iterable[Row]:
    """Return the rows to calibrate on: all of a file or data set, those of the first block of a stream, with a line.

    Raises:
        DataError: A row cannot be read.
    """
    if not stream.streamed:
        return stream
    rows = first_rows(stream)
    progress.info(f"{stream.source} is streamed: the first {counted(len(rows), 'row')} stand for all of it")
    return rows


@dataclass(frozen=True)
class StreamCounts:
    """Counts of the rows of the first pass, as far as it is read.

    Attributes:
        rows: Rows of the data.
        sequences: Tokenized rows that they became.
        truncated: Rows cut at --max-length.
        cut_tokens: Tokens removed from them.
        dropped: Rows without a token to train on.
    """

    rows: int = 0
    sequences: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    dropped: int = 0

    def plus(self, rows: int, tokenized: TokenizedRows) -> StreamCounts:
        """Return the counts with those of another block."""
        return StreamCounts(
            self.rows + rows,
            self.sequences + len(tokenized.rows),
            self.truncated + tokenized.truncated,
            self.cut_tokens + tokenized.cut_tokens,
            self.dropped + tokenized.dropped,
        )


@dataclass(frozen=True)
class StreamPosition:
    """Beginning of a block, as a checkpoint records it.

    Attributes:
        epoch: Passes over the data before this one.
        block: Blocks of this pass before it.
        yielded: Rows, or packed sequences, that were trained on before it.
        sha256: Identity of the rows of the data up to its end.
        counts: Counts with those of the block.
        end_of_turn: Ids of the tokens that end answers, in all blocks up to this one.
        template_arguments: Arguments of the chat template that their conversations share; None without conversations.
    """

    epoch: int = 0
    block: int = 0
    yielded: int = 0
    sha256: str = ""
    counts: StreamCounts = StreamCounts()
    end_of_turn: tuple[int, ...] = ()
    template_arguments: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: Path) -> StreamPosition:
        """Read the position of a checkpoint.

        Raises:
            RunError: It is missing or damaged.
        """
        found = read_object(path, RunError)
        counts, ends, arguments = (found.get(name) for name in ("counts", "end_of_turn", "template_arguments"))
        numbers = [found.get(name) for name in ("epoch", "block", "yielded")]
        if (
            found.keys() == _names(cls)
            and isinstance(found["sha256"], str)
            and isinstance(counts, dict)
            and counts.keys() == _names(StreamCounts)
            and isinstance(ends, list)
            and isinstance(arguments, dict | None)
            and all(type(number) is int and 0 <= number < MOST for number in [*numbers, *counts.values(), *ends])
        ):
            return cls(**{**found, "counts": StreamCounts(**counts), "end_of_turn": tuple(ends)})
        raise RunError(
            f"--resume: {path} is damaged: {show(found)} is no position in the data. Remove that checkpoint to "
            "continue from an earlier one."
        )


def _names(record: type[StreamPosition | StreamCounts]) -> set[str]:
    return {entry.name for entry in dataclasses.fields(record)}


class StreamedRows(IterableDataset[TokenRow]):
    """Endless tokenized rows, or packed sequences of them.

    Attributes:
        stream: The rows of the data.
        tokenize: Tokenizes the rows of a block. An empty result is permitted.
        seed: Of the order.
        capacity: Tokens of a packed sequence; None without packing.
        eval_rows: Evaluation rows, which should not be among the training rows; None without.
        conversation: Entry of the manifests, which is kept true as blocks are read.
        position: Beginning of the block that is read.
    """

    def __init__(
        self,
        stream: RowStream,
        tokenize: Callable[[list[Row]], TokenizedRows],
        seed: int,
        capacity: int | None,
        eval_rows: TokenTable | None,
        conversation: dict[str, Any],
        known_notes: Iterable[str] = (),
    ) -> None:
        """Begin at the beginning of the data; nothing is read yet. known_notes: Those that are reported already."""
        self.stream, self.tokenize, self.seed, self.capacity = stream, tokenize, seed, capacity
        self.eval_rows, self.conversation = eval_rows, conversation
        self.position = StreamPosition()
        self._begun: list[StreamPosition] = []  # blocks of which not all is known to be trained on
        self._skip: int | None = None  # sequences of the first block that a resumed run has trained on
        self._noted = {_kind(note) for note in known_notes}

    def resume(self, position: StreamPosition, yielded: int) -> None:
        """Begin inside of a block. yielded: rows or sequences that were trained on, in all.

        Raises:
            RunError: The position is not before them.
        """
        if yielded < position.yielded:
            raise RunError(f"--resume: {POSITION_FILE} of the checkpoint is of a later step. Remove the checkpoint.")
        self.position, self._skip = position, yielded - position.yielded
        self._share_conversation()

    def position_at(self, yielded: int) -> StreamPosition:
        """Return the block of the row or sequence that follows `yielded` ones."""
        while len(self._begun) > 1 and self._begun[1].yielded <= yielded:
            del self._begun[0]
        return self._begun[0] if self._begun else self.position

    def __iter__(self) -> Iterator[TokenRow]:
        """Yield rows or packed sequences, pass after pass.

        Raises:
            DataError: A row cannot be read or used. The message names its file and line.
            RunError: The rows up to the position of a resumed run are others than it has read.
        """
        while True:
            read = 0
            for block in islice(blocks(self.stream), self.position.block, None):
                self._require_same(block)
                sequences = self._read(block)
                order = list(range(len(sequences)))
                random.Random(f"{self.seed} {self.position.epoch} {self.position.block}").shuffle(order)
                for index in order[self._skip or 0 :]:
                    yield sequences[index]
                read, self._skip = read + 1, None
                yielded = self.position.yielded + len(sequences)
                self.position = dataclasses.replace(self.position, block=self.position.block + 1, yielded=yielded)
                del sequences  # before the next block is read
            if not read:
                raise self._changed()
            self.position = dataclasses.replace(self.position, epoch=self.position.epoch + 1, block=0)

    def summary(self) -> str:
        """Return what was read in the first pass, as one line of a message."""
        counts = self.position.counts
        line = f"{counted(counts.rows, 'row')} read"
        if self.position.epoch:
            line += f", some of them {self.position.epoch + 1} times"
        if counts.truncated:
            line += f"; {counted(counts.truncated, 'row')} truncated, {counted(counts.cut_tokens, 'token')} lost"
        if counts.dropped:
            line += f"; {counted(counts.dropped, 'row')} dropped: no token with loss was left"
        return line

    # --- one block -----------------------------------------------------------------------------------------

    def _require_same(self, block: RowBlock) -> None:
        """Require that a resumed run goes on among the rows that it has read.

        Raises:
            RunError: They are others.
        """
        if self._skip is not None and block.sha256 != self.position.sha256:
            raise self._changed()

    def _changed(self) -> RunError:
        return RunError(
            f"--resume: {self.stream.source} has other rows than when the run read them. Only rows that it has not "
            "reached may change. Restore the others, or train again with --force."
        )

    def _read(self, block: RowBlock) -> TokenTable | PackedRows:
        """Tokenize a block, and add what is known of it to the position."""
        tokenized = self.tokenize(block.rows)
        known = self.position.end_of_turn
        position = dataclasses.replace(self.position, sha256=block.sha256)
        # A resumed run has counted its first block, and later passes have the same rows.
        if self._skip is None and position.epoch == 0:
            position = dataclasses.replace(
                position,
                counts=position.counts.plus(len(block.rows), tokenized),
                end_of_turn=tuple(dict.fromkeys([*position.end_of_turn, *tokenized.end_of_turn])),
                template_arguments=_common_arguments(position.template_arguments, block.rows, tokenized),
            )
        self.position = position
        self._begun.append(position)
        self._share_conversation()
        self._report(block, tokenized, [token for token in position.end_of_turn if known and token not in known])
        return tokenized.rows if self.capacity is None else PackedRows(tokenized.rows, self.capacity)

    def _share_conversation(self) -> None:
        """Write into the manifests how conversations end, and which arguments of the template they share."""
        self.conversation["end_of_turn"] = self.position.end_of_turn
        self.conversation["template_arguments"] = self.position.template_arguments or {}

    def _report(self, block: RowBlock, tokenized: TokenizedRows, new_ends: list[int]) -> None:
        """Report what is to know about the rows of a block, unless an earlier block has rows of the kind."""
        shared = 0 if self.eval_rows is None else self.eval_rows.shared_rows(tokenized.rows)
        notes = list(tokenized.notes)
        if shared:
            notes.append(f"{shared} evaluation rows are also among these training rows: figures flatter the model")
        if new_ends:
            notes.append(f"answers also end with the tokens {new_ends}, which become end tokens of every artifact")
        for note in notes:
            if _kind(note) not in self._noted:
                self._noted.add(_kind(note))
                progress.info(f"train, from {block.rows[0].where} on: {note}.")


def _kind(note: str) -> str:
    """Return a sentence without its numbers."""
    return re.sub(r"\d+", "", note)


def _common_arguments(
    before: dict[str, Any] | None, rows: list[Row], tokenized: TokenizedRows
) -> dict[str, Any] | None:
    """Return the arguments of the chat template that the conversations of all blocks share, empty where they differ."""
    if not any(isinstance(row, Chat) for row in rows):
        return before
    return tokenized.template_arguments if before in (None, tokenized.template_arguments) else {}
