"""A runner that the user built for the device, ExecuTorch's executor_runner or llama_main, on one .pte.

What a build can do is read from its own --help on the device, never assumed: names and flags differ between versions.

    llama_main       --model_path --tokenizer_path --prompt...    text in, text out, and its own clock
    executor_runner  --model_path --inputs --output_file          tensors in files in, tensors in files out

executor_runner takes inputs of one size only, the greatest of the program (its `prepare_input_tensors`), and our
programs give the logits of the last token: so it gives the logits after exactly `width` tokens, a process each.
https://github.com/pytorch/executorch/tree/v1.4.1/examples/portable/executor_runner and .../examples/models/llama
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_edge_devices.device_errors import ResultError, UnsuitableError, tail
from qat_edge_devices.elf import require_fit
from qat_edge_devices.runtimes.device_calls import TIMEOUT_S, asked_again, check, require_memory
from qat_edge_devices.runtimes.executorch_runtime import ExecuTorchRuntime
from qat_edge_devices.transport import Completed, Transport

MODEL, BINARY, TOKENIZER = "artifact/model.pte", "runner.elf", "artifact/tokenizer.json"
WRITTEN = "logits-0.bin"  # by executor_runner, told --output_file=logits, for the program's first output
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TEXT = {"model_path", "tokenizer_path"}
LOGITS = {"model_path", "inputs", "output_file"}
# What was sent is a link to what must not change, and may not be executed: a copy may.
START = '[ -x runner ] || { cp "$0" runner && chmod 700 runner; } || exit 126; rm -f logits-0.bin; exec ./runner "$@"'
OBSERVED = "\nPyTorchObserver "  # before the runner's own figures, as JSON, at the end of stdout
FLAG = re.compile(r"^\s+--?([A-Za-z]\w*) \(", re.MULTILINE)  # as gflags and abseil print them


@dataclass(frozen=True)
class Clock:
    """The runner's own figures of one answer, in ms and tokens; its clock counts whole milliseconds."""

    load_ms: float
    ttft_ms: float
    prompt_tokens: int
    prefill_tokens_per_s: float
    new_tokens: int
    decode_tokens_per_s: float


class NativeRunner:
    """One binary and one .pte on one device, a process a call; `prepare` comes first.

    threads: asked of the runner where it has the flag. flags: those that its --help names.
    """

    def __init__(self, transport: Transport, binary: Path, threads: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self.transport = transport
        self.binary = binary
        self.threads = threads
        self.timeout_s = timeout_s
        self.flags: frozenset[str] = frozenset()

    @property
    def answers(self) -> bool:
        """Whether it takes text and gives text."""
        return self.flags >= TEXT and bool(self.flags & {"prompt", "prompt_file"})

    @property
    def scores(self) -> bool:
        """Whether it takes and gives tensors in files."""
        return self.flags >= LOGITS

    def prepare(self, artifact: Path) -> None:
        """Check the binary against the device, send it with the artifact, and read its --help there.

        Raises:
            UnsuitableError: it was built for another processor (nothing was sent), or is no runner that we know.
            RoomError: the device cannot hold it; nothing was sent.
        """
        (program,) = ExecuTorchRuntime(self.transport, self.threads).files(artifact).values()
        beside = {f"artifact/{name}": program.parent / name for name in TOKENIZER_FILES}
        files = {BINARY: self.binary, MODEL: program, **{n: p for n, p in beside.items() if p.is_file()}}
        info = self.transport.info()
        require_fit(self.transport.name, info, self.binary)
        require_memory(self.transport.name, info, files.values())
        self.transport.push(files)
        said = asked_again(lambda: self._started(["--help"]))  # gflags ends with exit code 1 after it
        self.flags = frozenset(FLAG.findall(said.stdout + said.stderr))
        if not (self.answers or self.scores):
            wrote = tail(said.stdout + said.stderr)
            raise UnsuitableError(
                f"{self.transport.name}: {self.binary.name} --help ended with exit code {said.returncode} and names "
                f"neither the flags of llama_main ({', '.join(sorted(TEXT))}, prompt) nor those of executor_runner "
                f"({', '.join(sorted(LOGITS))}), so it cannot be asked anything. It wrote:{wrote}"
            )

    def answer(self, prompt: str, max_new_tokens: int, *, to_the_end: bool = False) -> tuple[str, Clock | None]:
        """The greedy continuation of `prompt`, and the runner's figures where it prints them.

        to_the_end: past end tokens and after a warm-up, where it has the flags for that, for timing.
        """
        length = "max_new_tokens" if "max_new_tokens" in self.flags else "seq_len"
        wanted = {"tokenizer_path": TOKENIZER, "temperature": "0", length: str(max_new_tokens)}
        wanted |= {"ignore_eos": "true", "warmup": "true"} if to_the_end else {}
        by_file = "prompt_file" in self.flags
        wanted |= {"prompt_file": "prompt.txt"} if by_file else {"prompt": prompt}
        completed = self._ask({"prompt.txt": prompt.encode()} if by_file else {}, wanted)
        text, found, figures = completed.stdout.rpartition(OBSERVED)
        return (text if found else figures).removeprefix(prompt), self._clock(figures) if found else None

    def logits(self, ids: Sequence[int]) -> bytes:
        """Little-endian float32 logits (vocabulary,) after the last of `ids`, as many as the program takes at most.

        Raises:
            ProgramError: the runner refuses, as for another number of ids.
            TransportError: it ended well and wrote no file.
        """
        inputs = {"tokens.bin": struct.pack(f"<{len(ids)}q", *ids), "start.bin": struct.pack("<q", 0)}
        wanted = {
            "inputs": "tokens.bin,start.bin",
            "output_file": WRITTEN.removesuffix("-0.bin"),
            "print_output": "none",
        }

        def ask() -> bytes:
            self._ask_once(inputs, wanted)
            with tempfile.TemporaryDirectory(prefix="qat-edge-logits-") as name:
                self.transport.pull(WRITTEN, Path(name) / WRITTEN)
                return (Path(name) / WRITTEN).read_bytes()

        return asked_again(ask)

    def _ask(self, files: dict[str, bytes], wanted: dict[str, str]) -> Completed:
        return asked_again(lambda: self._ask_once(files, wanted))

    def _ask_once(self, files: dict[str, bytes], wanted: dict[str, str]) -> Completed:
        """Run it to a good end with those of the wanted flags that it has."""
        with tempfile.TemporaryDirectory(prefix="qat-edge-request-") as name:
            for place, content in files.items():
                (Path(name) / place).write_bytes(content)
            self.transport.push({place: Path(name) / place for place in files}, keep=False)
        given = {"model_path": MODEL, "cpu_threads": str(self.threads), **wanted}
        argv = [f"--{flag}={value}" for flag, value in given.items() if flag in self.flags]
        completed = self._started(argv)
        check(self.transport.name, [self.binary.name, *argv], completed)
        return completed

    def _started(self, argv: Sequence[str]) -> Completed:
        return self.transport.run(["sh", "-c", START, BINARY, *argv], self.timeout_s)

    def _clock(self, figures: str) -> Clock:
        """The JSON line of ExecuTorch's extension/llm/runner/stats.h."""
        try:
            found = json.loads(figures.splitlines()[0])
            begun, prompt_ended = found["inference_start_ms"], found["prompt_eval_end_ms"]
            prompt, new = found["prompt_tokens"], found["generated_tokens"]
            return Clock(
                load_ms=found["model_load_end_ms"] - found["model_load_start_ms"],
                ttft_ms=found["first_token_ms"] - begun,
                prompt_tokens=prompt,
                prefill_tokens_per_s=prompt / max(prompt_ended - begun, 1) * 1e3,
                new_tokens=new,
                decode_tokens_per_s=new / max(found["inference_end_ms"] - prompt_ended, 1) * 1e3,
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ResultError(
                f"{self.transport.name}: the figures of {self.binary.name} cannot be read "
                f"({type(error).__name__}: {error}): {figures[:200]!r}"
            ) from error
