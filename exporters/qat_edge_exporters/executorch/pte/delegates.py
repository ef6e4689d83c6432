"""What XNNPACK's and Vulkan's delegates in a .pte say: which constants each quantized matrix product uses, in order.

Reads the file with ExecuTorch's own deserializers and schema; nothing of our exporter takes part.
"""

from __future__ import annotations

import json
import re
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
# Operators that look rows up, and how many tables they take.
EMBEDDINGS = {
    "quantized_decomposed::embedding_byte": 2,
    "quantized_decomposed::embedding_4bit": 2,
    "aten::embedding": 1,
}
ORDERS = "aten::index_select"  # what puts looked-up rows in order, see `puts_in_order`
CODES = {ScalarType.CHAR: 8, ScalarType.BYTE: 4}  # of an embedding: bits by type
UNBOUNDED = re.compile(r"(?<=: )(-?)inf\b")  # a bound of a ReLU as flatc writes it, which is no JSON
SWAPPED = bytes(b >> 4 | (b & 15) << 4 for b in range(256))
XNNPACK, VULKAN = "XnnpackBackend", "VulkanBackend"
# Importing Vulkan's package would make the root logger tell everything, so its files are read beside XNNPACK's.
BACKENDS = Path(str(xnnpack_schema.__path__[0])).parents[1]
SCHEMAS = {XNNPACK: "xnnpack/serialization/schema.fbs", VULKAN: "vulkan/serialization/schema.fbs"}
VULKAN_MAGIC = b"VH00"
VULKAN_LINEAR = "et_vk.linear_dq8ca_q4gsw.default"  # input, its scales and zeros, codes, sums, scales, group, bias


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
    """XNNPACK's and Vulkan's graphs, in the order in which the program runs them; "xnodes" are their operators."""
    found = blobs(pte, plan)
    parsed = {
        backend: iter(_parsed(backend, [b for name, b in found if name == backend])) for backend in (XNNPACK, VULKAN)
    }
    return [next(parsed[backend]) for backend, _ in found if backend in parsed]


def blobs(pte: PTEFile, plan: ExecutionPlan) -> list[tuple[str, bytes]]:
    """Backend and bytes of every delegate, in the order in which the program runs them."""
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    used = [plan.delegates[c.delegate_index] for c in calls if isinstance(c, DelegateCall)]
    return [(d.id, bytes(pte.program.backend_delegate_data[d.processed.index].data)) for d in used]


def products(pte: PTEFile, plan: ExecutionPlan) -> list[Product]:
    """Every quantized matrix product, in the order in which the program computes them."""
    return [product for graph in graphs(pte, plan) for product in products_of(graph)]


def puts_in_order(plan: ExecutionPlan) -> bool:
    """Whether an embedding's pairs lie as the head's do, so that what is looked up is put in order afterwards."""
    return any(operator.name == ORDERS for operator in plan.operators)


def embedding_tables(pte: PTEFile, plan: ExecutionPlan) -> list[tuple[Product, bytes, bytes]]:
    """The quantized embeddings' shapes, codes and scales as those of products, in the order of their use.

    A portable program looks codes and scales up by one ATen operator each, others by one operator for both. int4 codes
    are returned as products have them, the first of a pair in the low nibble.
    """
    as_head = puts_in_order(plan)
    calls = [i.instr_args for chain in plan.chains for i in chain.instructions]
    tensors: list[Any] = []
    for call in calls:
        tables = EMBEDDINGS.get(plan.operators[call.op_index].name, 0) if isinstance(call, KernelCall) else 0
        tensors += [plan.values[index].val for index in call.args[:tables]] if tables else []
    pairs = zip(tensors[0::2], tensors[1::2], strict=False)
    in_order = [sorted(pair, key=lambda t: t.scalar_type not in CODES) for pair in pairs]
    return [_table(pte, as_head, *pair) for pair in in_order if pair[0].scalar_type in CODES]


def _table(pte: PTEFile, as_head: bool, *tensors: Any) -> tuple[Product, bytes, bytes]:
    """Of an embedding's codes and scales; as_head: pairs lie as in a product already."""
    rows, columns = tensors[0].sizes
    groups = tensors[1].sizes[1] if len(tensors[1].sizes) > 1 else 1
    codes, scales = (bytes(pte.program.constant_buffer[t.data_buffer_idx].storage) for t in tensors)
    # The storage of a small tensor is filled up.
    each = 4 if tensors[1].scalar_type == ScalarType.FLOAT else 2
    codes, scales = codes[: rows * columns], scales[: rows * groups * each]
    bits = CODES[tensors[0].scalar_type]
    if bits == 4 and not as_head:  # the only place in a .pte where the first of a pair lies in the high nibble
        codes = codes.translate(SWAPPED)
    return Product(rows, columns * 8 // bits, bits, groups, "", ""), codes, scales


def _parsed(backend: str, found: Sequence[bytes]) -> list[dict[str, Any]]:
    """Graphs of one backend as the JSON that flatc makes of them, all in one run of it."""
    if not found:
        return []
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{i}.bin" for i in range(len(found))]
        for file, blob in zip(files, found, strict=True):
            file.write_bytes(_graph_bytes(backend, blob))
        options = ["--json", "--defaults-json", "--strict-json", "-o", name, str(BACKENDS / SCHEMAS[backend])]
        _run_flatc([*options, "--", *map(str, files)])
        texts = [file.with_suffix(".json").read_text(encoding="utf-8") for file in files]
        read = [json.loads(UNBOUNDED.sub(r"\1Infinity", text)) for text in texts]
    return [{"xnodes": graph["chain"], **graph} if backend == VULKAN else graph for graph in read]


def _graph_bytes(backend: str, blob: bytes) -> bytes:
    """The graph in a delegate's bytes, behind a header that says where."""
    if backend == XNNPACK:
        header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
        return blob[header.flatbuffer_offset :][: header.flatbuffer_size]
    if blob[4:8] != VULKAN_MAGIC:
        raise ValueError(f"a delegate of Vulkan's begins with {blob[:8]!r}")
    begin, size = struct.unpack_from("<II", blob, 10)
    return blob[begin:][:size]


def products_of(graph: dict[str, Any]) -> Iterator[Product]:
    """Quantized matrix products of one graph, in order."""
    if "chain" in graph:
        yield from _vulkan_products(graph)
        return
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


def _vulkan_products(graph: dict[str, Any]) -> Iterator[Product]:
    """Codes are stored (out, in // 2), scales (groups, out)."""
    values, stored = [value["value"] for value in graph["values"]], graph["constants"]
    for call in graph["chain"]:
        if call["name"] != VULKAN_LINEAR:
            continue
        codes, scales = values[call["args"][3]], values[call["args"][5]]
        yield Product(
            out=codes["dims"][0],
            width=codes["dims"][1] * 2,
            bits=4,
            groups=scales["dims"][0],
            codes_key=stored[codes["constant_id"]]["named_key"],
            scales_key=stored[scales["constant_id"]]["named_key"],
        )
