"""Run a .pte in a C++ runner that the user built for the device: ExecuTorch's executor_runner or llama_main.

The abilities of a build are read from its own --help on the device, because names and flags differ between versions.

    llama_main       --model_path --tokenizer_path --prompt...    text in, text out, and its own timings
    executor_runner  --model_path --inputs --output_file          tensors in files in, tensors in files out

executor_runner takes inputs of one size only, the largest that the program accepts (its `prepare_input_tensors`), and
our programs return the logits of the last token. It therefore computes the logits after exactly that many tokens, with
one process per row.
https://github.com/pytorch/executorch/tree/v1.4.1/examples/portable/executor_runner and .../examples/models/llama
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_edge_devices import device_data
from qat_edge_devices.device_errors import ResultError, UnsupportedDeviceError, tail
from qat_edge_devices.elf import require_fit
from qat_edge_devices.runtimes.agent_runtime import ExecuTorchRuntime
from qat_edge_devices.runtimes.program_runs import TIMEOUT_S, require_memory, require_success, retry
from qat_edge_devices.transport import CompletedProgram, Transport

# Names on the device.
MODEL, BINARY, TOKENIZER = "artifact/model.pte", "runner.elf", "artifact/tokenizer.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LOGITS_STEM = "logits"  # of --output_file, to which executor_runner appends the number of the output
LOGITS_FILE = f"{LOGITS_STEM}-0.bin"
# Flags that a runner must have to generate text, or to compute logits.
TEXT_FLAGS = {"model_path", "tokenizer_path"}
LOGITS_FLAGS = {"model_path", "inputs", "output_file"}
# The sent file is a read-only link without the permission to execute, so a copy is executed.
START = '[ -x runner ] || { cp "$0" runner && chmod 700 runner; } || exit 126; rm -f logits-0.bin; exec ./runner "$@"'
OBSERVED = "\nPyTorchObserver "  # printed before the runner's timings, as JSON, at the end of stdout
FLAG = re.compile(r"^\s+--?([A-Za-z]\w*) \(", re.MULTILINE)  # a flag in --help of gflags and abseil


@dataclass(frozen=True)
class RunnerTimings:
    """The runner's own timings of one generation. Its clock counts whole milliseconds.

    Attributes:
        load_ms: loading the model.
        ttft_ms: time to first token.
        prompt_tokens: tokens in the prompt.
        prefill_tokens_per_s: prompt tokens per second.
        new_tokens: generated tokens.
        decode_tokens_per_s: generated tokens per second.
    """

    load_ms: float
    ttft_ms: float
    prompt_tokens: int
    prefill_tokens_per_s: float
    new_tokens: int
    decode_tokens_per_s: float


class NativeRunner:
    """One binary and one .pte on one device, with one process per call. Call `prepare` first.

    Attributes:
        flags: flags in the --help of the binary; empty before `prepare`.

    Args:
        transport: connection to the device.
        binary: the runner, a file of this machine.
        threads: number of threads, if the runner has a flag for it.
        timeout_s: time limit of one process, in seconds.
    """

    def __init__(self, transport: Transport, binary: Path, threads: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.transport = transport
        self.binary = binary
        self.threads = threads
        self.timeout_s = timeout_s
        self.flags: frozenset[str] = frozenset()

    @property
    def generates_text(self) -> bool:
        """True if it takes a prompt and returns text."""
        return self.flags >= TEXT_FLAGS and bool(self.flags & {"prompt", "prompt_file"})

    @property
    def computes_logits(self) -> bool:
        """True if it reads and writes tensors in files."""
        return self.flags >= LOGITS_FLAGS

    def prepare(self, artifact: Path) -> None:
        """Check the binary against the device, send it with the artifact, and read its --help there.

        Raises:
            UnsupportedDeviceError: it was built for another processor (nothing was sent), or is not a known runner.
            CapacityError: the device has no space for it; nothing was sent.
        """
        (program,) = ExecuTorchRuntime(self.transport, self.threads).files(artifact).values()
        tokenizer = {f"artifact/{name}": program.parent / name for name in TOKENIZER_FILES}
        files = {BINARY: self.binary, MODEL: program}
        files |= {name: path for name, path in tokenizer.items() if path.is_file()}

        # Check the device first: sending the files can take minutes.
        info = self.transport.info()
        require_fit(self.transport.name, info, self.binary)
        require_memory(self.transport.name, info, files.values())
        self.transport.push(files)

        # The exit code says nothing: gflags exits with 1 after --help.
        help_text = retry(lambda: self._start(["--help"]))
        self.flags = frozenset(FLAG.findall(help_text.stdout + help_text.stderr))
        if not (self.generates_text or self.computes_logits):
            output = tail(help_text.stdout + help_text.stderr)
            raise UnsupportedDeviceError(
                f"{self.transport.name}: {self.binary.name} --help ended with exit code {help_text.returncode} and "
                f"names neither the flags of llama_main ({', '.join(sorted(TEXT_FLAGS))}, prompt) nor those of "
                f"executor_runner ({', '.join(sorted(LOGITS_FLAGS))}), so it cannot be used. It wrote:{output}"
            )

    def generate_text(
        self, prompt: str, max_new_tokens: int, *, for_timing: bool = False
    ) -> tuple[str, RunnerTimings | None]:
        """Continue `prompt` greedily.

        Args:
            prompt: text.
            max_new_tokens: tokens to generate at most.
            for_timing: generate past end tokens and after a warm-up, if the runner has the flags for that.

        Returns:
            The continuation, and the runner's timings if it prints them.
        """
        length_flag = "max_new_tokens" if "max_new_tokens" in self.flags else "seq_len"
        options = {"tokenizer_path": TOKENIZER, "temperature": "0", length_flag: str(max_new_tokens)}
        if for_timing:
            options |= {"ignore_eos": "true", "warmup": "true"}
        files = {}
        if "prompt_file" in self.flags:
            files["prompt.txt"] = prompt.encode()
            options["prompt_file"] = "prompt.txt"
        else:
            options["prompt"] = prompt

        completed = retry(lambda: self._run(files, options))

        # The runner repeats the prompt before its continuation.
        text, found, timings = completed.stdout.rpartition(OBSERVED)
        if not found:
            return completed.stdout.removeprefix(prompt), None
        return text.removeprefix(prompt), self._timings(timings)

    def logits(self, ids: Sequence[int]) -> bytes:
        """Compute the logits after the last of `ids`.

        Args:
            ids: token ids, as many as the program takes at most.

        Returns:
            Little-endian float32 values (vocabulary,).

        Raises:
            ProgramError: the runner failed, for example because of another number of ids.
            TransportError: it succeeded but wrote no file.
        """
        files = {"tokens.bin": struct.pack(f"<{len(ids)}q", *ids), "start.bin": struct.pack("<q", 0)}
        options = {"inputs": "tokens.bin,start.bin", "output_file": LOGITS_STEM, "print_output": "none"}

        def run_and_pull() -> bytes:
            self._run(files, options)
            with tempfile.TemporaryDirectory(prefix="qat-edge-logits-") as name:
                self.transport.pull(LOGITS_FILE, Path(name) / LOGITS_FILE)
                return (Path(name) / LOGITS_FILE).read_bytes()

        return retry(run_and_pull)

    def _run(self, files: dict[str, bytes], options: dict[str, str]) -> CompletedProgram:
        """Send `files` and run the binary with those of `options` that it has; require success."""
        with tempfile.TemporaryDirectory(prefix="qat-edge-request-") as name:
            for remote, content in files.items():
                (Path(name) / remote).write_bytes(content)
            self.transport.push({remote: Path(name) / remote for remote in files}, keep=False)

        values = {"model_path": MODEL, "cpu_threads": str(self.threads), **options}
        argv = [f"--{flag}={value}" for flag, value in values.items() if flag in self.flags]
        completed = self._start(argv)
        require_success(self.transport.name, [self.binary.name, *argv], completed)
        return completed

    def _start(self, argv: Sequence[str]) -> CompletedProgram:
        return self.transport.run(["sh", "-c", START, BINARY, *argv], self.timeout_s)

    def _timings(self, text: str) -> RunnerTimings:
        """Parse the JSON line that ExecuTorch's extension/llm/runner/stats.h prints."""
        try:
            found = {
                name: device_data.checked(value, float, name)
                for name, value in device_data.parse_json(text.splitlines()[0]).items()
                if name.endswith(("_ms", "_tokens"))
            }
            began, prompt_ended = found["inference_start_ms"], found["prompt_eval_end_ms"]
            prompt, new = found["prompt_tokens"], found["generated_tokens"]
            # At least 1 ms: the clock may not advance during a short prompt.
            prefill_ms = max(prompt_ended - began, 1)
            decode_ms = max(found["inference_end_ms"] - prompt_ended, 1)
            return RunnerTimings(
                load_ms=found["model_load_end_ms"] - found["model_load_start_ms"],
                ttft_ms=found["first_token_ms"] - began,
                prompt_tokens=int(prompt),
                prefill_tokens_per_s=prompt / prefill_ms * 1e3,
                new_tokens=int(new),
                decode_tokens_per_s=new / decode_ms * 1e3,
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ResultError(
                f"{self.transport.name}: the figures of {self.binary.name} cannot be read "
                f"({type(error).__name__}: {device_data.printable(str(error))}): {text[:200]!r}"
            ) from error
