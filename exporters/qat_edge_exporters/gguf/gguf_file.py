"""Read and write a GGUF file: metadata by key, then tensors at aligned offsets, little-endian.

The `gguf` package writes it. Reading is separate code, because a file may come from anyone and the package's reader
follows counts beyond the end of the file: here every length is checked against the size of the file first.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge_exporters.gguf.gguf_blocks import Q4_0, Q8_0, BlockType

MODEL_FILE = "model.gguf"
ARCHITECTURE = "general.architecture"  # key of the metadata
AGAIN = "Export again, or copy the folder again if it was copied."
VERSION = 3
ALIGNMENT = 32  # bytes, of tensors; the format's default
MAGIC = b"GGUF"
F32 = 0  # type number of float32 tensors
MAX_DIMENSIONS = 4  # of ggml
LENGTH_BYTES = 8  # of the length in front of a text
# Type numbers of values of a fixed size -> their codes in `struct`.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BLOCK_TYPES = {block.number: block for block in (Q4_0, Q8_0)}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        shape: rows first, as in torch; of the unpacked values.
        block: type of its blocks; None for float32.
        data: float32 of `shape`, or bytes (rows, bytes of a row).
    """

    name: str
    shape: tuple[int, ...]
    block: BlockType | None
    data: NDArray[Any]


@dataclass(frozen=True)
class GgufContents:
    """Metadata by key, tensors by name, and the bytes that all `tokenizer.` keys take."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    tokenizer_bytes: int


def write(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Any, BlockType | None]]
) -> None:
    """Write a file.

    Args:
        path: of the file.
        architecture: llama.cpp's name of it.
        metadata: bool, int, float, str and lists of one of them by key. Numbers are unsigned 32-bit integers or
            float32, integers in lists signed.
        tensors: by name, float32 or bytes of blocks, and the type of the blocks.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kind = _value_type(value)
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    for name, (values, block) in tensors.items():
        raw = None if block is None else gguf.GGMLQuantizationType(block.number)
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _value_type(value: Any) -> gguf.GGUFValueType:
    """Return the type that a value of metadata is stored as."""
    types = gguf.GGUFValueType
    by_class = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    return by_class[type(value)]


def read(path: Path) -> GgufContents:
    """Read a file; its tensors are memory-mapped.

    Raises:
        ArtifactError: it is missing, truncated or garbled, or has a type of tensor that exports do not have.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: missing. {AGAIN}")
    if path.stat().st_size < len(MAGIC):
        raise ArtifactError(f"{path}: no GGUF file, it has {path.stat().st_size} bytes. {AGAIN}")
    data = np.memmap(path, np.uint8, "r")
    try:
        return _read(data)
    except (ValueError, struct.error, KeyError, OverflowError) as error:
        reason = readers.shorten(" ".join(str(error).split()), 200)
        raise ArtifactError(f"{path}: cannot be read ({reason}). {AGAIN}") from error


class Cursor:
    """Position in a file, from which values are taken one after another."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = memoryview(data.data)  # slices of it are made faster than those of an array
        self.position = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes.

        Raises:
            ValueError: the file ends before.
        """
        end = self.position + count
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, before byte {end}")
        taken = bytes(self.data[self.position : end])
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        """Return the next number. code: of `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """Return the next text."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return the next value of metadata."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * width)))
        if inner != STRING or count > len(self.data) // LENGTH_BYTES:
            raise ValueError(f"a list of {count} values of type {inner}")
        return [self.text() for _ in range(count)]


def _read(data: NDArray[np.uint8]) -> GgufContents:
    cursor = Cursor(data)
    if cursor.take(len(MAGIC)) != MAGIC or cursor.number("I") != VERSION:
        raise ValueError(f"it is no GGUF file of version {VERSION}")
    tensors, keys = cursor.number("Q"), cursor.number("Q")

    metadata, tokenizer_bytes = read_metadata(cursor, keys)
    if metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
        raise ValueError("tensors at another alignment than exports have")

    entries = [tensor_entry(cursor) for _ in range(tensors)]
    start = -(-cursor.position // ALIGNMENT) * ALIGNMENT
    found: dict[str, StoredTensor] = {}
    for name, shape, number, offset in entries:
        if name in found:
            raise ValueError(f"the tensor {readers.shorten(name)} twice")
        found[name] = _stored(data, name, shape, number, start + offset)
    return GgufContents(metadata, found, tokenizer_bytes)


def read_metadata(cursor: Cursor, keys: int) -> tuple[dict[str, Any], int]:
    """Return the values of so many keys, and the bytes that those of the tokenizer take.

    Raises:
        ValueError: the file ends before, a key is there twice, or a value has an unknown type.
    """
    metadata: dict[str, Any] = {}
    tokenizer_bytes = 0
    for _ in range(keys):
        begin, key = cursor.position, cursor.text()
        if key in metadata:
            raise ValueError(f"the key {readers.shorten(key)} twice")
        metadata[key] = cursor.value(cursor.number("I"))
        tokenizer_bytes += cursor.position - begin if key.startswith("tokenizer.") else 0
    return metadata, tokenizer_bytes


def tensor_entry(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return name, shape, type number and offset of the next tensor."""
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"the tensor {readers.shorten(name)} with {dimensions} dimensions")
    # The file has the fastest-moving dimension first.
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _stored(data: NDArray[np.uint8], name: str, shape: tuple[int, ...], number: int, begin: int) -> StoredTensor:
    """Return one tensor of a file.

    Raises:
        ValueError: it has another type than exports have, or is outside of the file.
    """
    shown, count = readers.shorten(name), math.prod(shape)
    block = BLOCK_TYPES.get(number)
    if block is None and number != F32:
        raise ValueError(f"the tensor {shown} of type {number}, where exports have F32, Q4_0 and Q8_0")
    if block is not None and (len(shape) != 2 or shape[1] % block.width):
        raise ValueError(f"the tensor {shown} of shape {shape} in blocks of {block.width}")
    size = count * 4 if block is None else count // block.width * block.size_bytes
    if begin + size > len(data):
        raise ValueError(f"the tensor {shown} should be at bytes {begin} to {begin + size}, it has {len(data)}")
    raw = np.asarray(data[begin : begin + size])
    return StoredTensor(
        name, shape, block, raw.view("<f4").reshape(shape) if block is None else raw.reshape(shape[0], -1)
    )


def same_values(stored: Mapping[str, Any], expected: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return those of `keys` under which two sets of metadata differ; numbers are compared as float32 holds them."""
    return [key for key in keys if not _is_same(stored.get(key), expected.get(key))]


def _is_same(stored: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(stored, float) and np.float32(stored) == np.float32(expected)
    return type(stored) is type(expected) and bool(stored == expected)
