"""The runtimes that an artifact can be run in, each imported only where it is needed; token ids in, token ids out."""

from __future__ import annotations

import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

SCORE_ROWS = 256  # tokens whose logits are held in memory at once
# Where pip's name is not the module's.
PIP_NAMES = {"onnxruntime_genai": "onnxruntime-genai", "executorch_numpy_runtime": "executorch-numpy-runtime"}


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


class PteModel(ABC):
    """A .pte with `forward(tokens int64 (1, S), start position int64 (1,)) -> logits of the last token`."""

    runtime: str
    version: str
    context_length: int | None = None
    pool_threads: int | None = None
    chunk = 1  # most tokens in one call
    position = 0

    @abstractmethod
    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        """See `Model.load`."""

    @abstractmethod
    def call(self, ids: list[int], position: int) -> list[Any]:
        """Every output of the program in float32; the next call may overwrite them."""

    @abstractmethod
    def constant(self, name: str) -> int | None:
        """What a constant method returns, None where there is no such method."""

    def start(self, prompt: list[int], length: int) -> int:
        self.position = 0
        for begin in range(0, len(prompt), self.chunk):
            logits, *_ = self._forward(prompt[begin : begin + self.chunk])
        return int(logits.argmax())

    def next(self, token: int) -> int:
        logits = self.call([token], self.position)[0]
        self.position += 1
        return int(logits.argmax())

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        # Only the last token's logits come out: every beginning of what is read at once is read anew, and the whole
        # of it gives what else comes out, of all its tokens.
        at_once = min(decode_from or 0, self.chunk, len(ids))
        for end in range(1, at_once + 1):
            self.position = 0
            outputs = self._forward(ids[:end])
            yield _named(outputs if end == at_once else outputs[:1])
        self.position = at_once
        for token in ids[at_once:]:
            yield _named(self._forward([token]))

    def _read_constants(self) -> None:
        chunk = self.constant("get_max_seq_len")
        self.context_length = self.constant("get_max_context_len") or chunk
        self.chunk = (chunk or 1) if self.constant("enable_dynamic_shape") else 1

    def _forward(self, ids: list[int]) -> list[Any]:
        """(rows, features) of each output for `ids`: of the logits the last token's row, of others every token's."""
        logits, *others = self.call(ids, self.position)
        self.position += len(ids)
        return [logits.reshape(-1, logits.shape[-1])[-1:], *(output.reshape(len(ids), -1) for output in others)]


def _named(outputs: list[Any]) -> dict[str, Any]:
    return {str(place) if place else "logits": rows.copy() for place, rows in enumerate(outputs)}


class ExecuTorchModel(PteModel):
    """A .pte in ExecuTorch's own Python package, which needs torch."""

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
        # Inputs of one token, filled anew each time: whatever Python makes in a step is slow behind 80 MB of weights.
        self.one = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        self.token, self.place = (tensor.numpy().reshape(-1) for tensor in self.one)

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
        self._read_constants()

    def call(self, ids: list[int], position: int) -> list[Any]:
        if len(ids) == 1:
            self.token[0], self.place[0] = ids[0], position
            outputs = self.method.call(self.one)
        else:
            outputs = self.method.call([self.torch.tensor(v, dtype=self.torch.int64) for v in ([ids], [position])])
        return [output.float().numpy() for output in outputs]

    def constant(self, name: str) -> int | None:
        names = [self.program.get_method_name(i) for i in range(self.program.num_methods())]
        return int(self.program.load_method(name).call([])[0]) if name in names else None


class NumpyModel(PteModel):
    """A .pte in executorch-numpy-runtime: ExecuTorch 1.3 without torch, and without the operators of its LLM runner.

    Its pool has as many threads as the machine has cores, and cannot be told otherwise.
    """

    def __init__(self) -> None:
        import executorch_numpy_runtime
        import numpy

        self.numpy, self.library = numpy, executorch_numpy_runtime
        self.runtime = PIP_NAMES["executorch_numpy_runtime"]
        self.version = f"{executorch_numpy_runtime.__version__} (ExecuTorch {executorch_numpy_runtime.__et_version__})"

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        try:
            # Not by path: ExecuTorch 1.3 lets go of constants that its delegates still read, unless all stay in memory.
            self.program = self.library.Runtime.get().load_program(artifact.read_bytes())
            self.method = self.program.load_method("forward")
            self._read_constants()
            self.call([0], 0)  # only a call loads the method, and only that finds what it lacks
        except self.library.ExecuTorchError as error:
            lacking = sorted(set(re.findall(rb"llama::\w+", artifact.read_bytes())))
            if not lacking:
                raise Refusal(f"{artifact.name} cannot be loaded: {one_line(error)}") from error
            raise Refusal(
                f"{artifact.name} needs {b', '.join(lacking).decode()}, operators of ExecuTorch's LLM runner that "
                f"{self.runtime} does not have: export it with --portable, or install executorch and torch there."
            ) from error

    def call(self, ids: list[int], position: int) -> list[Any]:
        inputs = [self.numpy.array(values, self.numpy.int64) for values in ([ids], [position])]
        return [output.astype(self.numpy.float32, copy=False) for output in self.method(inputs)]

    def constant(self, name: str) -> int | None:
        return int(self.program.load_method(name)([])[0]) if name in self.program.method_names else None


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

    def feed(self, ids: list[int], position: int) -> dict[str, Any]:
        """The graph's inputs for `ids`, the first of them at `position`, but the cache."""
        numpy, total = self.numpy, position + len(ids)
        arrays = {
            "input_ids": numpy.array([ids], numpy.int64),
            "attention_mask": numpy.ones((1, total), numpy.int64),
            "position_ids": numpy.arange(position, total, dtype=numpy.int64)[None],
        }
        return {n: self.library.OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items() if n in self.inputs}

    def _forward(self, ids: list[int]) -> dict[str, Any]:
        """What the graph gives for `ids`, by name; the logits are (1, rows, vocabulary)."""
        answers = self.session.run_with_ort_values(self.outputs, self.feed(ids, self.position) | self.cache)
        values = dict(zip(self.outputs, answers, strict=True))
        self.cache = {n: values[n.replace("past_key_values", "present")] for n in self.cache}
        self.position += len(ids)
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
    """Import the runtime that a request needs: to generate or time ONNX, onnxruntime-genai where installed.

    A .pte runs in the torch-free runtime where that is installed and the one with torch is not.
    """
    if request["backend"] == "executorch":
        return ExecuTorchModel() if has("torch", "executorch") or not has("executorch_numpy_runtime") else NumpyModel()
    # onnxruntime-genai gives no logits, and cannot be told to answer without any end token.
    fits = request["task"] == "speed" or (request["task"] == "generate" and request["eos_ids"])
    return GenaiModel() if fits and has("onnxruntime_genai") else OnnxModel()


def has(*modules: str) -> bool:
    """Whether all of these are installed."""
    return all(importlib.util.find_spec(name) for name in modules)


def pieces(ids: list[int], decode_from: int | None) -> Iterator[list[int]]:
    """The ids of a sequence as a model takes them: many at once, from `decode_from` on one at a time."""
    end = len(ids) if decode_from is None else decode_from
    for begin in range(0, len(ids[:end]), SCORE_ROWS):
        yield ids[begin : min(begin + SCORE_ROWS, end)]
    for token in ids[end:]:
        yield [token]


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
