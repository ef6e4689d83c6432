"""A text runner in a process of its own: a runtime that crashes or prints to stdout does neither in ours.

The runner keeps its model between the turns of a conversation; `runner_turns` has its side of the protocol.
"""

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
from qat_edge.models.token_ids import TextStream
from qat_edge.python_process import utf8_command
from qat_edge_exporters.runner_turns import END, READY, STOP

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qat_edge.data.conversation import Prompt

EXIT_S = 5.0  # after the end of stdin, until the runner is ended by force


class RunnerProcess:
    """A runner that waits for its next request.

    Attributes:
        output: what it prints.
        has_answered: part of an answer came, so the model was loaded.
    """

    has_answered = False

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes], log: IO[str]) -> None:
        self.output = output
        self._process = process
        self._log = log
        self._is_answering = self._is_stopped = False

    def wait_until_loaded(self) -> bool:
        """Wait for the model; return False if the runner ended instead. Libraries may print lines before."""
        return any(line.strip() == READY.encode() for line in iter(self.output.readline, b""))

    @contextlib.contextmanager
    def turn(self, request: Mapping[str, Any]) -> Iterator[None]:
        """Send a request; inside the block its answer is read. An error there ends the runner, whose answer goes on."""
        try:
            self._write(json.dumps(request))
            self._is_answering = True
            if self._is_stopped:  # before the runner could know which answer is meant
                self._write(STOP)
            yield
        except BaseException:
            self._process.kill()
            raise
        finally:
            self._is_answering = self._is_stopped = False

    def stop(self) -> None:
        """End the answer in progress; callable from a signal handler."""
        self._is_stopped = True
        if self._is_answering:
            self._write(STOP)

    def _write(self, line: str) -> None:
        # Without a buffer, which a signal handler must not enter twice. Why a runner died is read from its exit code.
        assert self._process.stdin is not None
        data = memoryview(f"{line}\n".encode())
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._process.stdin.fileno(), data) :]

    def finish(self) -> tuple[int, str]:
        """Wait for its end; return the exit code (negative for a signal) and the reason that it logged last."""
        code = self._process.wait()
        self._log.seek(0)
        # ExecuTorch marks errors with "E" and what is no reason with "I" or "D"; other runtimes and Python end with
        # their reason.
        lines = [line.strip() for line in self._log if line.strip() and not line.startswith(("I ", "D "))]
        marked = [line for line in lines if line.startswith("E ")]
        reasons = marked or (lines if code >= 0 else [])  # after a signal, the last line is about something else
        return code, reasons[-1] if reasons else _describe_end(code)


def _describe_end(code: int) -> str:
    """Describe the end of a process that logged no reason. code: negative for a signal."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"


@contextlib.contextmanager
def start_runner(module: ModuleType, folder: Path, environment: Mapping[str, str]) -> Iterator[RunnerProcess]:
    """Run `python -m module FOLDER` until the end of the block.

    Ctrl-C in a terminal does not reach it: it is for the command, which may only want to end an answer.

    Args:
        module: with the runner's `main`.
        folder: of the artifact.
        environment: variables beyond those of this process.
    """
    # Errors go to a file: a pipe that nobody reads while the text is read would fill up and block the runner.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            utf8_command(module.__name__, str(folder)), env={**os.environ, **environment}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            yield RunnerProcess(process, process.stdout, log)
            process.stdin.close()
            process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        except BaseException:
            process.kill()
            raise


@dataclass(frozen=True)
class IdRunner:
    """Text generation in a runner that prints the id of each token.

    Attributes:
        tokenizer: of the ids.
        settings: what each request has besides the prompt and the length of the answer.
        runtime: name for messages.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    settings: Mapping[str, Any]
    runtime: str
    _runner: RunnerProcess

    def generate(self, prompt: Prompt, emit: Callable[[str], None], max_new_tokens: int) -> bool:
        """Continue `prompt` greedily; see `TextGenerator`."""
        text, count = TextStream(self.tokenizer, emit), 0
        with self._runner.turn({"ids": prompt.ids, "tokens": max_new_tokens, **self.settings}):
            for line in iter(self._runner.output.readline, b""):
                if line.strip() == END.encode():
                    break
                self._runner.has_answered = True
                text.take(int(line))
                count += 1
            else:
                text.finish()
                raise self.error()
            text.finish()
        return count < max_new_tokens

    def stop(self) -> None:
        """End the answer in progress."""
        self._runner.stop()

    def error(self) -> ArtifactError:
        """Return the error of a runner that ended."""
        _, reason = self._runner.finish()
        return runner_error(self.folder, self.runtime, self._runner, reason)


def runner_error(path: Path, runtime: str, runner: RunnerProcess, reason: str) -> ArtifactError:
    """Return the error of a runner that ended before its answer did.

    Args:
        path: of the artifact.
        runtime: name for the message.
        runner: the process.
        reason: why it ended.
    """
    if runner.has_answered:
        return ArtifactError(
            f"{path}: {runtime} ended in the middle of the conversation: {reason}. Start it again; if it ends again, "
            "export again."
        )
    return ArtifactError(f"{path}: {runtime} refused it: {reason}. Export it again.")


@contextlib.contextmanager
def run_ids(
    module: ModuleType, folder: Path, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any], runtime: str
) -> Iterator[IdRunner]:
    """Start a runner that prints ids, and wait until its model is loaded.

    Args:
        module: as in `start_runner`, like `folder`.
        folder: of the artifact.
        tokenizer: as in `IdRunner`, like `settings` and `runtime`.
        settings: what each request has.
        runtime: name for messages.

    Raises:
        ArtifactError: the runner failed.
    """
    with start_runner(module, folder, {}) as process:
        runner = IdRunner(folder, tokenizer, settings, runtime, process)
        if not process.wait_until_loaded():
            raise runner.error()
        yield runner
