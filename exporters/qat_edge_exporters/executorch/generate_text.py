"""Generate text with a .pte in ExecuTorch's own LLM runner, the one inside its phone apps."""

from __future__ import annotations

import codecs
import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from transformers import PreTrainedTokenizerBase

from qat_edge.data.conversation import Prompt
from qat_edge.errors import ArtifactError
from qat_edge_exporters.executorch import llm_runner, runner_tokenizer
from qat_edge_exporters.runner_process import RunnerProcess, runner_error, start_runner


@dataclass(frozen=True)
class PteGenerator:
    """A .pte in ExecuTorch's runner, which starts each prompt with an empty KV cache."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    _runner: RunnerProcess

    def generate(self, prompt: Prompt, emit: Callable[[str], None], max_new_tokens: int) -> bool:
        """Continue `prompt` greedily; see `TextGenerator`.

        Raises:
            ArtifactError: the runner refused the program, or its tokenizer splits the prompt otherwise than training.
        """
        mark = secrets.token_hex(8)  # that no answer has
        printed = PrintedAnswer(self._runner.output, self.tokenizer.all_special_tokens, mark)
        request = {"text": prompt.text, "ids": prompt.ids, "tokens": max_new_tokens, "mark": mark}
        with self._runner.turn(request):
            for piece in printed.pieces():
                self._runner.has_answered = True
                emit(piece)
            if printed.tokens is None:
                raise self.error()
        return printed.has_end or printed.tokens < max_new_tokens

    def stop(self) -> None:
        """End the answer in progress."""
        self._runner.stop()

    def error(self) -> ArtifactError:
        """Return the error of a runner that ended."""
        code, reason = self._runner.finish()
        if code != llm_runner.OTHER_IDS:
            return runner_error(self.folder / "model.pte", "ExecuTorch's runner", self._runner, reason)
        fault = runner_tokenizer.describe_split(self.folder / runner_tokenizer.TOKENIZER, "this prompt", reason)
        return ArtifactError(
            f"{self.folder}: {fault} --from torch or onnx takes it; `qat-edge doctor {self.folder}` compares other "
            "texts."
        )


@contextlib.contextmanager
def open_generator(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[PteGenerator]:
    """Start the runner until the end of the block.

    Raises:
        ArtifactError: the runner refused the program.
    """
    with start_runner(llm_runner, folder, llm_runner.ENVIRONMENT) as process:
        generator = PteGenerator(folder, tokenizer, process)
        if not process.wait_until_loaded():
            raise generator.error()
        yield generator


class PrintedAnswer:
    """The text in what the runner prints, without special tokens and without what follows the text.

    Attributes:
        tokens: number of generated tokens; None until the mark came.
        has_end: the last thing printed was a special token, up to newlines.
    """

    def __init__(self, stream: IO[bytes], special_tokens: Sequence[str], mark: str) -> None:
        self.tokens: int | None = None
        self.has_end = False
        self._stream = stream
        self._special_tokens = special_tokens
        self._mark = mark

    def pieces(self) -> Iterator[str]:
        """Yield the text as it comes. Newlines after an end token wait for text: the last is the runner's."""
        newlines = ""
        for piece in self._text():
            if piece == "\n" and self.has_end:
                newlines += piece
                continue
            yield newlines + piece
            newlines = ""

    def _text(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        marks = (llm_runner.STATISTICS, self._mark, *self._special_tokens)
        pending = ""
        for byte in iter(lambda: self._stream.read(1), b""):
            pending += decoder.decode(byte)
            for token in self._special_tokens:
                self.has_end |= token in pending
                pending = pending.replace(token, "")

            if pending in (llm_runner.STATISTICS, self._mark):
                self._read_count(is_mark=pending == self._mark)
                return

            # Text that may still become a special token or the statistics waits for the next bytes.
            while pending and not any(mark.startswith(pending) for mark in marks):
                self.has_end &= pending[0] == "\n"
                yield pending[0]
                pending = pending[1:]
        if pending:
            yield pending

    def _read_count(self, is_mark: bool) -> None:
        """Read up to the line with the mark, which has the number of tokens."""
        for line in iter(self._stream.readline, b""):
            words = line.decode(errors="replace").split()
            if is_mark or words[:1] == [self._mark]:
                self.tokens = int(words[-1])
                return
