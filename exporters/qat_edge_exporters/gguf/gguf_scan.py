"""Read the metadata and the table of tensors of a GGUF file of any tool, and find tensors that are damaged.

`gguf_file` reads files of ours, with three types of tensors; here every type that the `gguf` package knows is measured.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.manifest import library_version
from qat_edge.readers import counted
from qat_edge_exporters import file_diagnosis
from qat_edge_exporters.file_diagnosis import LARGEST_FACTOR
from qat_edge_exporters.gguf import gguf_file
from qat_edge_exporters.gguf.gguf_file import ALIGNMENT, ARCHITECTURE, MAGIC, Cursor

VERSIONS = (2, 3)  # that llama.cpp reads; they differ in nothing that is read here
MOST_ALIGNMENT = 2**20
DAMAGED = "Copy or download the file again."
HALF_EXPONENT = 0x7C00  # bits of a float16 that are all set in infinities and NaN
EXPONENT_BIAS = 127  # of the scales of MXFP4, which are powers of two in one byte
FREQUENCIES = "rope_"  # begins names of tensors that divide frequencies: 1e30 and more turn a rotation off
CHUNK = 2**18  # blocks whose scales are read at once
# Offsets of the float16 scales and minima in a block, from gguf's own unpacking (gguf 0.19, `quants.py`).
SCALES = {
    "F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class ScannedTensor:
    """An entry of the table of tensors.

    Attributes:
        name: in the file.
        shape: rows first, as in torch.
        kind: ggml's name of its type; "type N" for one that gguf does not know.
        begin: its first byte in the file.
        size_bytes: by shape and type; None for a type that gguf does not know, and a row of no whole blocks.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    begin: int
    size_bytes: int | None


@dataclass(frozen=True)
class ScannedFile:
    """A file without its tensors' values.

    Attributes:
        path: of the file.
        version: of the format.
        metadata: values by key.
        tensors: in the order of the file.
        data: all bytes, memory-mapped.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: list[ScannedTensor]
    data: NDArray[np.uint8]

    def get(self, key: str) -> Any:
        """Return the value of a key of the architecture, such as "context_length"; None without it."""
        return self.metadata.get(f"{self.metadata.get(ARCHITECTURE)}.{key}")

    def tensor(self, name: str) -> ScannedTensor | None:
        """Return a tensor by its name."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def scan(path: Path) -> ScannedFile:
    """Read a file's metadata and its table of tensors.

    Raises:
        ArtifactError: it is missing, no GGUF file, or ends inside of the metadata.
    """
    file_diagnosis.require_file(path)
    size = path.stat().st_size
    if size < len(MAGIC):
        raise ArtifactError(f"{path}: no GGUF file: it has {size} bytes. {DAMAGED}")
    data = np.memmap(path, np.uint8, "r")
    if bytes(data[: len(MAGIC)]) != MAGIC:
        begin = bytes(data[: len(MAGIC)])
        raise ArtifactError(f"{path}: no GGUF file: it begins with {begin!r}, not with {MAGIC!r}. {DAMAGED}")
    try:
        return _scan(path, data)
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        reason = readers.shorten(" ".join(str(error).split()), 200)
        raise ArtifactError(f"{path}: a damaged GGUF file of {size} bytes: {reason}. {DAMAGED}") from error


def _scan(path: Path, data: NDArray[np.uint8]) -> ScannedFile:
    cursor = Cursor(data)
    cursor.take(len(MAGIC))
    version = cursor.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        other = "big-endian" if swapped in VERSIONS else f"of version {version}"
        raise ValueError(f"it is {other}, and llama.cpp reads versions 2 and 3 with the bytes of this machine's order")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    metadata, _ = gguf_file.read_metadata(cursor, keys)

    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT:
        raise ValueError(f"general.alignment is {readers.show(alignment)}")
    entries = [gguf_file.tensor_entry(cursor) for _ in range(tensors)]
    start = -(-cursor.position // alignment) * alignment
    found = [
        ScannedTensor(readers.shorten(name), shape, _type_name(number), start + offset, _size(shape, number))
        for name, shape, number, offset in entries
    ]
    return ScannedFile(path, version, metadata, found, data)


def _type_name(number: int) -> str:
    try:
        return str(gguf.GGMLQuantizationType(number).name)
    except ValueError:
        return f"type {number}"


def _size(shape: tuple[int, ...], number: int) -> int | None:
    """Return the bytes of a tensor; None for a type that gguf does not know, and rows of no whole blocks."""
    try:
        width, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    except (ValueError, KeyError):
        return None
    if shape and shape[-1] % width:
        return None
    return int(math.prod(shape) // width * size_bytes)


def tensor_faults(file: ScannedFile) -> list[str]:
    """Return tensors that are outside of the file, or have no size, one sentence each."""
    name, size = file.path.name, len(file.data)
    unknown = [
        f"{name}: the tensor {tensor.name} has {tensor.kind} and the shape {list(tensor.shape)}, which gguf "
        f"{library_version('gguf')} cannot measure: it needs a newer version, or the file is damaged."
        for tensor in file.tensors
        if tensor.size_bytes is None
    ]
    outside = [
        f"{name}: the tensor {tensor.name} should be at bytes {tensor.begin} to {tensor.begin + tensor.size_bytes}, "
        f"but the file has {size}. {DAMAGED}"
        for tensor in file.tensors
        if tensor.size_bytes is not None and tensor.begin + tensor.size_bytes > size
    ]
    counts = Counter(tensor.name for tensor in file.tensors)
    twice = [f"{name}: the tensor {each} is there twice. {DAMAGED}" for each, count in counts.items() if count > 1]
    return [*file_diagnosis.few(unknown), *file_diagnosis.few(outside), *file_diagnosis.few(twice)]


def value_faults(file: ScannedFile) -> list[str]:
    """Return tensors with scales, or values, that are no finite numbers, one sentence each."""
    return file_diagnosis.few(_value_faults(file))


def _value_faults(file: ScannedFile) -> Iterator[str]:
    for tensor in file.tensors:
        if tensor.size_bytes is None or tensor.begin + tensor.size_bytes > len(file.data):
            continue
        raw = file.data[tensor.begin : tensor.begin + tensor.size_bytes]
        where = f"{file.path.name}: the tensor {tensor.name} ({tensor.kind})"
        what = "value" if tensor.kind in ("F32", "F16", "BF16") else "scale"
        count = _count_not_finite(tensor, raw)
        if count:
            yield (
                f"{where} has {counted(count, f'{what} that is', f'{what}s that are')} infinite or no number: outputs "
                "become NaN. Quantize the model again, from weights that are finite."
            )
        count = 0 if tensor.name.startswith(FREQUENCIES) else _count_too_large(tensor, raw)
        if count:
            yield (
                f"{where} has {counted(count, what)} of more than {LARGEST_FACTOR:g}: products with them overflow "
                "float32. Quantize the model again, from weights that are right."
            )


def _count_not_finite(tensor: ScannedTensor, raw: NDArray[np.uint8]) -> int:
    """Return how many scales or values of a tensor are infinite or NaN; 0 for types that are not checked."""
    if tensor.kind == "F32":
        return sum(int((~np.isfinite(part)).sum()) for part in _parts(raw.view(np.uint8), 4, "<f4"))
    if tensor.kind == "BF16":
        return sum(int(((part & 0x7F80) == 0x7F80).sum()) for part in _parts(raw, 2, "<u2"))
    width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]][1]
    blocks, count = raw.reshape(-1, width), 0
    for offset in SCALES.get(tensor.kind, ()):
        for first in range(0, len(blocks), CHUNK):
            scales = np.ascontiguousarray(blocks[first : first + CHUNK, offset : offset + 2]).view("<u2")
            count += int(((scales & HALF_EXPONENT) == HALF_EXPONENT).sum())
    return count


def _count_too_large(tensor: ScannedTensor, raw: NDArray[np.uint8]) -> int:
    """Return how many finite scales or values are above LARGEST_FACTOR; float16 holds none."""
    if tensor.kind == "F32":
        parts = (np.abs(part) for part in _parts(raw, 4, "<f4"))
        return sum(int(((part > LARGEST_FACTOR) & (part < np.inf)).sum()) for part in parts)
    if tensor.kind == "BF16":  # the upper half of a float32
        parts = ((part & 0x7FFF).astype("<u4") << 16 for part in _parts(raw, 2, "<u2"))
        magnitudes = (part.view("<f4") for part in parts)
        return sum(int(((part > LARGEST_FACTOR) & (part < np.inf)).sum()) for part in magnitudes)
    if tensor.kind == "MXFP4":
        exponents = raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.MXFP4][1])[:, 0]
        return int((exponents > EXPONENT_BIAS + math.log2(LARGEST_FACTOR)).sum())
    return 0


def _parts(raw: NDArray[np.uint8], width: int, dtype: str) -> Iterator[NDArray[Any]]:
    """Yield the numbers of a tensor in parts, as copies: a tensor may begin at any byte."""
    step = CHUNK * width
    for first in range(0, len(raw), step):
        yield np.frombuffer(raw[first : first + step].tobytes(), dtype)
