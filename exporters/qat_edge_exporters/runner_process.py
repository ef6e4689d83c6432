"""A text runner in a process of its own: a runtime that crashes or prints to stdout does neither in ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from qat_edge.errors import ArtifactError
from qat_edge.python_process import python_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # at the end of a text whose last character has further bytes


@dataclass(frozen=True)
class RunnerProcess:
    """A runner that has its prompt.

    Attributes:
        output: what it prints.
    """

    output: IO[bytes]
    _process: subprocess.Popen[bytes]
    _log: IO[str]

    def finish(self) -> tuple[int, str]:
        """Wait for its end; return the exit code (negative for a signal) and the reason that it logged last."""
        code = self._process.wait()
        self._log.seek(0)
        # ExecuTorch marks errors with "E" and what is no reason with "I" or "D"; other runtimes and Python end with
        # their reason.
        lines = [line.strip() for line in self._log if line.strip() and not line.startswith(("I ", "D "))]
        marked = [line for line in lines if line.startswith("E ")]
        said = (marked or lines)[-1:]
        return code, said[0] if said else _describe_end(code)


def _describe_end(code: int) -> str:
    """Describe the end of a process that logged no reason. code: negative for a signal."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"


@contextlib.contextmanager
def start_runner(
    module: ModuleType, folder: Path, tokens: int, prompt: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[RunnerProcess]:
    """Run `python -m module FOLDER TOKENS` with the prompt as JSON on stdin.

    Args:
        module: with the runner's `main`.
        folder: of the artifact.
        tokens: longest continuation.
        prompt: what the module reads.
        environment: variables beyond those of this process.
    """
    command = python_command(module.__name__, str(folder), str(tokens))
    # Errors go to a file: a pipe that nobody reads while the text is read would fill up and block the runner.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        # A runner that died before it read the prompt is reported by its exit code.
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(prompt).encode())
        yield RunnerProcess(process.stdout, process, log)


def emit_generated_ids(
    module: ModuleType,
    folder: Path,
    tokens: int,
    prompt: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    emit: Callable[[str], None],
    failure: str,
) -> None:
    """Run a runner that prints the id of each token as a line; each piece of their text goes to `emit` as it comes.

    Args:
        module: as in `start_runner`, like `folder`, `tokens` and `prompt`.
        folder: of the artifact.
        tokens: longest continuation.
        prompt: what the module reads.
        tokenizer: of the ids.
        emit: takes text.
        failure: what the message of a failure says before the reason.

    Raises:
        ArtifactError: the runner failed.
    """
    ids: list[int] = []
    shown = ""
    with start_runner(module, folder, tokens, prompt, {}) as runner:
        for line in runner.output:
            ids.append(int(line))
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            if not text.endswith(INCOMPLETE):
                emit(text[len(shown) :])
                shown = text
        code, reason = runner.finish()
    emit(str(tokenizer.decode(ids, skip_special_tokens=True))[len(shown) :])
    if code != 0:
        raise ArtifactError(f"{folder}: {failure}: {reason}. Export it again.")
