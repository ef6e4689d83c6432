"""Run artifacts in the Python agent: this machine's side of the protocol.

`prepare` sends the agent and the artifact. Each later call writes request.json, sends it, runs
`python -m agent.agent request.json results` on the device, and brings back the folder `results`, whose result.json has
the values and whose .npy and .npz files have the tensors. `agent/agent.py` is the other side.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qat_edge_devices import device_data
from qat_edge_devices.agent.active_adapter import ADAPTER_FILE
from qat_edge_devices.device_errors import (
    MissingPackageError,
    RequestRejectedError,
    ResultError,
    TransportError,
    UnsupportedDeviceError,
)
from qat_edge_devices.runtime import (
    GeneratedTokens,
    GenerationResult,
    LoadStats,
    MachineState,
    ScoredSequence,
    TimedRun,
    TracedSequence,
)
from qat_edge_devices.runtimes.program_runs import TIMEOUT_S, require_memory, require_success, retry
from qat_edge_devices.transport import CompletedProgram, DeviceInfo, Transport

AGENT = Path(__file__).parents[1] / "agent"
# The agent has its own copies of these, because it is sent without this package. A test compares them.
FORMAT = 2
EXIT_REJECTED = 65
EXIT_MISSING_PACKAGE = 69
SCORE_BYTES = 512 * 1024**2  # of logits on the device's disk at once
DISK_SHARE = 4  # at most one part in so many of the device's free disk
FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "step_ms")
LARGEST_TOKEN = 2**31 - 1
ENDINGS = ("eos", "length", "context")  # of a completion
MESSAGE_CHARACTERS = 2000  # of the agent's own message
# Processors that ExecuTorch and onnxruntime are published for.
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # that onnxruntime-genai reads for a grammar

Progress = Callable[[int, int], None]


class AgentRuntime(ABC):
    """One artifact on one device, run by the Python agent with one process per call.

    Attributes:
        backend: name of the artifact's format in requests.
        adapter: path on the device of the artifact's LoRA adapter; None for an artifact without one.
        grammar_file: name of the file with the grammar of answers that the runtime takes; empty if it takes none.
        grammar: path of that file on the device; None for an artifact without one.

    Args:
        transport: connection to the device.
        threads: CPUs that a process may use.
        timeout_s: time limit of one process, in seconds.
        progress: called as (done, total).
    """

    backend: str
    adapter: str | None = None
    grammar_file: str = ""
    grammar: str | None = None

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
        self._max_score_bytes = SCORE_BYTES

    def program(self) -> dict[str, Path]:
        """Return the files of the agent to send: name on the device -> local file."""
        return {f"agent/{path.name}": path for path in AGENT.glob("*.py")}

    def argv(self) -> tuple[str, ...]:
        """Return the command that runs request.json there."""
        return (self.transport.python, "-m", "agent.agent", "request.json", "results")

    def require_supported(self, info: DeviceInfo) -> None:
        """Require a device that the runtime exists for.

        Raises:
            UnsupportedDeviceError: it does not.
        """
        _require_processor(self.transport.name, info)

    @abstractmethod
    def files(self, artifact: Path) -> dict[str, Path]:
        """Return the files of `artifact` to send: name on the device -> local file."""

    @abstractmethod
    def entry(self) -> str:
        """Return the path on the device that the agent loads."""

    def prepare(self, artifact: Path) -> None:
        """Send the agent and the artifact.

        Raises:
            UnsupportedDeviceError, CapacityError: the device cannot run it; nothing was sent.
        """
        files = self.program() | self.files(artifact)

        # Check the device first: sending an artifact can take minutes.
        info = self.transport.info()
        self.require_supported(info)
        require_memory(self.transport.name, info, files.values())
        if info.free_disk_bytes is not None:
            self._max_score_bytes = info.free_disk_bytes // DISK_SHARE

        self.transport.push(files)
        # The device keeps the files of earlier artifacts, so that an adapter there may be another one's.
        adapter = f"{self.entry()}/{ADAPTER_FILE}"
        self.adapter = adapter if adapter in files else None
        grammar = f"artifact/{self.grammar_file}"
        self.grammar = grammar if grammar in files else None

    def score(
        self, sequences: Sequence[Sequence[int]], decode_from: int | None = None, max_bytes: int = SCORE_BYTES
    ) -> Iterator[ScoredSequence]:
        """Yield the logits of each sequence; see `Runtime.score`.

        One process scores as many sequences as fit into `max_bytes` of logits, at least one, so that disk and memory
        do not grow with the number of sequences. The limit is lower if a quarter of the device's free disk is less.
        """
        max_bytes = min(max_bytes, self._max_score_bytes)
        done = 0
        while done < len(sequences):
            remaining = [list(ids) for ids in sequences[done:]]
            request = {
                "task": "score", "sequences": remaining, "decode_from": decode_from, "max_bytes": max_bytes,
            }  # fmt: skip
            with tempfile.TemporaryDirectory(prefix="qat-edge-scores-") as name:
                folder = Path(name) / "results"
                result = self._request(request, folder, done_before=done)
                files, load = self._score_files(result, folder, len(remaining))
                for index, file in enumerate(files):
                    yield ScoredSequence(done + index, file, load)
                    file.unlink(missing_ok=True)
            done += len(files)

    def _score_files(self, result: dict[str, Any], folder: Path, most: int) -> tuple[list[Path], LoadStats]:
        with self._reading_results():
            scored, load = device_data.checked(result["scored"], int, "scored"), _load_stats(result)
            if not 0 < scored <= most:
                raise ValueError(f"{scored} of {most} sequences were scored")
            files = [folder / f"logits-{index:05d}.npy" for index in range(scored)]
            if not files or not all(file.is_file() for file in files):
                raise ValueError(f"{scored} sequences were scored and not all their logits came back")
        return files, load

    def trace(self, sequences: Sequence[Sequence[int]], decode_from: int) -> Iterator[TracedSequence]:
        """Yield all outputs for each sequence. The files exist until the iteration ends."""
        request = {"task": "trace", "sequences": [list(ids) for ids in sequences], "decode_from": decode_from}
        with tempfile.TemporaryDirectory(prefix="qat-edge-outputs-") as name:
            folder = Path(name) / "results"
            result = self._request(request, folder, done_before=0)
            with self._reading_results():
                names = device_data.checked(result["outputs"], tuple[str, ...], "outputs")
                traced = [TracedSequence(folder / f"outputs-{index:05d}.npz", names) for index in range(len(sequences))]
                if not all(sequence.outputs.is_file() for sequence in traced):
                    raise ValueError(f"not all outputs of {len(sequences)} sequences came back")
            yield from traced

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        eos_ids: Sequence[int],
        max_new_tokens: int,
        *,
        constrained: bool = False,
    ) -> GenerationResult:
        """Continue each prompt greedily, up to one of `eos_ids` or `max_new_tokens`; see `Runtime.generate`.

        Raises:
            RequestRejectedError: the answers are to be constrained, and the artifact has no grammar for its runtime.
        """
        if constrained and self.grammar is None:
            raise RequestRejectedError(
                f"{self.transport.name}: the artifact has no grammar that its runtime takes. Nothing was generated."
            )
        request = {
            "task": "generate",
            "prompts": [list(ids) for ids in prompts],
            "eos_ids": list(eos_ids),
            "max_new_tokens": max_new_tokens,
            "grammar": self.grammar if constrained else None,
        }
        result = self._request_values(request)
        with self._reading_results():
            completions = tuple(device_data.record(GeneratedTokens, found) for found in result["completions"])
            if len(completions) != len(prompts) or any(len(each.ids) > max_new_tokens for each in completions):
                raise ValueError(f"the completions are not those of {len(prompts)} prompts")
            if any(not 0 <= token <= LARGEST_TOKEN for each in completions for token in each.ids):
                raise ValueError("a completion has a number that is no token id")
            if any(each.stopped not in ENDINGS for each in completions):
                raise ValueError(f"a completion ended otherwise than by {', '.join(ENDINGS)}")
            return GenerationResult(completions, _load_stats(result))

    def speed(self, prefill: int, decode: int, repeats: int) -> TimedRun:
        """Time a prompt of `prefill` tokens and `decode` steps after its first new token, `repeats` times."""
        result = self._request_values({"task": "speed", "prefill": prefill, "decode": decode, "repeats": repeats})
        with self._reading_results():
            figures = {name: device_data.checked(result[name], tuple[float, ...], name) for name in FIGURES}
            cores_busy = device_data.checked(result["cores_busy"], float, "cores_busy")
            for name, values in figures.items():
                count = repeats * decode if name == "step_ms" else repeats
                if len(values) != count:
                    raise ValueError(f"{name} has {len(values)} figures, expected {count}")
                if min(values) <= 0:
                    raise ValueError(f"{name} has {min(values):g}, which is no time or speed")
            if cores_busy < 0:
                raise ValueError(f"cores_busy is {cores_busy:g}")
            return TimedRun(
                **figures,
                cores_busy=cores_busy,
                before=_machine_state(result["before"]),
                after=_machine_state(result["after"]),
                load=_load_stats(result),
            )

    def _request_values(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run a request whose only result is result.json."""
        with tempfile.TemporaryDirectory(prefix="qat-edge-results-") as name:
            return self._request(request, Path(name) / "results", done_before=0)

    def _request(self, request: dict[str, Any], folder: Path, *, done_before: int) -> dict[str, Any]:
        """Run the agent on `request`, bring its results to `folder`, return the content of result.json.

        Args:
            request: the task and its options; what all tasks share is added here.
            folder: must not exist yet.
            done_before: items that earlier processes finished, for the progress shown.
        """
        # The agent empties its results folder first, so a request can be repeated.
        retry(lambda: self._round_trip(self.shared() | request, folder, done_before))
        with self._reading_results():
            result = device_data.read_json(folder / "result.json")
            found = device_data.checked(result["format"], int, "format")
            if found != FORMAT:
                raise ValueError(f"format {found}, expected {FORMAT}")
        return result

    def shared(self) -> dict[str, Any]:
        """Return what the requests of all tasks have in common."""
        return {
            "format": FORMAT, "backend": self.backend, "artifact": self.entry(), "adapter": self.adapter,
            "threads": self.threads,
        }  # fmt: skip

    def _round_trip(self, request: dict[str, Any], folder: Path, done_before: int) -> None:
        with tempfile.TemporaryDirectory(prefix="qat-edge-request-") as name:
            path = Path(name) / "request.json"
            path.write_text(json.dumps(request), encoding="utf-8")
            self.transport.push({"request.json": path}, keep=False)

        argv = self.argv()
        completed = self.transport.run(argv, self.timeout_s, on_line=lambda line: self._show(line, done_before))
        _require_agent_success(self.transport.name, argv, completed)

        self.transport.pull("results", folder)

    def _show(self, line: str, done_before: int) -> None:
        """Report the progress in a line "progress DONE TOTAL" of the agent's stdout."""
        word, *numbers = line.split()[:4] or [""]
        figures = [device_data.whole_number(number) for number in numbers]
        if self.progress is None or word != "progress" or len(figures) != 2:
            return
        done, total = figures
        if done is not None and total is not None:
            self.progress(done_before + done, done_before + total)

    @contextmanager
    def _reading_results(self) -> Iterator[None]:
        """Convert errors in reading results into one that names the device.

        Raises:
            ResultError: a file or a value is missing, or is not valid JSON.
        """
        try:
            yield
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {device_data.printable(str(error))}"
            raise ResultError(
                f"{self.transport.name}: the agent succeeded, but its results cannot be read ({reason}). Run again; if "
                "the error remains, its Python or disk is faulty."
            ) from error


class ExecuTorchRuntime(AgentRuntime):
    """Runs the .pte of an export folder, or a .pte itself, in one of ExecuTorch's Python runtimes."""

    backend = "executorch"

    def files(self, artifact: Path) -> dict[str, Path]:
        """Return the .pte. The tokenizer stays here: only token ids are sent."""
        if artifact.is_file():
            return {self.entry(): artifact}
        found = sorted(artifact.glob("*.pte"))
        if len(found) != 1:
            raise TransportError(f"{artifact}: expected one .pte there, found {len(found)}. Export it again.")
        return {self.entry(): found[0]}

    def entry(self) -> str:
        """Return the path of the .pte on the device."""
        return "artifact/model.pte"


class OnnxRuntime(AgentRuntime):
    """Scores in plain onnxruntime; generates and times in onnxruntime-genai if the device has it.

    `LoadStats.runtime` has the name of the one that was used.
    """

    backend = "onnx"
    grammar_file = "grammar.lark"

    def files(self, artifact: Path) -> dict[str, Path]:
        """Return graph, external weights, adapter and configuration under their own names.

        A grammar is about texts, so that the tokenizer goes with it.
        """
        if not (artifact / "model.onnx").is_file():
            raise TransportError(f"{artifact}: no model.onnx there. Export it again.")
        names = [*sorted(path.name for path in artifact.glob("model.onnx*")), ADAPTER_FILE, "genai_config.json"]
        if (artifact / self.grammar_file).is_file():
            names += [self.grammar_file, *TOKENIZER_FILES]
        return {f"{self.entry()}/{name}": artifact / name for name in names if (artifact / name).is_file()}

    def entry(self) -> str:
        """Return the path of the folder on the device."""
        return "artifact"


class GgufRuntime(AgentRuntime):
    """Runs the GGUF file of an export folder in llama.cpp."""

    backend = "gguf"
    grammar_file = "grammar.gbnf"

    def files(self, artifact: Path) -> dict[str, Path]:
        """Return the file, and the grammar of answers. The tokenizer stays here: only token ids are sent."""
        if not (artifact / "model.gguf").is_file():
            raise TransportError(f"{artifact}: no model.gguf there. Export it again.")
        grammar = artifact / self.grammar_file
        further = {f"artifact/{self.grammar_file}": grammar} if grammar.is_file() else {}
        return {self.entry(): artifact / "model.gguf", **further}

    def entry(self) -> str:
        """Return the path of the file on the device."""
        return "artifact/model.gguf"


class HuggingFaceRuntime(AgentRuntime):
    """Runs a Hugging Face folder in transformers with compressed-tensors."""

    backend = "hf"

    def files(self, artifact: Path) -> dict[str, Path]:
        """Return weights and configurations. The tokenizer stays here: only token ids are sent."""
        names = ("model.safetensors", "config.json", "generation_config.json")
        missing = next((name for name in names if not (artifact / name).is_file()), "")
        if missing:
            raise TransportError(f"{artifact}: no {missing} there. Export it again.")
        return {f"{self.entry()}/{name}": artifact / name for name in names}

    def entry(self) -> str:
        """Return the path of the folder on the device."""
        return "artifact"


def _require_processor(device: str, info: DeviceInfo) -> None:
    if info.machine.lower() not in MACHINES or info.bits == 32:
        system = f"{info.machine}, {info.bits}-bit programs" if info.bits else info.machine
        raise UnsupportedDeviceError(
            f"{device}: its system is {system}; ExecuTorch and onnxruntime for Python exist for 64-bit "
            f"{', '.join(MACHINES)}. Install a 64-bit system on it, or choose another device. Nothing was sent."
        )


def _machine_state(values: object) -> MachineState:
    return device_data.record(MachineState, values)


def _load_stats(result: dict[str, Any]) -> LoadStats:
    load = device_data.record(LoadStats, result["load"])
    for name, value in dataclasses.asdict(load).items():
        if type(value) in (int, float) and value < 0:
            raise ValueError(f"{name} is {value:g}")
    return load


def _require_agent_success(device: str, argv: Sequence[str], completed: CompletedProgram) -> None:
    """Convert the agent's exit code into an error with a remedy.

    Raises:
        ProgramError: it is not 0.
    """
    # The last line of stderr is the message, or the name of the missing package.
    last = next((line for line in reversed(completed.stderr.splitlines()) if line.strip()), "")
    message = device_data.printable(last, MESSAGE_CHARACTERS)
    if completed.returncode == EXIT_REJECTED:
        raise RequestRejectedError(f"{device}: {message}")
    if completed.returncode == EXIT_MISSING_PACKAGE:
        raise MissingPackageError(
            f"{device}: {argv[0]} there lacks the package {message}. Install it on the device: "
            f"`{argv[0]} -m pip install {message}`."
        )
    require_success(device, argv, completed)
