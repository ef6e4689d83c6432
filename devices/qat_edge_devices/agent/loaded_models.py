"""An artifact loaded in one of the runtimes; token ids in, token ids out.

    ExecuTorchModel   a .pte in ExecuTorch's own Python package, which needs torch
    NumpyModel        a .pte in executorch-numpy-runtime, which does not
    OnnxModel         an ONNX folder in plain onnxruntime: gives logits
    GenaiModel        an ONNX folder in onnxruntime-genai: generates as a phone app would
    LlamaModel        a GGUF file in llama.cpp (`llama_model`)
    TransformersModel a Hugging Face folder in transformers with compressed-tensors (`transformers_model`)

Each constructor imports its runtime, and nothing else does, so a device needs only the one it uses. Runtimes and their
objects are typed `Any`: most of these libraries ship no type information.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

# Relative, because the folder is sent under a shorter name.
from .active_adapter import ADAPTER_FILE, GenaiAdapter, OnnxAdapter  # noqa: TID252
from .llama_model import LlamaModel  # noqa: TID252
from .model_errors import RequestRejected, token_chunks  # noqa: TID252
from .transformers_model import TransformersModel  # noqa: TID252

# Module -> name on PyPI, if they differ.
PIP_NAMES = {
    "onnxruntime_genai": "onnxruntime-genai",
    "executorch_numpy_runtime": "executorch-numpy-runtime",
    "xllamacpp": "xllamacpp==2026.10.11549",  # the version whose interface `llama_model` was read in
    "compressed_tensors": "compressed-tensors",
}
# Greedy decoding, whatever genai_config.json keeps of the model's own settings for apps.
GREEDY = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
}  # fmt: skip
BINDINGS = ("_C", "_portable_lib")  # of ExecuTorch 1.5, and of 1.4
# Libraries of operators in ExecuTorch's package, without their suffix.
OPERATOR_LIBRARIES = (
    "kernels/quantized/libquantized_ops_aot_lib",
    "extension/llm/custom_ops/libcustom_ops_aot_lib",
)
LLM_OPERATOR = re.compile(rb"llama::\w+")  # name of an operator of ExecuTorch's LLM runner, in a .pte
CACHE_PREFIX, NEW_CACHE_PREFIX = "past_key_values", "present"  # of the KV cache among inputs and outputs in ONNX
DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")


class DeviceModel(Protocol):
    """A loaded artifact with a KV cache for one sequence.

    Attributes:
        runtime: name of the runtime's package.
        version: version of that package.
        context_length: tokens that the cache holds at most; None if the artifact does not state it.
        pool_threads: threads of the runtime's own pool; None if it does not report them.
    """

    runtime: str
    version: str
    context_length: int | None
    pool_threads: int | None

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        """Load the artifact. The constructor has imported the runtime, so memory used before is the runtime's own."""

    def start(self, prompt: list[int], length: int) -> int:
        """Empty the cache, process the prompt, return the most likely next id.

        Args:
            prompt: token ids.
            length: tokens of the prompt and its continuation, at most.
        """

    def next(self, token: int) -> int:
        """Process the id that was returned last, return the most likely id after it."""

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        """Process a whole sequence from an empty cache, in the chunks of `token_chunks`.

        Yields:
            float32 outputs of each chunk by name: "logits" (rows, vocabulary), and every other output of the artifact
            (rows, features).
        """


class PteModel(ABC):
    """A .pte whose `forward` takes tokens (1, S) and a start position (1,), both int64.

    It returns the logits of the last token, and then any further outputs, of all tokens.

    Attributes:
        chunk: most tokens in one call.
        position: tokens in the cache.
    """

    runtime: str
    version: str
    context_length: int | None = None
    pool_threads: int | None = None
    chunk = 1
    position = 0

    @abstractmethod
    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        """Load the artifact; see `DeviceModel.load`."""

    @abstractmethod
    def call(self, ids: list[int], position: int) -> list[Any]:
        """Return all outputs of the program as float32 arrays, which the next call may overwrite."""

    @abstractmethod
    def constant(self, name: str) -> int | None:
        """Return the value of a constant method, or None if there is no such method."""

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
        # A call returns only the last token's logits. For those of every token that is processed in one call, each
        # prefix is processed again; only the full one yields the other outputs, which have a row per token.
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
        """Return (rows, features) of each output for `ids`: one row of logits, one row per token of the others."""
        logits, *others = self.call(ids, self.position)
        self.position += len(ids)
        last_row = logits.reshape(-1, logits.shape[-1])[-1:]
        return [last_row, *(output.reshape(len(ids), -1) for output in others)]


def _named(outputs: list[Any]) -> dict[str, Any]:
    """Return copies of a program's outputs by name: "logits", then "1", "2", ..."""
    return {str(index) if index else "logits": rows.copy() for index, rows in enumerate(outputs)}


def _binding() -> Any:
    """Return ExecuTorch's binding itself: `portable_lib`, and the packages of the operators, import the whole exporter.

    Raises:
        ImportError: The installed version has it under another name.
    """
    names = [f"executorch.extension.pybindings.{name}" for name in BINDINGS]
    found = next((name for name in names if importlib.util.find_spec(name)), names[0])
    return importlib.import_module(found)


class ExecuTorchModel(PteModel):
    """A .pte in ExecuTorch's own Python package, which needs torch."""

    def __init__(self) -> None:
        import torch

        spec = importlib.util.find_spec("executorch")
        roots = (spec.submodule_search_locations or []) if spec else []
        for root in roots:
            for library in OPERATOR_LIBRARIES:
                for path in Path(root).glob(f"{library}.*"):
                    torch.ops.load_library(str(path))

        self.torch, self.library = torch, _binding()
        self.runtime, self.version = "executorch", package_version("executorch")

        # Inputs of one token, filled anew at each step: with 80 MB of weights going through the CPU's caches, every
        # object that Python creates in a step is slow.
        self.one_token = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        self.token, self.start_position = (tensor.numpy().reshape(-1) for tensor in self.one_token)

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        # By default the pool is sized from the machine, not from the CPUs this process is pinned to.
        self.library._unsafe_reset_threadpool(threads)
        self.pool_threads = int(self.library._threadpool_get_thread_count())
        try:
            self.program = self.library._load_program(str(artifact))
            # Loading the module as a whole would defer this, the expensive part, to the first token.
            self.method = self.program.load_method("forward")
        except RuntimeError as error:
            raise RequestRejected(f"{artifact.name} cannot be loaded: {one_line(error)}") from error
        self._read_constants()

    def call(self, ids: list[int], position: int) -> list[Any]:
        if len(ids) == 1:
            self.token[0], self.start_position[0] = ids[0], position
            outputs = self.method.call(self.one_token)
        else:
            inputs = [self.torch.tensor(values, dtype=self.torch.int64) for values in ([ids], [position])]
            outputs = self.method.call(inputs)
        return [output.float().numpy() for output in outputs]

    def constant(self, name: str) -> int | None:
        names = [self.program.get_method_name(i) for i in range(self.program.num_methods())]
        return int(self.program.load_method(name).call([])[0]) if name in names else None


class NumpyModel(PteModel):
    """A .pte in executorch-numpy-runtime: ExecuTorch 1.3 without torch and without the operators of its LLM runner.

    Its pool has as many threads as the machine has cores, and cannot be configured.
    """

    def __init__(self) -> None:
        import executorch_numpy_runtime
        import numpy

        self.numpy, self.library = numpy, executorch_numpy_runtime
        self.runtime = PIP_NAMES["executorch_numpy_runtime"]
        self.version = f"{executorch_numpy_runtime.__version__} (ExecuTorch {executorch_numpy_runtime.__et_version__})"

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        try:
            # From memory: loaded by path, ExecuTorch 1.3 frees constants that its delegates still read.
            self.program = self.library.Runtime.get().load_program(artifact.read_bytes())
            self.method = self.program.load_method("forward")
            self._read_constants()
            self.call([0], 0)  # the method is loaded by its first call, and only that finds missing operators
        except self.library.ExecuTorchError as error:
            missing = sorted(set(LLM_OPERATOR.findall(artifact.read_bytes())))
            if not missing:
                raise RequestRejected(f"{artifact.name} cannot be loaded: {one_line(error)}") from error
            raise RequestRejected(
                f"{artifact.name} needs {b', '.join(missing).decode()}, operators of ExecuTorch's LLM runner that "
                f"{self.runtime} does not have: export it with --portable, or install executorch and torch there."
            ) from error

    def call(self, ids: list[int], position: int) -> list[Any]:
        inputs = [self.numpy.array(values, self.numpy.int64) for values in ([ids], [position])]
        return [output.astype(self.numpy.float32, copy=False) for output in self.method(inputs)]

    def constant(self, name: str) -> int | None:
        return int(self.program.load_method(name)([])[0]) if name in self.program.method_names else None


class OnnxModel:
    """An ONNX folder in plain onnxruntime. The KV cache is passed from call to call without copies to numpy."""

    def __init__(self) -> None:
        import numpy
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        onnxruntime.disable_telemetry_events()
        # onnxruntime's exceptions have no common base class of their own.
        self.errors = tuple(
            value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)
        )
        self.numpy, self.library = numpy, onnxruntime
        self.runtime, self.version = "onnxruntime", str(onnxruntime.__version__)
        self.context_length: int | None = None
        self.pool_threads: int | None = None

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        options = self.library.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors only
        self.pool_threads = threads
        path = artifact / "model.onnx"
        try:
            self.session = self.library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except self.errors as error:
            raise RequestRejected(f"{path.name} cannot be loaded: {one_line(error)}") from error
        try:
            self.adapter = OnnxAdapter(self.library, request.get("adapter"))
        except RuntimeError as error:
            raise RequestRejected(f"{ADAPTER_FILE} cannot be loaded: {one_line(error)}") from error

        config = read_genai_config(artifact)
        self.context_length = context_length(config)
        self.head_size = config.get("model", {}).get("decoder", {}).get("head_size")

        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        unknown = [
            name for name in self.inputs if name not in DECODER_INPUTS and not name.startswith(f"{CACHE_PREFIX}.")
        ]
        if unknown or "logits" not in self.outputs:
            raise RequestRejected(f"{path.name} is not a decoder with a KV cache (unknown inputs: {unknown}).")

    def start(self, prompt: list[int], length: int) -> int:
        self._reset()
        return int(self._forward(prompt)["logits"].numpy()[0, -1].argmax())

    def next(self, token: int) -> int:
        return int(self._forward([token])["logits"].numpy()[0, -1].argmax())

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        self._reset()
        for chunk in token_chunks(ids, decode_from):
            found = {
                name: value.numpy()[0]
                for name, value in self._forward(chunk).items()
                if not name.startswith(f"{NEW_CACHE_PREFIX}.")
            }
            if len(found["logits"]) != len(chunk):
                raise RequestRejected("model.onnx gives the last token's logits only, so sequences cannot be scored.")
            yield {name: rows.astype(self.numpy.float32, copy=False) for name, rows in found.items()}

    def feed(self, ids: list[int], position: int) -> dict[str, Any]:
        """Return the graph's inputs for `ids`, except the cache. `position`: that of the first id."""
        numpy, total = self.numpy, position + len(ids)
        arrays = {
            "input_ids": numpy.array([ids], numpy.int64),
            "attention_mask": numpy.ones((1, total), numpy.int64),
            "position_ids": numpy.arange(position, total, dtype=numpy.int64)[None],
        }
        return {
            name: self.library.OrtValue.ortvalue_from_numpy(array)
            for name, array in arrays.items()
            if name in self.inputs
        }

    def _reset(self) -> None:
        self.position = 0
        self.cache = {
            name: self._empty_cache(value) for name, value in self.inputs.items() if name.startswith(f"{CACHE_PREFIX}.")
        }

    def _empty_cache(self, spec: Any) -> Any:
        """Return a cache tensor of no tokens, (1, heads, 0, head size), for an input of the graph."""
        heads, size = spec.shape[1], spec.shape[3]
        if isinstance(size, str):  # the model builder leaves it symbolic
            size = self.head_size
        if not isinstance(heads, int) or not isinstance(size, int):
            raise RequestRejected(
                f"the shape of {spec.name} is stated neither by model.onnx nor by genai_config.json, so no empty "
                "cache can be made: export the folder again."
            )
        dtype = self.numpy.float16 if spec.type == "tensor(float16)" else self.numpy.float32
        return self.library.OrtValue.ortvalue_from_numpy(self.numpy.zeros((1, heads, 0, size), dtype))

    def _forward(self, ids: list[int]) -> dict[str, Any]:
        """Run the graph on `ids`; return its outputs by name, the logits as (1, rows, vocabulary)."""
        feed, options = self.feed(ids, self.position) | self.cache, self.adapter.run_options
        outputs = self.session.run_with_ort_values(self.outputs, feed, options)
        values = dict(zip(self.outputs, outputs, strict=True))
        self.cache = {name: values[name.replace(CACHE_PREFIX, NEW_CACHE_PREFIX)] for name in self.cache}
        self.position += len(ids)
        return values


class GenaiModel:
    """An ONNX folder in onnxruntime-genai, the loop that a phone app would use. It chooses the tokens itself."""

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
        end_ids = request.get("eos_ids", [])
        if end_ids:
            # The generator itself stops at these. In an overlay, a number replaces the folder's ids, and a list is
            # added to them: so first the number, then the list.
            overlays += [{"eos_token_id": end_ids[0]}, {"eos_token_id": end_ids}]
        self.ignores_end = not end_ids
        try:
            config = self.library.Config(str(artifact))
            for overlay in overlays:
                config.overlay(json.dumps({"model": overlay}))
            self.model = self.library.Model(config)
            self.adapter = GenaiAdapter(self.library, self.model, request.get("adapter"))
        except RuntimeError as error:
            raise RequestRejected(f"{artifact.name} cannot be loaded: {one_line(error)}") from error
        grammar = request.get("grammar")
        self.grammar = None if grammar is None else Path(grammar).read_text(encoding="utf-8")
        self.pool_threads = threads
        self.context_length = context_length(read_genai_config(artifact))

    def start(self, prompt: list[int], length: int) -> int:
        params = self.library.GeneratorParams(self.model)
        # Timing continues past end tokens. A minimum length forbids them; which id comes instead does not matter.
        min_length = length if self.ignores_end else 0
        params.set_search_options(**GREEDY, min_length=min_length, max_length=length)
        if self.grammar is not None:
            params.set_guidance("lark_grammar", self.grammar)
        try:
            self.generator = self.library.Generator(self.model, params)
        except RuntimeError as error:
            raise RequestRejected(f"no generator could be made: {one_line(error)}") from error
        self.adapter.activate(self.generator)
        self.generator.append_tokens(self.numpy.array(prompt, self.numpy.int32))
        return self.next(0)

    def next(self, token: int) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        raise RequestRejected("onnxruntime-genai does not score sequences; use plain onnxruntime.")


def choose_backend(request: dict[str, Any]) -> DeviceModel:
    """Import the runtime for a request and return its model, not yet loaded.

    A .pte runs in the torch-free runtime if that is installed and the one with torch is not. An ONNX folder is
    generated with and timed in onnxruntime-genai if that is installed, and scored in plain onnxruntime. A GGUF file
    runs in llama.cpp.

    Raises:
        RequestRejected: the answers are to follow a grammar, and the runtime takes none.
    """
    model = _backend(request)
    if request.get("grammar") is not None and not isinstance(model, GenaiModel | LlamaModel):
        raise RequestRejected(f"{model.runtime} takes no grammar; onnxruntime-genai and llama.cpp do.")
    return model


def _backend(request: dict[str, Any]) -> DeviceModel:
    if request["backend"] == "executorch":
        # If neither is installed, ExecuTorch's import fails with the name of the missing package.
        if is_installed("torch", "executorch") or not is_installed("executorch_numpy_runtime"):
            return ExecuTorchModel()
        return NumpyModel()

    if request["backend"] == "gguf":
        return LlamaModel()

    if request["backend"] == "hf":
        return TransformersModel()

    # onnxruntime-genai gives no logits, and cannot generate without any end token.
    is_generation = request["task"] == "generate" and request["eos_ids"]
    if (request["task"] == "speed" or is_generation) and is_installed("onnxruntime_genai"):
        return GenaiModel()
    return OnnxModel()


def is_installed(*modules: str) -> bool:
    """Return whether all of these modules are installed, without importing them."""
    return all(importlib.util.find_spec(name) for name in modules)


def read_genai_config(folder: Path) -> dict[str, Any]:
    """Read genai_config.json; empty if there is no such file."""
    path = folder / "genai_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config


def context_length(config: dict[str, Any]) -> int | None:
    """Return the tokens that the KV cache may hold according to genai_config.json, or None if it states none."""
    lengths = (config.get("model", {}).get("context_length"), config.get("search", {}).get("max_length"))
    return min((int(length) for length in lengths if length is not None), default=None)


def package_version(name: str) -> str:
    """Return the version of an installed distribution."""
    from importlib.metadata import version

    return version(name)


def one_line(error: Exception) -> str:
    """Return the text of an exception without line breaks."""
    return " ".join(str(error).split())
