"""The engines of the speed benchmark: how each is timed, and what its file holds.

All do the same work: a prompt of so many tokens from an empty cache, then so many tokens one after the other behind
it. Ours and onnxruntime-genai's are timed by the product's own runtimes, a process each; llama.cpp by its llama-bench.
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
from typing import Any

from gguf import GGUFReader
from onnx import helper

from benchmarks.bandwidth import pinned
from benchmarks.peers import LLAMA_CPP_PACKAGE, PTE_TARGET, PeerError, Workshop
from qat_edge import progress
from qat_edge.errors import QatEdgeError
from qat_edge.evaluate.devices import FAILURES, LOCAL
from qat_edge.run import Run, library_version, sha256
from qat_edge_devices import open_runtime, open_transport
from qat_edge_exporters.executorch.pte import pte_reader
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.onnx import graph_file, names

PTE, PTE_INT4 = "`.pte`", "`.pte`, int4 tables"
ONNX, LLAMA_CPP, GENAI = "ONNX folder", "llama.cpp Q4_0", "onnxruntime-genai int4"
NAMES = (PTE, PTE_INT4, ONNX, LLAMA_CPP, GENAI)


@dataclass(frozen=True)
class Amounts:
    """What one timing does. prefill, decode: tokens; repeats: timed rounds in one process, after one warm-up."""

    prefill: int
    decode: int
    repeats: int


TRIAL = Amounts(prefill=8, decode=2, repeats=1)


@dataclass(frozen=True)
class Facts:
    """What does not depend on the clock. token_bytes: of matrices that are read for each new token.

    size_bytes: of the model, tokenizer aside. embedding, head: precision as stored. graph: what the .pte's graph is
    made of, empty for the others. sha256: of the weights, so that another model is measured anew.
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
    """One engine with its model, ready to be timed. time: threads and amounts -> tokens per second of each repeat."""

    name: str
    facts: Facts
    time: Callable[[int, Amounts], Mapping[str, list[float]]]

    def timed(self, threads: int, amounts: Amounts) -> dict[str, Any]:
        """Medians over the repeats: prefill and decode in tokens per second."""
        rates = self.time(threads, amounts)
        return {"engine": self.name, "threads": threads, **{phase: median(each) for phase, each in rates.items()}}


def gather(run: Run, work: Path) -> tuple[list[Engine], dict[str, str]]:
    """The engines that can be had here, and why the others cannot. Peers that are missing are made."""
    workshop = Workshop(work, run)
    makers: dict[str, Callable[[], Engine]] = {
        PTE: lambda: _pte(PTE, run.exports / PTE_TARGET),
        PTE_INT4: lambda: _pte(PTE_INT4, workshop.int4_tables()),
        ONNX: lambda: _onnx(ONNX, run.exports / "onnx"),
        LLAMA_CPP: lambda: _llama_cpp(workshop),
        GENAI: lambda: _onnx(GENAI, workshop.genai_int4()),
    }
    engines, reasons = [], {}
    for name, make in makers.items():
        try:
            engine = make()
            engine.timed(1, TRIAL)  # what crashes is missing, too
            engines.append(engine)
        except QatEdgeError as error:
            reasons[name] = str(error)
            progress.info(f"{name}: not measured. {error}")
    return engines, reasons


def facts(engines: list[Engine]) -> dict[str, dict[str, Any]]:
    """Facts by engine, as plain values."""
    return {engine.name: asdict(engine.facts) for engine in engines}


# --- ours, and onnxruntime-genai ---------------------------------------------------------------------------------


def _pte(name: str, folder: Path) -> Engine:
    artifact, path = pte_reader.read(folder), folder / pte_reader.MODEL
    sizes, words = artifact.size_bytes, inspect(path)
    precisions = {}
    for module, weight in artifact.weights.items():
        groups = weight.scales.shape[1]
        spread = "per channel" if groups == 1 else f"by {weight.codes.shape[1] // groups}"
        precisions[module] = f"int{weight.bits} {spread}"
    found = Facts(
        version=f"executorch {library_version('executorch')}",
        size_bytes=path.stat().st_size,
        embedding=precisions.get(names.EMBEDDING, "float32"),
        head=precisions.get(names.HEAD, "float32"),
        token_bytes=sizes["linears"] + sizes["scales"] + sizes["head"] + words.shared_bytes,
        sha256=sha256(path),
        graph={"delegates": sum(words.delegates.values()), **words.operators},
    )
    return Engine(name, found, lambda threads, amounts: _by_runtime(PTE_TARGET, folder, threads, amounts))


def _onnx(name: str, folder: Path) -> Engine:
    model = graph_file.load_graph(folder / names.MODEL_FILE)
    version = f"onnxruntime-genai {library_version('onnxruntime-genai')}"
    embedding, head, token_bytes = onnx_weights(model)
    data = folder / names.DATA_FILE
    size = sum(path.stat().st_size for path in (folder / names.MODEL_FILE, data))
    found = Facts(version, size, embedding, head, token_bytes, sha256(data), {})
    return Engine(name, found, lambda threads, amounts: _by_runtime("onnx", folder, threads, amounts))


def onnx_weights(model: Any) -> tuple[str, str, int]:
    """Precision of embedding and head, and bytes of all that MatMulNBits nodes read, each tensor once."""
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
            source = value if value in tensors or value not in made_by else made_by[value].input[0]  # a Reshape
            if source in tensors:
                read[source] = _tensor_bytes(tensors[source])
    return embedding, head, sum(read.values())


def _tensor_bytes(tensor: Any) -> int:
    return int(prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _by_runtime(target: str, folder: Path, threads: int, amounts: Amounts) -> Mapping[str, list[float]]:
    try:
        with closing(open_transport(LOCAL)) as transport:
            runtime = open_runtime(target, transport, threads)
            runtime.prepare(folder)
            speed = runtime.speed(amounts.prefill, amounts.decode, amounts.repeats)
    except FAILURES as error:
        raise QatEdgeError(str(error)) from error
    return {"prefill": list(speed.prefill_tokens_per_s), "decode": list(speed.decode_tokens_per_s)}


# --- llama.cpp -----------------------------------------------------------------------------------------------------


def _llama_cpp(workshop: Workshop) -> Engine:
    program, model = workshop.llama_bench(), workshop.q4_0()
    package, version = LLAMA_CPP_PACKAGE
    types = {tensor.name: (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in GGUFReader(model).tensors}
    embedding = types["token_embd.weight"]
    shared = "output.weight" not in types
    everything = sum(size for _, size in types.values())
    found = Facts(
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
    """Decoding begins behind the prompt (`-d`), as it does in the other engines."""
    phases = {
        "prefill": ("-p", str(amounts.prefill), "-n", "0"),
        "decode": ("-p", "0", "-n", str(amounts.decode), "-d", str(amounts.prefill)),
    }
    rates = {}
    for phase, asked in phases.items():
        command = [
            str(program), "-m", str(model), "-t", str(threads), "-r", str(amounts.repeats), "-o", "json", *asked,
        ]  # fmt: skip
        with pinned(threads):
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        try:
            (test,) = json.loads(done.stdout)
            rates[phase] = [float(rate) for rate in test["samples_ts"]]
        except (ValueError, KeyError, TypeError) as error:
            said = " ".join(done.stderr.split())[-300:]
            raise PeerError(f"llama-bench, exit code {done.returncode}, gave no figures: {said}") from error
    return rates
