"""Read XNNPACK's and Vulkan's delegates in a .pte: which constants each quantized matrix product uses, in order.

Uses ExecuTorch's own deserializers and schema, and nothing of the exporter, so that `verify` does not trust it.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import FloatConstant
from qat_edge_exporters.executorch.compat import (
    BACKENDS_FOLDER,
    DelegateCall,
    ExecutionPlan,
    KernelCall,
    PTEFile,
    ScalarType,
    SchemaTensor,
    XNNHeader,
    deserialize_pte_binary,
    read_pte_header,
    run_flatc,
)

# Raised by deserializers on damaged bytes: their own checks, or the first operation that fails.
PARSE_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    struct.error, subprocess.SubprocessError, MemoryError,
)  # fmt: skip
BITS = {"xnn_datatype_qbint4": 4, "xnn_datatype_qcint4": 4, "xnn_datatype_qcint8": 8}
IDENTIFIER = b"ET12"  # format of the program, bytes 4 to 7 of the file
# Operators that look up rows, and the number of tables that each takes.
EMBEDDINGS = {
    "quantized_decomposed::embedding_byte": 2,
    "quantized_decomposed::embedding_4bit": 2,
    "aten::embedding": 1,
}
REORDER = "aten::index_select"  # puts the columns of looked-up rows in order, see `reorders_columns`
CODES = {ScalarType.CHAR: 8, ScalarType.BYTE: 4}  # bits of an embedding's codes, by the type of its tensor
UNBOUNDED = re.compile(r"(?<=: )(-?)inf\b")  # bound of a ReLU as flatc writes it, which is not JSON
SWAPPED_NIBBLES = bytes(b >> 4 | (b & 15) << 4 for b in range(256))
XNNPACK, VULKAN = "XnnpackBackend", "VulkanBackend"
SCHEMAS = {XNNPACK: "xnnpack/serialization/schema.fbs", VULKAN: "vulkan/serialization/schema.fbs"}
VULKAN_MAGIC = b"VH00"
VULKAN_HEADER_AT = 10  # byte of a Vulkan delegate: begin and size of the graph, two uint32
VULKAN_LINEAR = "et_vk.linear_dq8ca_q4gsw.default"  # input, its scales and zeros, codes, sums, scales, group, bias


@dataclass(frozen=True)
class MatrixProduct:
    """A matrix product with quantized weights.

    Attributes:
        out: rows of the weight.
        width: columns of the weight.
        bits: of a code.
        groups: scales of a row.
        codes_key: name of the codes among the delegates' constants.
        scales_key: name of the scales.
        bias_key: name of the bias; None without one, and where it is not known.
    """

    out: int
    width: int
    bits: int
    groups: int
    codes_key: str
    scales_key: str
    bias_key: str | None = None


class EmbeddingTable(NamedTuple):
    """A quantized embedding, in the layout of a product's weight.

    Attributes:
        shape: without keys, as the program itself holds the constants.
        codes: int8, or int4 in pairs with the first one in the low nibble.
        scales: float32 or bfloat16.
    """

    shape: MatrixProduct
    codes: bytes
    scales: bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of codes and scales."""
        return len(self.codes) + len(self.scales)


def open_pte(path: Path) -> PTEFile:
    """Parse the program and constants of a .pte.

    Raises:
        ArtifactError: the file is missing, truncated, damaged, or not a .pte of this format.
    """
    remedy = "Export again, or copy the file again."
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path}: not a file, but a folder, pipe or device. Give the path of a .pte.")
    if not path.is_file():
        raise ArtifactError(f"{path}: not there. {remedy}")

    data = path.read_bytes()
    try:
        # The file's format first: the parser of this version may fail anywhere on another one.
        if data[4:6] == b"ET" and data[4:8] != IDENTIFIER:
            raise ArtifactError(
                f"{path}: an ExecuTorch program in format {data[4:8].decode('ascii', 'replace')}, and the installed "
                f"executorch reads {IDENTIFIER.decode()}. Export again, or install the version that wrote it."
            )
        # The extended header says where the segments begin and how long they are.
        header = read_pte_header(data)
        if header is None or data[4:6] != b"ET":
            raise ArtifactError(f"{path}: no ExecuTorch program (its first bytes are {data[:8]!r}). {remedy}")
        # A copy that was interrupted: the parser would fail later, with a message about a buffer.
        expected = header.segment_base_offset + header.segment_data_size
        if len(data) < expected:
            raise ArtifactError(f"{path}: cut short: {len(data)} of {expected} bytes. {remedy}")
        if header.segment_data_size and len(data) > expected:
            raise ArtifactError(f"{path}: {len(data)} bytes, but its header describes {expected} of them. {remedy}")
        pte = deserialize_pte_binary(data)
        methods = Counter(plan.name for plan in pte.program.execution_plan)
    except PARSE_ERRORS as error:
        raise ArtifactError(f"{path}: damaged, it cannot be parsed ({error}). {remedy}") from error
    # A runtime takes the first one; readers look them up by name.
    twice = next((name for name, count in methods.items() if count > 1), None)
    if twice is not None:
        raise ArtifactError(f"{path}: it has two methods '{readers.shorten(twice)}'. {remedy}")
    return pte


def named_constants(pte: PTEFile) -> dict[str, bytes]:
    """Return the delegates' constants by name."""
    if pte.named_data is None:
        return {}
    return {key: pte.named_data.buffers[e.buffer_index] for key, e in pte.named_data.pte_data.items()}


def kernel_calls(plan: ExecutionPlan) -> list[KernelCall]:
    """Return all calls of operators outside delegates, in order."""
    return [call for call in instructions(plan) if isinstance(call, KernelCall)]


def delegate_calls(plan: ExecutionPlan) -> list[DelegateCall]:
    """Return all calls of delegates, in order."""
    return [call for call in instructions(plan) if isinstance(call, DelegateCall)]


def instructions(plan: ExecutionPlan) -> list[Any]:
    """Return all instructions, which are calls in the programs that the exporter writes."""
    return [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]


class DelegateBlob(NamedTuple):
    """A backend's name and the bytes of one of its delegates."""

    backend: str
    data: bytes


def delegate_blobs(pte: PTEFile, plan: ExecutionPlan) -> list[DelegateBlob]:
    """Return all delegates, in the order in which the program runs them."""
    used = [plan.delegates[call.delegate_index] for call in delegate_calls(plan)]
    return [DelegateBlob(d.id, bytes(pte.program.backend_delegate_data[d.processed.index].data)) for d in used]


def delegate_graphs(pte: PTEFile, plan: ExecutionPlan) -> list[dict[str, Any]]:
    """Return XNNPACK's and Vulkan's graphs, in the order in which the program runs them.

    The operators of both are under the key "xnodes"; Vulkan's graph has them under "chain" as well.
    """
    blobs = delegate_blobs(pte, plan)
    parsed = {}
    for backend in (XNNPACK, VULKAN):
        # One run of flatc for all graphs of a backend: starting it takes longer than parsing.
        parsed[backend] = iter(_parse_graphs(backend, [blob.data for blob in blobs if blob.backend == backend]))
    return [next(parsed[blob.backend]) for blob in blobs if blob.backend in parsed]


def matrix_products(pte: PTEFile, plan: ExecutionPlan) -> list[MatrixProduct]:
    """Return all quantized matrix products, in the order in which the program computes them."""
    return [product for graph in delegate_graphs(pte, plan) for product in graph_products(graph)]


def reorders_columns(plan: ExecutionPlan) -> bool:
    """Return whether the embedding has its pairs of codes in the head's order, and looked-up columns are reordered."""
    return any(operator.name == REORDER for operator in plan.operators)


def embedding_tables(pte: PTEFile, plan: ExecutionPlan) -> list[EmbeddingTable]:
    """Return the quantized embeddings, in the order of their use.

    A portable program looks up codes and scales by one ATen operator each, others by one operator for both.
    """
    low_first = reorders_columns(plan)
    tensors = _table_tensors(plan)
    tables = []
    for pair in zip(tensors[0::2], tensors[1::2], strict=False):
        # Codes first; a pair without codes is an embedding in float.
        first, second = sorted(pair, key=lambda tensor: tensor.scalar_type not in CODES)
        if first.scalar_type in CODES:
            tables.append(_embedding_table(pte, first, second, low_first))
    return tables


def _table_tensors(plan: ExecutionPlan) -> list[SchemaTensor]:
    """Return codes and scales of all embeddings in the order of the calls: each operator's first arguments."""
    tensors: list[SchemaTensor] = []
    for call in kernel_calls(plan):
        count = EMBEDDINGS.get(plan.operators[call.op_index].name, 0)
        if count:
            tensors += [plan.values[index].val for index in call.args[:count]]
    return tensors


def float_constants(pte: PTEFile, plan: ExecutionPlan) -> list[FloatConstant]:
    """Return the float32 constants of operators outside delegates, without the scales of embeddings."""
    of_tables = {id(tensor) for tensor in _table_tensors(plan)}
    found = []
    for index, value in enumerate(plan.values):
        tensor = value.val
        if not isinstance(tensor, SchemaTensor) or id(tensor) in of_tables or not tensor.data_buffer_idx:
            continue
        # A tensor with memory of its own is a buffer that the program writes, such as a cache.
        if tensor.scalar_type == ScalarType.FLOAT and tensor.allocation_info is None:
            data = _program_constant(pte, tensor)[: 4 * prod(tensor.sizes)]
            found.append(FloatConstant(f"constant {index}", np.frombuffer(data, np.float32)))
    return found


def _embedding_table(pte: PTEFile, codes: SchemaTensor, scales: SchemaTensor, low_first: bool) -> EmbeddingTable:
    """Return one table; low_first: the first code of a pair is in the low nibble already."""
    rows, columns = codes.sizes
    # Scales of rows are a vector, scales of groups a matrix.
    groups = scales.sizes[1] if len(scales.sizes) > 1 else 1
    bits = CODES[codes.scalar_type]

    # The storage of a small tensor is padded.
    scale_bytes = 4 if scales.scalar_type == ScalarType.FLOAT else 2
    code_data = _program_constant(pte, codes)[: rows * columns]
    scale_data = _program_constant(pte, scales)[: rows * groups * scale_bytes]

    # The only place in a .pte where the first code of a pair is in the high nibble.
    if bits == 4 and not low_first:
        code_data = _swap_nibbles(code_data)
    return EmbeddingTable(MatrixProduct(rows, columns * 8 // bits, bits, groups, "", ""), code_data, scale_data)


def _program_constant(pte: PTEFile, tensor: SchemaTensor) -> bytes:
    return bytes(pte.program.constant_buffer[tensor.data_buffer_idx].storage)


def _swap_nibbles(data: bytes) -> bytes:
    return data.translate(SWAPPED_NIBBLES)


def _parse_graphs(backend: str, blobs: Sequence[bytes]) -> list[dict[str, Any]]:
    """Parse the delegates of one backend as the JSON that flatc converts their graphs to."""
    if not blobs:
        return []
    # flatc reads and writes files only.
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{i}.bin" for i in range(len(blobs))]
        for file, blob in zip(files, blobs, strict=True):
            file.write_bytes(_graph_bytes(backend, blob))
        schema = BACKENDS_FOLDER / SCHEMAS[backend]
        options = ["--json", "--defaults-json", "--strict-json", "-o", name, str(schema)]
        run_flatc([*options, "--", *map(str, files)])
        texts = [file.with_suffix(".json").read_text(encoding="utf-8") for file in files]

    # Vulkan's operators under XNNPACK's name as well.
    graphs = [json.loads(UNBOUNDED.sub(r"\1Infinity", text)) for text in texts]
    return [{"xnodes": graph["chain"], **graph} if backend == VULKAN else graph for graph in graphs]


def _graph_bytes(backend: str, blob: bytes) -> bytes:
    """Return the flatbuffer of a delegate's graph, whose position is in the header."""
    if backend == XNNPACK:
        header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
        return blob[header.flatbuffer_offset :][: header.flatbuffer_size]
    if blob[4:8] != VULKAN_MAGIC:
        raise ValueError(f"a delegate of Vulkan's begins with {blob[:8]!r}")
    begin, size = struct.unpack_from("<II", blob, VULKAN_HEADER_AT)
    return blob[begin:][:size]


def graph_products(graph: dict[str, Any]) -> Iterator[MatrixProduct]:
    """Yield the quantized matrix products of one graph, in order."""
    return _vulkan_products(graph) if "chain" in graph else _xnnpack_products(graph)


class _XnnValue(NamedTuple):
    """A tensor of an XNNPACK graph, and its quantization; empty for a float tensor."""

    tensor: dict[str, Any]
    quantization: dict[str, Any]


def _xnnpack_products(graph: dict[str, Any]) -> Iterator[MatrixProduct]:
    """Yield XNNPACK's fully connected nodes. Codes are stored (out, in), or (out, in // 2) in pairs."""
    values: dict[int, _XnnValue] = {}
    for value in graph["xvalues"]:
        body = value["xvalue_union"]
        # A quantized tensor wraps a plain one.
        tensor, quantization = body.get("tensor_value", body), body.get("quant_params", {})
        values[tensor["id_out"]] = _XnnValue(tensor, quantization)

    for node in graph["xnodes"]:
        if node["xnode_union_type"] != "XNNFullyConnected":
            continue
        tensor, quantization = values[node["xnode_union"]["filter_id"]]
        if tensor["datatype"] not in BITS:
            continue  # a float matrix, such as the mean of a norm
        # Weight, scales and bias are named constants, whose bytes are outside of the delegate.
        out, width = tensor["dims"]
        bias = values.get(node["xnode_union"]["bias_id"])
        yield MatrixProduct(
            out=out,
            width=width,
            bits=BITS[tensor["datatype"]],
            groups=quantization["num_scales"] // out,
            codes_key=graph["constant_data"][tensor["constant_buffer_idx"]]["named_key"],
            scales_key=graph["constant_data"][quantization["scale_buffer_idx"]]["named_key"],
            bias_key=None if bias is None else graph["constant_data"][bias.tensor["constant_buffer_idx"]]["named_key"],
        )


def _vulkan_products(graph: dict[str, Any]) -> Iterator[MatrixProduct]:
    """Yield Vulkan's int4 products. Codes are stored (out, in // 2), scales (groups, out)."""
    values, stored = [value["value"] for value in graph["values"]], graph["constants"]
    for call in graph["chain"]:
        if call["name"] != VULKAN_LINEAR:
            continue
        # See VULKAN_LINEAR for the order of arguments.
        codes, scales = values[call["args"][3]], values[call["args"][5]]
        yield MatrixProduct(
            out=codes["dims"][0],
            width=codes["dims"][1] * 2,
            bits=4,
            groups=scales["dims"][0],
            codes_key=stored[codes["constant_id"]]["named_key"],
            scales_key=stored[scales["constant_id"]]["named_key"],
        )
