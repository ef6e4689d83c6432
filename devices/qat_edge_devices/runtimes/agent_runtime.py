"""This machine's half of the agent: send it and the artifact, write requests, read results."""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qat_edge_devices.device_errors import MissingPackageError, RefusedError, ResultError, UnsuitableError
from qat_edge_devices.run_results import Answer, Condition, Generated, LoadFigures, Scored, Speed, Traced
from qat_edge_devices.runtimes.device_calls import TIMEOUT_S, asked_again, check, require_memory
from qat_edge_devices.transport import Completed, DeviceInfo, Transport

AGENT = Path(__file__).parents[1] / "agent"
# Agreed with the agent, which travels and so cannot share them; a test holds them equal.
FORMAT = 1
EXIT_REFUSED = 65
EXIT_MISSING_PACKAGE = 69
SCORE_BYTES = 512 * 1024**2  # logits lying on the device at once
# Processors that ExecuTorch and onnxruntime are published for.
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")

Progress = Callable[[int, int], None]


class AgentRuntime(ABC):
    """One artifact on one device, run by the Python agent, a process a call.

    threads: CPUs the process may use. timeout_s: of one process. progress: called as (done, total).
    """

    backend: str

    def __init__(
        self,
        transport: Transport,
        threads: int,
        *,
        timeout_s: float = TIMEOUT_S,
        progress: Progress | None = None,
    ) -> None:
        self.transport = transport
        self.threads = threads
        self.timeout_s = timeout_s
        self.progress = progress
        self._most_bytes = SCORE_BYTES

    @abstractmethod
    def files(self, artifact: Path) -> dict[str, Path]:
        """What to send: name on the device -> file here."""

    @abstractmethod
    def entry(self) -> str:
        """What the agent is told to load."""

    def prepare(self, artifact: Path) -> None:
        """Send the agent and the artifact: once, before anything is asked.

        Raises:
            UnsuitableError, RoomError: the device cannot run it; nothing was sent.
        """
        files = {f"agent/{path.name}": path for path in AGENT.glob("*.py")} | self.files(artifact)
        info = self.transport.info()
        _require_processor(self.transport.name, info)
        require_memory(self.transport.name, info, files.values())
        if info.free_disk_bytes is not None:
            self._most_bytes = info.free_disk_bytes // 4
        self.transport.push(files)

    def score(
        self, sequences: Sequence[Sequence[int]], decode_from: int | None = None, max_bytes: int = SCORE_BYTES
    ) -> Iterator[Scored]:
        """Logits of each sequence in turn; a file lives until the next is asked for. See `Runtime.score`.

        One process scores as many sequences as `max_bytes` of logits hold (one at least), so that neither
        disk nor memory grows with their number; a quarter of the device's free disk where that is less.
        """
        done, max_bytes = 0, min(max_bytes, self._most_bytes)
        while done < len(sequences):
            rest = [list(ids) for ids in sequences[done:]]
            task = {"task": "score", "sequences": rest, "decode_from": decode_from, "max_bytes": max_bytes}
            with tempfile.TemporaryDirectory(prefix="qat-edge-scores-") as name:
                folder = Path(name) / "results"
                answer = self._ask(task, folder, before=done)
                with self._reading():
                    scored, load = int(answer["scored"]), _load_figures(answer)
                    files = [folder / f"logits-{i:05d}.npy" for i in range(scored)]
                    if not files or not all(f.is_file() for f in files):
                        raise ValueError(f"{scored} sequences scored and not all their logits came back")
                for index, file in enumerate(files):
                    yield Scored(done + index, file, load)
                    file.unlink(missing_ok=True)
            done += scored

    def trace(self, sequences: Sequence[Sequence[int]], decode_from: int) -> Iterator[Traced]:
        """All that the artifact returns for each sequence in turn; the files live until the last was asked for."""
        task = {"task": "trace", "sequences": [list(ids) for ids in sequences], "decode_from": decode_from}
        with tempfile.TemporaryDirectory(prefix="qat-edge-outputs-") as name:
            folder = Path(name) / "results"
            answer = self._ask(task, folder, before=0)
            with self._reading():
                found = [
                    Traced(folder / f"outputs-{i:05d}.npz", tuple(answer["outputs"])) for i in range(len(sequences))
                ]
                if not all(traced.outputs.is_file() for traced in found):
                    raise ValueError(f"not all outputs of {len(sequences)} sequences came back")
            yield from found

    def generate(self, prompts: Sequence[Sequence[int]], eos_ids: Sequence[int], max_new_tokens: int) -> Generated:
        """Greedy continuations, each ended by one of `eos_ids` or by its length."""
        task = {
            "task": "generate",
            "prompts": [list(ids) for ids in prompts],
            "eos_ids": list(eos_ids),
            "max_new_tokens": max_new_tokens,
        }
        answer = self._ask_for_figures(task)
        with self._reading():
            answers = tuple(Answer(tuple(a["ids"]), a["stopped"], a["ttft_ms"]) for a in answer["answers"])
            return Generated(answers, _load_figures(answer))

    def speed(self, prefill: int, decode: int, repeats: int) -> Speed:
        """Timed repeats of a prompt of `prefill` tokens and `decode` steps after its first new token."""
        task = {"task": "speed", "prefill": prefill, "decode": decode, "repeats": repeats}
        answer = self._ask_for_figures(task)
        with self._reading():
            return Speed(
                prefill_tokens_per_s=tuple(answer["prefill_tokens_per_s"]),
                decode_tokens_per_s=tuple(answer["decode_tokens_per_s"]),
                ttft_ms=tuple(answer["ttft_ms"]),
                step_ms=tuple(answer["step_ms"]),
                cores_busy=answer["cores_busy"],
                before=_condition(answer["before"]),
                after=_condition(answer["after"]),
                load=_load_figures(answer),
            )

    def _ask_for_figures(self, task: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="qat-edge-results-") as name:
            return self._ask(task, Path(name) / "results", before=0)

    def _ask(self, task: dict[str, Any], folder: Path, *, before: int) -> dict[str, Any]:
        """Run the agent on `task`, bring its results to `folder`, return result.json.

        before: items finished by earlier processes, for the progress shown.
        """
        request = {"format": FORMAT, "backend": self.backend, "artifact": self.entry(), "threads": self.threads}
        # The agent begins with an empty results folder, so asking again is safe.
        asked_again(lambda: self._round_trip(request | task, folder, before))
        with self._reading():
            answer: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            if answer["format"] != FORMAT:
                raise ValueError(f"format {answer['format']}, expected {FORMAT}")
        return answer

    def _round_trip(self, request: dict[str, Any], folder: Path, before: int) -> None:
        with tempfile.TemporaryDirectory(prefix="qat-edge-request-") as name:
            path = Path(name) / "request.json"
            path.write_text(json.dumps(request), encoding="utf-8")
            self.transport.push({"request.json": path}, keep=False)
        argv = (self.transport.python, "-m", "agent.agent", "request.json", "results")
        completed = self.transport.run(argv, self.timeout_s, on_line=lambda line: self._show(line, before))
        _check(self.transport.name, argv, completed)
        self.transport.pull("results", folder)

    def _show(self, line: str, before: int) -> None:
        words = line.split()
        if self.progress is not None and len(words) == 3 and words[0] == "progress":
            self.progress(before + int(words[1]), before + int(words[2]))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Say whose results they are where they cannot be read.

        Raises:
            ResultError: a file or a figure is missing, or is no JSON.
        """
        try:
            yield
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ResultError(
                f"{self.transport.name}: the agent ended well, but its results cannot be read "
                f"({type(error).__name__}: {error}). Run again; if it stays so, its Python or disk is at fault."
            ) from error


def _require_processor(device: str, info: DeviceInfo) -> None:
    if info.machine.lower() not in MACHINES or info.bits == 32:
        system = f"{info.machine}, {info.bits}-bit programs" if info.bits else info.machine
        raise UnsuitableError(
            f"{device}: its system is {system}; ExecuTorch and onnxruntime for Python exist for 64-bit "
            f"{', '.join(MACHINES)}. Install a 64-bit system on it, or choose another device. Nothing was sent."
        )


def _condition(said: dict[str, Any]) -> Condition:
    lists = {key: tuple(said[key]) for key in ("clocks_khz", "permitted_khz")}
    return Condition(**said | lists)


def _load_figures(answer: dict[str, Any]) -> LoadFigures:
    return LoadFigures(**answer["load"])


def _check(device: str, argv: Sequence[str], completed: Completed) -> None:
    """Turn the way the agent ended into an error that says what to do.

    Raises:
        ProgramError: it did not end with exit code 0.
    """
    message = next((x for x in reversed(completed.stderr.splitlines()) if x.strip()), "")
    if completed.returncode == EXIT_REFUSED:
        raise RefusedError(f"{device}: {message}")
    if completed.returncode == EXIT_MISSING_PACKAGE:
        raise MissingPackageError(
            f"{device}: {argv[0]} there lacks the package {message}. Install it on the device: "
            f"`{argv[0]} -m pip install {message}`."
        )
    check(device, argv, completed)
