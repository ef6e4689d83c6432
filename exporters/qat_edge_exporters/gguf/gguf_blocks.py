"""Pack codes and scales into ggml's blocks of 32 weights, and unpack them. Nothing is rounded here.

    Q4_0   18 bytes: scale as float16, then 16 bytes, byte k = (q[k] + 8) | (q[k + 16] + 8) << 4
    Q8_0   34 bytes: scale as float16, then 32 codes as int8

Both stand for scale * q. A group of 64 or 128 weights, or a whole row, becomes several blocks with one scale.

Layout: https://github.com/ggml-org/llama.cpp/blob/b4882/ggml/src/ggml-common.h
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qat_edge.errors import ExportError
from qat_edge.quant.packing import LOW_NIBBLE, OFFSET
from qat_edge.readers import counted

WIDTH = 32  # weights of a block
SCALE_BYTES = 2
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        name: ggml's.
        number: of the type in a file.
        bits: of a code.
        size_bytes: of a block.
        width: weights of a block.
    """

    name: str
    number: int
    bits: int
    size_bytes: int
    width: int = WIDTH


Q4_0 = BlockType("Q4_0", 2, 4, SCALE_BYTES + WIDTH // 2)
Q8_0 = BlockType("Q8_0", 8, 8, SCALE_BYTES + WIDTH)
BY_BITS = {block.bits: block for block in (Q4_0, Q8_0)}


def require_float16(name: str, scales: NDArray[np.float32]) -> None:
    """Require scales that float16, in which blocks store them, holds exactly.

    Raises:
        ExportError: names the matrix and a scale that it does not hold.
    """
    with np.errstate(over="ignore"):
        inexact = np.argwhere(scales.astype(np.float16).astype(np.float32) != scales)
    if len(inexact):
        row, group = inexact[0]
        value = float(scales[row, group])
        limit = f"more than {LARGEST:g}" if value > LARGEST else "too small for all of its digits"
        raise ExportError(
            f"gguf: {name} has {counted(len(inexact), 'scale')} that a GGUF file cannot hold, first in row {row}, "
            f"group {group}: {value:g} is {limit} in float16. Export to another --target; a run trained anew may not "
            "have such scales."
        )


def pack(codes: NDArray[np.int8], scales: NDArray[np.float32], block: BlockType) -> NDArray[np.uint8]:
    """Pack a matrix.

    Args:
        codes: shape (out, in), `in` a multiple of 32.
        scales: shape (out, groups), each a float16 number.
        block: type of the blocks.

    Returns:
        uint8, shape (out, in // 32 * bytes of a block).
    """
    rows, blocks = codes.shape[0], codes.shape[1] // WIDTH
    each = np.repeat(scales, blocks // scales.shape[1], axis=1).astype("<f2")
    packed = np.empty((rows, blocks, block.size_bytes), np.uint8)
    packed[:, :, :SCALE_BYTES] = each.view(np.uint8).reshape(rows, blocks, SCALE_BYTES)
    grouped = codes.reshape(rows, blocks, WIDTH)
    if block.bits == 8:
        packed[:, :, SCALE_BYTES:] = grouped.view(np.uint8)
    else:
        unsigned = (grouped + np.int8(OFFSET)).view(np.uint8)
        packed[:, :, SCALE_BYTES:] = unsigned[:, :, : WIDTH // 2] | unsigned[:, :, WIDTH // 2 :] << np.uint8(4)
    return packed.reshape(rows, -1)


def unpack(packed: NDArray[np.uint8], block: BlockType) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Undo `pack`: return codes, shape (out, in), and the scale of each block, float32 (out, in // 32)."""
    rows = packed.shape[0]
    blocks = packed.reshape(rows, -1, block.size_bytes)
    scales = np.ascontiguousarray(blocks[:, :, :SCALE_BYTES]).view("<f2")[..., 0].astype(np.float32)
    stored = np.ascontiguousarray(blocks[:, :, SCALE_BYTES:])
    if block.bits == 8:
        return stored.view(np.int8).reshape(rows, -1), scales
    unsigned = np.concatenate([stored & LOW_NIBBLE, stored >> np.uint8(4)], axis=-1)
    return (unsigned.view(np.int8) - np.int8(OFFSET)).reshape(rows, -1), scales
