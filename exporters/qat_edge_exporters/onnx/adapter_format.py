"""LoRA adapter of an ONNX folder as a file of its own, which any runtime takes next to the base.

The format is onnxruntime's, a flatbuffer (`AdapterFormat`, `LoraAdapter`; onnxruntime 1.31):
https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/lora/adapter_format/adapter_schema.fbs

    Adapter     0 format_version: int32   1 adapter_version: int32   2 model_version: int32   3 parameters: [Parameter]
    Parameter   0 name: string   1 dims: [int64]   2 data_type: int32   3 raw_data: [uint8]

onnxruntime writes it. It is read here without onnxruntime, because the file may come from anyone: every position and
size is checked. Equal parameters give equal bytes, in whatever order they are given.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat_edge import readers
from qat_edge.errors import ArtifactError, ExportError

IDENTIFIER = b"TORT"  # at byte 4
FORMAT_VERSION = 1
VERSION = 1  # of adapter and model; onnxruntime compares neither
FLOAT = 1  # data_type of float32, as in ONNX
MOST_BYTES = 2**31 - 2**20  # positions in a flatbuffer are int32
DIMENSIONS = 2
LONGEST_NAME = 1000  # bytes; names of a hostile file could overlap
AGAIN = "Export again, or copy the file again if it was copied."

Parameters = Mapping[str, NDArray[np.float32]]


def write(path: Path, parameters: Parameters) -> None:
    """Write float32 matrices by name of the graph's input.

    Raises:
        ExportError: they are more than the format holds, or the file cannot be written.
    """
    size = sum(values.nbytes for values in parameters.values())
    if size > MOST_BYTES:
        raise ExportError(
            f"{path}: the adapter has {size / 1e6:.0f} MB, and the format holds {MOST_BYTES / 1e6:.0f} MB. Train it "
            "with a lower --lora-rank, or leave this target out with --target executorch."
        )

    # Only an export with an adapter needs the runtime.
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    # The values of onnxruntime do not own their memory, so the arrays live until the file is written.
    arrays = {name: np.ascontiguousarray(parameters[name], np.float32) for name in sorted(parameters)}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(VERSION)
    adapter.set_model_version(VERSION)
    adapter.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(each) for name, each in arrays.items()})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:
        raise ExportError(f"{path}: cannot be written ({readers.shorten(error)}). Is the disk full?") from error


def read(path: Path) -> dict[str, NDArray[np.float32]]:
    """Read the matrices by name. They are memory-mapped, and read-only.

    Raises:
        ArtifactError: the file is missing, truncated or garbled, or holds something else than float32 matrices.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: missing. {AGAIN}")
    try:
        return _parameters(_Buffer.load(path))
    except (struct.error, ValueError, IndexError) as error:
        raise ArtifactError(f"{path}: no readable adapter of onnxruntime ({error}). {AGAIN}") from error


@dataclass(frozen=True)
class _Buffer:
    """Bytes of a flatbuffer; every access outside of them raises ValueError."""

    data: NDArray[np.uint8]

    @classmethod
    def load(cls, path: Path) -> _Buffer:
        """Map a file, which may not be empty."""
        if not path.stat().st_size:
            raise ValueError("it is empty")
        return cls(np.asarray(np.memmap(path, np.uint8, "r")))

    def number(self, format: str, position: int) -> int:
        """Return the integer at a position. format: of `struct`, little-endian."""
        data = self.slice(position, struct.calcsize(f"<{format}"))
        return int(struct.unpack(f"<{format}", data.tobytes())[0])

    def slice(self, begin: int, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes from a position on."""
        if begin < 0 or size < 0 or begin + size > len(self.data):
            raise ValueError(f"bytes {begin} to {begin + size} of {len(self.data)}")
        return self.data[begin : begin + size]

    def follow(self, position: int) -> int:
        """Return the position that the offset at `position` leads to."""
        return position + self.number("I", position)

    def field(self, table: int, index: int) -> int | None:
        """Return the position of a table's field; None where the table has its default value."""
        entries = table - self.number("i", table)
        if 4 + 2 * index >= self.number("H", entries):
            return None
        offset = self.number("H", entries + 4 + 2 * index)
        return table + offset if offset else None

    def integer(self, table: int, index: int) -> int:
        """Return a field with an int32; its default is 0."""
        position = self.field(table, index)
        return 0 if position is None else self.number("i", position)

    def vector(self, table: int, index: int, item_bytes: int) -> NDArray[np.uint8]:
        """Return the bytes of a field with a vector; empty where there is none."""
        position = self.field(table, index)
        if position is None:
            return self.data[:0]
        begin = self.follow(position)
        return self.slice(begin + 4, self.number("I", begin) * item_bytes)


def _parameters(buffer: _Buffer) -> dict[str, NDArray[np.float32]]:
    root = buffer.follow(0)
    version = buffer.integer(root, 0)
    if buffer.slice(4, 4).tobytes() != IDENTIFIER or version != FORMAT_VERSION:
        raise ValueError(f"no '{IDENTIFIER.decode()}' file of format {FORMAT_VERSION}")

    found: dict[str, NDArray[np.float32]] = {}
    position = buffer.field(root, 3)
    vector = buffer.follow(position) if position is not None else None
    for index in range(buffer.number("I", vector) if vector is not None else 0):
        assert vector is not None
        table = buffer.follow(vector + 4 + 4 * index)
        name = buffer.vector(table, 0, 1)[:LONGEST_NAME].tobytes().decode(errors="replace")
        if name in found:
            raise ValueError(f"'{readers.shorten(name)}' is there twice")
        found[name] = _matrix(buffer, table, name)
    return found


def _matrix(buffer: _Buffer, table: int, name: str) -> NDArray[np.float32]:
    """Return the matrix of one parameter."""
    shape = buffer.vector(table, 1, 8).view("<i8").tolist()
    values, kind = buffer.vector(table, 3, 1), buffer.integer(table, 2)
    if kind != FLOAT or len(shape) != DIMENSIONS:
        raise ValueError(f"'{readers.shorten(name)}' is no float32 matrix")
    if min(shape) < 0 or math.prod(shape) * 4 != len(values):
        raise ValueError(f"'{readers.shorten(name)}' has {len(values)} bytes for a shape of {tuple(shape)}")
    matrix: NDArray[Any] = values.view("<f4").reshape(shape)
    return matrix
