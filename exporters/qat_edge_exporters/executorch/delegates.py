"""What the XNNPACK delegates inside a .pte say: which constants each quantized matrix product uses, in order.

Reads the file with ExecuTorch's own deserializers and schema; nothing of our exporter takes part.
"""

from __future__ import annotations

import json
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import executorch.backends.xnnpack.serialization as xnnpack_schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _run_flatc
from executorch.exir._serialize._program import PTEFile, _get_extended_header, deserialize_pte_binary
from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import DelegateCall, ExecutionPlan, KernelCall

from qat_edge.errors import ArtifactError

# What deserializers raise on bytes that are not what they expect: their own checks, or the first thing that fails.
DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    struct.error, subprocess.SubprocessError, MemoryError,
)  # fmt: skip
BITS = {"xnn_datatype_qbint4": 4, "xnn_datatype_qcint4": 4, "xnn_datatype_qcint8": 8}
IDENTIFIER = b"ET12"  # of the program's format, in the file's bytes 4 to 7
EMBEDDING = "quantized_decomposed::embedding_byte"
PLAIN_EMBEDDING = "aten::embedding"


@dataclass(frozen=True)
class Product:
    """One fully connected node with quantized weights (out, in); keys name its constants in the file."""

    out: int
    width: int
    bits: int
    groups: int
    codes_key: str
    scales_key: str


def open_pte(path: Path) -> PTEFile:
    """The program and constants of a .pte.

    Raises:
        ArtifactError: the file is missing, shorter than it says, or no .pte.
    """
    again = "Export again, or copy the file again."
    if not path.is_file():
        raise ArtifactError(f"{path}: not there. {again}")
    data = path.read_bytes()
    try:
        if data[4:6] == b"ET" and data[4:8] != IDENTIFIER:
            raise ArtifactError(
                f"{path}: an ExecuTorch program in format {data[4:8].decode('ascii', 'replace')}, and the installed "
                f"executorch reads {IDENTIFIER.decode()}. Export again, or install the version that wrote it."
            )
        header = _get_extended_header(data)
        if header is None or data[4:6] != b"ET":
            raise ArtifactError(f"{path}: no ExecuTorch program (its first bytes are {data[:8]!r}). {again}")
        whole = header.segment_base_offset + header.segment_data_size
        if len(data) < whole:
            raise ArtifactError(f"{path}: cut short: {len(data)} of {whole} bytes. {again}")
        return deserialize_pte_binary(data)
    except DAMAGE as error:
        raise ArtifactError(f"{path}: damaged, it cannot be parsed ({error}). {again}") from error


def constants(pte: PTEFile) -> dict[str, bytes]:
    """Named constants of the delegates."""
    if pte.named_data is None:
        return {}
    return {key: pte.named_data.buffers[e.buffer_index] for key, e in pte.named_data.pte_data.items()}


def graphs(pte: PTEFile, plan: ExecutionPlan) -> list[dict[str, Any]]:
    """XNNPACK's graphs, in the order in which the program runs them."""
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    used = [plan.delegates[c.delegate_index] for c in calls if isinstance(c, DelegateCall)]
    return list(_parsed([pte.program.backend_delegate_data[d.processed.index].data for d in used if "Xnnpack" in d.id]))


def products(pte: PTEFile, plan: ExecutionPlan) -> list[Product]:
    """Every quantized matrix product, in the order in which the program computes them."""
    return [product for graph in graphs(pte, plan) for product in products_of(graph)]


def embedding_constants(pte: PTEFile, plan: ExecutionPlan) -> list[tuple[bytes, list[int]]]:
    """Bytes and shape of the quantized embedding's codes and scales; empty where there is none.

    A portable program looks codes and scales up by one ATen operator each, others by one operator for both.
    """
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    found: dict[str, list[Any]] = {EMBEDDING: [], PLAIN_EMBEDDING: []}
    for call in calls:
        if isinstance(call, KernelCall) and plan.operators[call.op_index].name in found:
            name = plan.operators[call.op_index].name
            tables = call.args[: 2 if name == EMBEDDING else 1]
            found[name] += [plan.values[index].val for index in tables]
    tensors = found[EMBEDDING] or sorted(found[PLAIN_EMBEDDING], key=lambda t: t.scalar_type != ScalarType.CHAR)
    if len(tensors) != 2 or tensors[0].scalar_type != ScalarType.CHAR:
        return []
    buffers = pte.program.constant_buffer
    return [(bytes(buffers[t.data_buffer_idx].storage), list(t.sizes)) for t in tensors]


def _parsed(blobs: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """XNNPACK's graphs as the JSON that flatc makes of them, all in one run of it."""
    schema = Path(str(xnnpack_schema.__path__[0])) / "schema.fbs"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = []
        for i, blob in enumerate(blobs):
            header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
            begin = header.flatbuffer_offset
            files.append(folder / f"{i}.bin")
            files[-1].write_bytes(blob[begin : begin + header.flatbuffer_size])
        if files:
            names = [str(file) for file in files]
            _run_flatc(["--json", "--defaults-json", "--strict-json", "-o", name, str(schema), "--", *names])
        for file in files:
            yield json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def products_of(graph: dict[str, Any]) -> Iterator[Product]:
    """Quantized matrix products of one of XNNPACK's graphs, in order."""
    values: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for value in graph["xvalues"]:
        body = value["xvalue_union"]
        tensor, quantization = body.get("tensor_value", body), body.get("quant_params", {})
        values[tensor["id_out"]] = (tensor, quantization)
    for node in graph["xnodes"]:
        if node["xnode_union_type"] != "XNNFullyConnected":
            continue
        tensor, quantization = values[node["xnode_union"]["filter_id"]]
        if tensor["datatype"] not in BITS:
            continue  # a float matrix, such as the mean of a norm
        out, width = tensor["dims"]
        yield Product(
            out=out,
            width=width,
            bits=BITS[tensor["datatype"]],
            groups=quantization["num_scales"] // out,
            codes_key=graph["constant_data"][tensor["constant_buffer_idx"]]["named_key"],
            scales_key=graph["constant_data"][quantization["scale_buffer_idx"]]["named_key"],
        )
