"""Engines of the speed benchmark: how each is timed, and how its file stores the weights.

All engines do the same work: a prompt with an empty cache, then single tokens after it. The product's own runtimes time
our files and those of onnxruntime-genai, each in a process of its own; llama-bench times llama.cpp.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from gguf import GGUFReader
from onnx import ModelProto, TensorProto, helper

from benchmarks.bandwidth import pinned
from benchmarks.peers import LLAMA_CPP_PACKAGE, PTE_TARGET, PeerBuilder, PeerError
from qat_edge import progress
from qat_edge.errors import QatEdgeError
from qat_edge.evaluate.devices import FAILURES, LOCAL
from qat_edge.manifest import library_version, sha256
from qat_edge.run import Run
from qat_edge_devices import open_runtime, open_transport
from qat_edge_exporters.executorch.pte import pte_reader
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.onnx import graph_file, names

PTE, PTE_INT4 = "`.pte`", "`.pte`, int4 tables"
ONNX, LLAMA_CPP, GENAI = "ONNX folder", "llama.cpp Q4_0", "onnxruntime-genai int4"
NAMES = (PTE, PTE_INT4, ONNX, LLAMA_CPP, GENAI)


@dataclass(frozen=True)
class Amounts:
    """Work of one timing.

    Attributes:
        prefill: tokens of the prompt.
        decode: tokens decoded after it.
        repeats: timed repeats in one process, after a warm-up.
    """

    prefill: int
    decode: int
    repeats: int


class OnnxWeights(NamedTuple):
    """Storage of the weights of an ONNX model.

    Attributes:
        embedding: precision, such as "int8 by 64".
        head: precision.
        token_bytes: bytes that MatMulNBits nodes read, each tensor counted once.
    """

    embedding: str
    head: str
    token_bytes: int


TRIAL = Amounts(prefill=8, decode=2, repeats=1)


@dataclass(frozen=True)
class EngineInfo:
    """Properties of an engine and its model that do not depend on the clock.

    Attributes:
        version: of the engine.
        size_bytes: of the model, without the tokenizer.
        embedding: precision as stored, such as "int8 by 64".
        head: precision as stored.
        token_bytes: bytes of the matrices that are read for each new token.
        sha256: of the weights, so that another model is measured anew.
        graph: calls in the graph of a .pte, empty for the other engines.
    """

    version: str
    size_bytes: int
    embedding: str
    head: str
    token_bytes: int
    sha256: str
    graph: Mapping[str, int]


@dataclass(frozen=True)
class Engine:
    """One engine with its model, ready to be timed.

    Attributes:
        name: as in the tables.
        info: engine and model.
        time: (threads, amounts) -> tokens per second of each repeat, by phase.
    """

    name: str
    info: EngineInfo
    time: Callable[[int, Amounts], Mapping[str, list[float]]]

    def timed(self, threads: int, amounts: Amounts) -> dict[str, Any]:
        """Return the medians over the repeats: prefill and decode in tokens per second."""
        rates = self.time(threads, amounts)
        return {"engine": self.name, "threads": threads, **{phase: median(each) for phase, each in rates.items()}}


def gather(run: Run, work: Path) -> tuple[list[Engine], dict[str, str]]:
    """Build the missing engines and models.

    Returns:
        The engines that work on this machine, and for each of the others the reason.
    """
    builder = PeerBuilder(work, run)
    # Functions, because making an engine may fail or take minutes.
    makers: dict[str, Callable[[], Engine]] = {
        PTE: lambda: _pte(PTE, run.exports / PTE_TARGET),
        PTE_INT4: lambda: _pte(PTE_INT4, builder.int4_tables()),
        ONNX: lambda: onnx_engine(ONNX, run.exports / "onnx"),
        LLAMA_CPP: lambda: _llama_cpp(builder),
        GENAI: lambda: onnx_engine(GENAI, builder.genai_int4()),
    }
    engines, reasons = [], {}
    for name, make in makers.items():
        try:
            engine = make()
            engine.timed(1, TRIAL)  # an engine that crashes counts as missing
            engines.append(engine)
        except QatEdgeError as error:
            reasons[name] = str(error)
            progress.warn(f"{name}: not measured. {error}")
    return engines, reasons


def engine_info(engines: list[Engine]) -> dict[str, dict[str, Any]]:
    """Return the info of each engine by its name, as plain values."""
    return {engine.name: asdict(engine.info) for engine in engines}


# --- our files, and onnxruntime-genai ---------------------------------------------------------------------------------


def _pte(name: str, folder: Path) -> Engine:
    """Engine of one of our .pte files."""
    artifact, path = pte_reader.read(folder), folder / pte_reader.MODEL
    sizes, program = artifact.size_bytes, inspect(path)

    # Codes have shape (out, in), scales (out, in // group).
    precisions = {}
    for module, weight in artifact.weights.items():
        groups = weight.scales.shape[1]
        spread = "per channel" if groups == 1 else f"by {weight.codes.shape[1] // groups}"
        precisions[module] = f"int{weight.bits} {spread}"

    found = EngineInfo(
        version=f"executorch {library_version('executorch')}",
        size_bytes=path.stat().st_size,
        embedding=precisions.get(names.EMBEDDING, "float32"),
        head=precisions.get(names.HEAD, "float32"),
        token_bytes=sizes["linears"] + sizes["scales"] + sizes["head"] + program.shared_bytes,
        sha256=sha256(path),
        graph={"delegates": sum(program.delegates.values()), **program.operators},
    )
    return Engine(name, found, lambda threads, amounts: _by_runtime(PTE_TARGET, folder, threads, amounts))


def onnx_engine(name: str, folder: Path) -> Engine:
    """Engine of an ONNX folder, ours or onnxruntime-genai's own."""
    model = graph_file.load_graph(folder / names.MODEL_FILE)
    version = f"onnxruntime-genai {library_version('onnxruntime-genai')}"
    weights = onnx_weights(model)
    data = folder / names.DATA_FILE
    size = sum(path.stat().st_size for path in (folder / names.MODEL_FILE, data))
    found = EngineInfo(version, size, weights.embedding, weights.head, weights.token_bytes, sha256(data), {})
    return Engine(name, found, lambda threads, amounts: _by_runtime("onnx", folder, threads, amounts))


def onnx_weights(model: ModelProto) -> OnnxWeights:
    """Return how a model stores its weights, as its GatherBlockQuantized and MatMulNBits nodes describe them."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    embedding, head, read = "float32", "float32", {}

    for node in model.graph.node:
        integers = {attribute.name: attribute.i for attribute in node.attribute}
        precision = f"int{integers.get('bits', 4)} by {integers.get('block_size')}"
        if node.op_type == "GatherBlockQuantized":
            embedding = precision
        if node.op_type != "MatMulNBits":
            continue
        head = precision if node.name.startswith("/lm_head/") else head
        for value in node.input[1:]:
            # The scales of a shared table pass through a Reshape, whose input is the tensor.
            source = value if value in tensors or value not in made_by else made_by[value].input[0]
            if source in tensors:
                read[source] = _tensor_bytes(tensors[source])
    return OnnxWeights(embedding, head, sum(read.values()))


def _tensor_bytes(tensor: TensorProto) -> int:
    return int(prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def timed_artifact(target: str, folder: Path, threads: int, amounts: Amounts) -> dict[str, float]:
    """Return the medians over the repeats of an artifact in its own runtime: tokens per second by phase."""
    return {phase: median(rates) for phase, rates in _by_runtime(target, folder, threads, amounts).items()}


def _by_runtime(target: str, folder: Path, threads: int, amounts: Amounts) -> Mapping[str, list[float]]:
    """Time an artifact with the product's own runtime on this machine."""
    try:
        with closing(open_transport(LOCAL)) as transport:
            runtime = open_runtime(target, transport, threads)
            runtime.prepare(folder)
            speed = runtime.speed(amounts.prefill, amounts.decode, amounts.repeats)
    except FAILURES as error:
        raise QatEdgeError(str(error)) from error
    return {"prefill": list(speed.prefill_tokens_per_s), "decode": list(speed.decode_tokens_per_s)}


# --- llama.cpp -----------------------------------------------------------------------------------------------------


def _llama_cpp(builder: PeerBuilder) -> Engine:
    """Engine of llama.cpp with the model in Q4_0."""
    program, model = builder.llama_bench(), builder.gguf("Q4_0")
    package, version = LLAMA_CPP_PACKAGE
    types = {tensor.name: (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in GGUFReader(model).tensors}
    embedding = types["token_embd.weight"]
    shared = "output.weight" not in types
    # A table of its own is only looked up; one that is the head as well is read as a whole.
    everything = sum(size for _, size in types.values())
    found = EngineInfo(
        version=f"llama.cpp of {package} {version}, without AMX",
        size_bytes=model.stat().st_size,
        embedding=embedding[0],
        head=embedding[0] if shared else types["output.weight"][0],
        token_bytes=everything if shared else everything - embedding[1],
        sha256=sha256(model),
        graph={},
    )
    return Engine(LLAMA_CPP, found, lambda threads, amounts: _by_llama_bench(program, model, threads, amounts))


def _by_llama_bench(program: Path, model: Path, threads: int, amounts: Amounts) -> Mapping[str, list[float]]:
    """Time with llama-bench. Decoding starts after the prompt (`-d`), as in the other engines."""
    phases = {
        "prefill": ("-p", str(amounts.prefill), "-n", "0"),
        "decode": ("-p", "0", "-n", str(amounts.decode), "-d", str(amounts.prefill)),
    }
    rates = {}
    for phase, flags in phases.items():
        command = [
            str(program), "-m", str(model), "-t", str(threads), "-r", str(amounts.repeats), "-o", "json", *flags,
        ]  # fmt: skip
        with pinned(threads):
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        try:
            (test,) = json.loads(done.stdout)
            rates[phase] = [float(rate) for rate in test["samples_ts"]]
        except (ValueError, KeyError, TypeError) as error:
            message = " ".join(done.stderr.split())[-300:]
            raise PeerError(f"llama-bench printed no figures, exit code {done.returncode}: {message}") from error
    return rates
