"""Run one artifact on the machine this script lies on: `python agent.py REQUEST.json RESULTS_FOLDER`.

It is copied to devices by itself, so it imports the standard library, numpy and the runtime. A request names
the backend, the artifact, the threads and one task; RESULTS_FOLDER gets result.json and, for `score`, one
logits-00000.npy a sequence, for `trace` one outputs-00000.npz. stdout carries lines `progress DONE TOTAL`, never
results. Exit codes: 0, or 65 for what the artifact cannot do, 69 for a Python package that is missing (stderr's last
line says which or what).

  score     logits of given token ids, row t predicting token t + 1: float32, (tokens, vocabulary); from `decode_from`
            on, where that is no null, tokens are taken one at a time, as in an answer
  trace     in the same way all that the artifact returns but its cache, each (tokens, features)
  generate  greedy continuation of prompts, until an end token or a length
  speed     prefill and decode of a synthetic prompt, one warm-up, then repeats

Token ids in, token ids out: no tokenizer is involved. "Time to first token" is from the prompt's ids to the id of
the first new token; a decode step is one forward pass and the choice of the greatest logit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Protocol

FORMAT = 1  # of request and result
EXIT_REFUSED = 65
EXIT_MISSING_PACKAGE = 69
SCORE_ROWS = 256  # tokens whose logits are held in memory at once
SYS = Path("/sys")  # what Linux, and so Android, says of clocks, heat and battery
PIP_NAMES = {"onnxruntime_genai": "onnxruntime-genai"}  # where pip's name is not the module's


class Refusal(Exception):
    """The artifact cannot do what the request asks; the message says why."""


class Model(Protocol):
    """A loaded artifact with a KV cache of one sequence.

    context_length: most tokens the cache holds, None where the artifact does not say.
    pool_threads: threads of the runtime's own pool, None where it does not say.
    """

    runtime: str
    version: str
    context_length: int | None
    pool_threads: int | None

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        """Load the artifact; the constructor has imported the runtime, so that memory before this is its own."""

    def start(self, prompt: list[int], length: int) -> int:
        """Empty the cache, take the prompt, return the likeliest next id; `length` tokens will come at most."""

    def next(self, token: int) -> int:
        """Take the id that was returned last, return the likeliest one after it."""

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        """What a whole sequence is answered from an empty cache, piece by piece (see `pieces`), float32.

        "logits" (rows, vocabulary), and (rows, features) of whatever else the artifact returns.
        """


class ExecuTorchModel:
    """A .pte with `forward(tokens int64 (1, S), start position int64 (1,)) -> logits of the last token`."""

    def __init__(self) -> None:
        import torch

        # Not portable_lib nor the packages beside the operators: they import the whole exporter.
        from executorch.extension.pybindings import _portable_lib

        spec = importlib.util.find_spec("executorch")
        for root in (spec.submodule_search_locations or []) if spec else []:
            for library in (
                "kernels/quantized/libquantized_ops_aot_lib",
                "extension/llm/custom_ops/libcustom_ops_aot_lib",
            ):
                for path in Path(root).glob(f"{library}.*"):
                    torch.ops.load_library(str(path))
        self.torch, self.library = torch, _portable_lib
        self.runtime, self.version = "executorch", package_version("executorch")
        self.context_length: int | None = None
        self.pool_threads: int | None = None

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        # The pool is sized from the machine, not from the CPUs this process is pinned to.
        self.library._unsafe_reset_threadpool(threads)
        self.pool_threads = int(self.library._threadpool_get_thread_count())
        try:
            self.program = self.library._load_program(str(artifact))
            # A whole-module load would leave this, the costly part, to the first token.
            self.method = self.program.load_method("forward")
        except RuntimeError as error:
            raise Refusal(f"{artifact.name} cannot be loaded: {one_line(error)}") from error
        chunk = self._constant("get_max_seq_len")
        self.context_length = self._constant("get_max_context_len") or chunk
        self.chunk = (chunk or 1) if self._constant("enable_dynamic_shape") else 1
        self.position = 0

    def start(self, prompt: list[int], length: int) -> int:
        self.position = 0
        for begin in range(0, len(prompt), self.chunk):
            logits = self._forward(prompt[begin : begin + self.chunk])
        return int(logits.argmax())

    def next(self, token: int) -> int:
        return int(self._forward([token]).argmax())

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        # One token at a time, as the app does when it decodes: only the last token's logits come out.
        self.position = 0
        for token in ids:
            outputs = [output.reshape(1, -1).float().numpy().copy() for output in self._call([token])]
            yield {str(place) if place else "logits": rows for place, rows in enumerate(outputs)}

    def _forward(self, ids: list[int]) -> Any:
        """Logits of the last of `ids`, (1, vocabulary)."""
        logits = self._call(ids)[0]
        return logits.reshape(-1, logits.shape[-1])[-1:]

    def _call(self, ids: list[int]) -> Any:
        """Every output of the program; the next call overwrites them."""
        tokens = self.torch.tensor([ids], dtype=self.torch.int64)
        start = self.torch.tensor([self.position], dtype=self.torch.int64)
        self.position += len(ids)
        return self.method.call([tokens, start])

    def _constant(self, name: str) -> int | None:
        names = [self.program.get_method_name(i) for i in range(self.program.num_methods())]
        return int(self.program.load_method(name).call([])[0]) if name in names else None


class OnnxModel:
    """An ONNX folder in plain onnxruntime, its KV cache handed from call to call without copies to numpy."""

    def __init__(self) -> None:
        import numpy
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        # onnxruntime's exceptions share no base of their own.
        self.errors = tuple(v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))
        self.numpy, self.library = numpy, onnxruntime
        self.runtime, self.version = "onnxruntime", str(onnxruntime.__version__)
        self.context_length: int | None = None
        self.pool_threads: int | None = None

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        options = self.library.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.pool_threads = threads
        path = artifact / "model.onnx"
        try:
            self.session = self.library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except self.errors as error:
            raise Refusal(f"{path.name} cannot be loaded: {one_line(error)}") from error
        config = genai_config(artifact)
        self.context_length = stated_context(config)
        self.head_size = config.get("model", {}).get("decoder", {}).get("head_size")
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        known = ("input_ids", "attention_mask", "position_ids")
        strange = [n for n in self.inputs if n not in known and not n.startswith("past_key_values.")]
        if strange or "logits" not in self.outputs:
            raise Refusal(f"{path.name} is no decoder with a KV cache (inputs nobody fills: {strange}).")

    def start(self, prompt: list[int], length: int) -> int:
        self._reset()
        return int(self._forward(prompt)["logits"].numpy()[0, -1].argmax())

    def next(self, token: int) -> int:
        return int(self._forward([token])["logits"].numpy()[0, -1].argmax())

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        self._reset()
        for piece in pieces(ids, decode_from):
            found = {name: v.numpy()[0] for name, v in self._forward(piece).items() if not name.startswith("present.")}
            if len(found["logits"]) != len(piece):
                raise Refusal("model.onnx gives the last token's logits only, so sequences cannot be scored.")
            yield {name: rows.astype(self.numpy.float32, copy=False) for name, rows in found.items()}

    def _reset(self) -> None:
        self.position = 0
        self.cache = {n: self._empty(i) for n, i in self.inputs.items() if n.startswith("past_key_values.")}

    def _empty(self, spec: Any) -> Any:
        """A cache tensor of no tokens: (1, heads, 0, head size)."""
        heads, size = spec.shape[1], spec.shape[3]
        if isinstance(size, str):  # the builder leaves it symbolic
            size = self.head_size
        if not isinstance(heads, int) or not isinstance(size, int):
            raise Refusal(
                f"the shape of {spec.name} is stated neither by model.onnx nor by genai_config.json, so no empty "
                "cache can be made: export the folder again."
            )
        dtype = self.numpy.float16 if spec.type == "tensor(float16)" else self.numpy.float32
        return self.library.OrtValue.ortvalue_from_numpy(self.numpy.zeros((1, heads, 0, size), dtype))

    def _forward(self, ids: list[int]) -> dict[str, Any]:
        """What the graph gives for `ids`, by name; the logits are (1, rows, vocabulary)."""
        numpy, total = self.numpy, self.position + len(ids)
        arrays = {
            "input_ids": numpy.array([ids], numpy.int64),
            "attention_mask": numpy.ones((1, total), numpy.int64),
            "position_ids": numpy.arange(self.position, total, dtype=numpy.int64)[None],
        }
        feed = {n: self.library.OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items() if n in self.inputs}
        answers = self.session.run_with_ort_values(self.outputs, feed | self.cache)
        values = dict(zip(self.outputs, answers, strict=True))
        self.cache = {n: values[n.replace("past_key_values", "present")] for n in self.cache}
        self.position = total
        return values


class GenaiModel:
    """An ONNX folder in onnxruntime-genai, the loop a phone app would use; it chooses the tokens itself."""

    def __init__(self) -> None:
        import numpy
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()
        self.numpy, self.library = numpy, onnxruntime_genai
        self.runtime, self.version = "onnxruntime-genai", str(onnxruntime_genai.__version__)
        self.context_length: int | None = None
        self.pool_threads: int | None = None

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        overlays: list[dict[str, Any]] = [{"decoder": {"session_options": session}}]
        ends = request.get("eos_ids", [])
        if ends:
            # The generator stops by itself: at these. A number replaces the folder's, a list is added to it.
            overlays += [{"eos_token_id": ends[0]}, {"eos_token_id": ends}]
        self.endless = not ends
        try:
            config = self.library.Config(str(artifact))
            for overlay in overlays:
                config.overlay(json.dumps({"model": overlay}))
            self.model = self.library.Model(config)
        except RuntimeError as error:
            raise Refusal(f"{artifact.name} cannot be loaded: {one_line(error)}") from error
        self.pool_threads = threads
        self.context_length = stated_context(genai_config(artifact))

    def start(self, prompt: list[int], length: int) -> int:
        params = self.library.GeneratorParams(self.model)
        # Timing goes on past end tokens; a least length forbids them, and which id comes then is no matter.
        least = length if self.endless else 0
        params.set_search_options(do_sample=False, min_length=least, max_length=length)
        self.generator = self.library.Generator(self.model, params)
        self.generator.append_tokens(self.numpy.array(prompt, self.numpy.int32))
        return self.next(0)

    def next(self, token: int) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        raise Refusal("onnxruntime-genai does not score sequences; ask plain onnxruntime.")


def choose_backend(request: dict[str, Any]) -> Model:
    """Import the runtime that a request needs: to generate or time ONNX, onnxruntime-genai where installed."""
    if request["backend"] == "executorch":
        return ExecuTorchModel()
    # onnxruntime-genai gives no logits, and cannot be told to answer without any end token.
    fits = request["task"] == "speed" or (request["task"] == "generate" and request["eos_ids"])
    return GenaiModel() if fits and importlib.util.find_spec("onnxruntime_genai") else OnnxModel()


def score(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write logits until the next sequence would pass `max_bytes`; at least one, so that callers advance."""
    sequences, written, row_bytes, done = request["sequences"], 0, 0, 0
    for index, ids in enumerate(sequences):
        check_length(model, len(ids), f"sequence {index}")
        if done and written + row_bytes * len(ids) > request["max_bytes"]:
            break
        with (out / f"logits-{index:05d}.npy").open("wb") as file:
            read = model.read(ids, request["decode_from"])
            row_bytes = write_rows(file, len(ids), (piece["logits"] for piece in read))
        written, done = written + row_bytes * len(ids), done + 1
        progress(done, len(sequences))
    return {"scored": done}


def trace(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write all that the artifact returns for each sequence, and tell what is what in the order of a file."""
    import numpy

    found: dict[str, list[Any]] = {}
    for index, ids in enumerate(request["sequences"]):
        check_length(model, len(ids), f"sequence {index}")
        found = {}
        for piece in model.read(ids, request["decode_from"]):
            for name, rows in piece.items():
                found.setdefault(name, []).append(rows)
        numpy.savez(out / f"outputs-{index:05d}.npz", *(numpy.concatenate(rows) for rows in found.values()))
        progress(index + 1, len(request["sequences"]))
    return {"outputs": list(found)}


def pieces(ids: list[int], decode_from: int | None) -> Iterator[list[int]]:
    """The ids of a sequence as a model takes them: many at once, from `decode_from` on one at a time."""
    end = len(ids) if decode_from is None else decode_from
    for begin in range(0, len(ids[:end]), SCORE_ROWS):
        yield ids[begin : min(begin + SCORE_ROWS, end)]
    for token in ids[end:]:
        yield [token]


def write_rows(file: BinaryIO, count: int, pieces: Iterator[Any]) -> int:
    """A .npy file of (count, vocabulary) float32, piece by piece; returns the bytes of one row."""
    from numpy.lib import format as npy

    width = 0
    for piece in pieces:
        if not width:
            width = piece.shape[1]
            shape = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
            npy.write_array_header_1_0(file, shape)
        file.write(piece.astype("<f4", order="C", copy=False).tobytes())
    return width * 4


def generate(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Greedy ids of each prompt, the end token left out, and why it stopped."""
    answers, most, ends = [], request["max_new_tokens"], set(request["eos_ids"])
    for index, prompt in enumerate(request["prompts"]):
        check_length(model, len(prompt) + 1, f"prompt {index} and a first token", least=2)
        room = most if model.context_length is None else min(most, model.context_length - len(prompt))
        began = time.perf_counter()
        token = model.start(prompt, len(prompt) + room)
        first_ms = (time.perf_counter() - began) * 1e3
        ids: list[int] = []
        while token not in ends:
            ids.append(token)
            if len(ids) == room:
                break
            token = model.next(token)
        stopped = "eos" if token in ends else "length" if room == most else "context"
        answers.append({"ids": ids, "stopped": stopped, "ttft_ms": first_ms})
        progress(index + 1, len(request["prompts"]))
    return {"answers": answers}


def speed(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Times of one prompt and `decode` steps after its first token, over and over; the first round is dropped."""
    prefill, decode, repeats = request["prefill"], request["decode"], request["repeats"]
    check_length(model, prefill + decode + 1, "the prompt and the decode steps")
    prompt = [1 + i % 7 for i in range(prefill)]  # a dense model takes as long for any ids
    first, steps = [], []  # seconds, of the steps a list a round
    for round_ in range(1 + repeats):
        if round_ == 1:
            before = condition()
            cpu_began, wall_began = time.process_time(), time.perf_counter()
        began = time.perf_counter()
        token = model.start(prompt, prefill + decode + 1)
        marks = [time.perf_counter()]
        for _ in range(decode):
            token = model.next(token)
            marks.append(time.perf_counter())
        first.append(marks[0] - began)
        steps.append([end - start for start, end in pairwise(marks)])
        progress(round_ + 1, 1 + repeats)
    busy = (time.process_time() - cpu_began) / (time.perf_counter() - wall_began)
    return {
        "prefill_tokens_per_s": [prefill / t for t in first[1:]],
        "decode_tokens_per_s": [decode / sum(times) for times in steps[1:]],
        "step_ms": [t * 1e3 for times in steps[1:] for t in times],
        "ttft_ms": [t * 1e3 for t in first[1:]],
        "cores_busy": busy,
        "before": before,
        "after": condition(),
    }


def condition() -> dict[str, Any]:
    """Clocks of the CPUs that this process may use, heat and battery, as far as the machine says; see `Condition`."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cpus = [SYS / "devices" / "system" / "cpu" / f"cpu{number}" for number in sorted(allowed)]
    heats = [n / 1e3 for n in numbers((SYS / "class" / "thermal").glob("thermal_zone*/temp")) if 0 < n < 150_000]
    slowed = numbers(cpu / "thermal_throttle" / "core_throttle_count" for cpu in cpus)
    return {
        "clocks_khz": numbers(cpu / "cpufreq" / "scaling_cur_freq" for cpu in cpus),
        "permitted_khz": numbers(cpu / "cpufreq" / "scaling_max_freq" for cpu in cpus),
        "times_slowed": sum(slowed) if slowed else None,
        "celsius": max(heats, default=None),
        "battery_percent": next(iter(numbers((SYS / "class" / "power_supply").glob("[bB][aA][tT]*/capacity"))), None),
    }


def numbers(paths: Iterable[Path]) -> list[int]:
    """What stands in files of one number each; those that are not there, or may not be read, are left out."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text(encoding="ascii")))
    return found


TASKS = {"score": score, "trace": trace, "generate": generate, "speed": speed}


def run(request: dict[str, Any], out: Path) -> None:
    """One request: import the runtime, load the artifact, do the task, write result.json last."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    cpus = pin(request["threads"], request["backend"])
    model = choose_backend(request)
    baseline_is_clean = forget_peak()
    baseline = resident_bytes()
    began = time.perf_counter()
    model.load(Path(request["artifact"]), request, cpus)
    load_ms = (time.perf_counter() - began) * 1e3
    answer = TASKS[request["task"]](model, request, out)
    figures = {
        "runtime": model.runtime,
        "runtime_version": model.version,
        "threads": cpus,
        "pool_threads": model.pool_threads,
        "context_length": model.context_length,
        "load_ms": load_ms,
        "baseline_rss_bytes": baseline,
        "peak_rss_bytes": peak_bytes(),
        "peak_includes_import": not baseline_is_clean,
    }
    text = json.dumps({"format": FORMAT, "load": figures, **answer})
    (out / "result.json").write_text(text, encoding="utf-8")


def pin(threads: int, backend: str) -> int:
    """Keep this process on `threads` of the CPUs it may use, before any library makes threads; how many it got.

    Runtimes size their pools in ways of their own, and not all can be told; the kernel can.
    """
    # ExecuTorch has a pool of its own. Its attention in the Python wheel opens OpenMP threads beside it, which spin on
    # the pool's cores between tokens: one instead of two decodes 2.3 times as fast after 128 tokens on two cores.
    os.environ["OMP_NUM_THREADS"] = "1" if backend == "executorch" else str(threads)
    if not hasattr(os, "sched_setaffinity"):
        return min(threads, os.cpu_count() or 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    return len(os.sched_getaffinity(0))


def forget_peak() -> bool:
    """Set the kernel's record of peak memory back to what is resident now; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident_bytes() -> int:
    """Memory resident now; the peak so far where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Most memory that was resident at once: VmHWM, or what getrusage says (kilobytes, bytes on macOS)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_length(model: Model, tokens: int, what: str, least: int = 1) -> None:
    """Refuse what is empty and what the cache cannot hold: runtimes differ in how they fail, and some do not."""
    if tokens < least:
        raise Refusal(f"{what}: no token ids were given, so there is nothing to predict from.")
    if model.context_length is not None and tokens > model.context_length:
        raise Refusal(
            f"{what} takes {tokens} tokens and the artifact's context holds {model.context_length}: ask for fewer, "
            "or export with a longer context."
        )


def genai_config(folder: Path) -> dict[str, Any]:
    """What genai_config.json says, nothing where there is no such file."""
    path = folder / "genai_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config


def stated_context(config: dict[str, Any]) -> int | None:
    """Tokens the KV cache may hold by genai_config.json, None where it does not say."""
    lengths = (config.get("model", {}).get("context_length"), config.get("search", {}).get("max_length"))
    return min((int(n) for n in lengths if n is not None), default=None)


def package_version(name: str) -> str:
    """Version of an installed distribution."""
    from importlib.metadata import version

    return version(name)


def one_line(error: Exception) -> str:
    """The text of an exception without line breaks."""
    return " ".join(str(error).split())


def progress(done: int, total: int) -> None:
    """Tell whoever started this how far it is."""
    print(f"progress {done} {total}", flush=True)


def main(argv: list[str]) -> int:
    """Run the request file argv[1] into the folder argv[2]; the exit code says what kind of failure it was."""
    try:
        run(json.loads(Path(argv[1]).read_text(encoding="utf-8")), Path(argv[2]))
    except Refusal as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        print(PIP_NAMES.get(module, module), file=sys.stderr)
        return EXIT_MISSING_PACKAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
