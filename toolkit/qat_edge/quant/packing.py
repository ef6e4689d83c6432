"""Two int4 codes or four int2 codes in one byte, four bytes in one word: pack and unpack.

    byte k of a row = (q[2k] + 8) | (q[2k + 1] + 8) << 4

Rows are packed one after another, low nibble first, each code as code + 8, so that the unsigned values are 0 to 15.
XNNPACK and ONNX Runtime's MatMulNBits store weights like this. Two other layouts follow from it: ExecuTorch's embedding
takes the high nibble first (`high_first`), and two's complement nibbles are `packed ^ 0x88`.

    byte k of a row = u[4k] | u[4k + 1] << 2 | u[4k + 2] << 4 | u[4k + 3] << 6

holds the positions u of 2-bit codes among their levels, 0 for the least, as MatMulNBits stores them. `codebook` has the
codes that the positions stand for.

compressed-tensors stores codes of 4 and 8 bits in words of 32, as code + 8 and code + 128, the first in the lowest
bits: the bytes above, four to a word. A row is filled up with zero bits.

All functions take numpy arrays. For a CPU tensor pass `tensor.numpy()`, which copies nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD_BYTES = 4  # of an int32
SIGN_BIT = 0x80  # of an int8; flipping it adds 128
OFFSET = 8  # added to a code, -8 to 7, so that it is stored as 0 to 15
LOW_NIBBLE = 0x0F


def pack_int4(codes: NDArray[Any], *, high_first: bool = False) -> NDArray[np.uint8]:
    """Pack pairs of neighboring codes into bytes.

    Args:
        codes: Whole numbers from -8 to 7, shape (..., width), of any integer dtype.
        high_first: Store the first code of a pair in the high nibble instead of the low one.

    Returns:
        uint8, shape (..., width // 2).

    Raises:
        ValueError: The width is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"int4 codes are packed in pairs, but a row has {codes.shape[-1]} of them")
    # Every code fits int8, in which the sum with the offset does not overflow.
    unsigned = (codes.astype(np.int8) + np.int8(OFFSET)).astype(np.uint8)
    first, second = unsigned[..., 0::2], unsigned[..., 1::2]
    low, high = (second, first) if high_first else (first, second)
    return low | high << np.uint8(4)


def unpack_int4(packed: NDArray[np.uint8], *, high_first: bool = False) -> NDArray[np.int8]:
    """Undo `pack_int4`: uint8 (..., width // 2) to int8 codes (..., width)."""
    low, high = packed & LOW_NIBBLE, packed >> 4
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    codes[..., 0::2] = high if high_first else low
    codes[..., 1::2] = low if high_first else high
    codes -= OFFSET
    return codes


def pack_int2(positions: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack fours of neighboring positions, 0 to 3, into bytes, the first in the lowest bits.

    Args:
        positions: uint8, shape (..., width).

    Returns:
        uint8, shape (..., width // 4).

    Raises:
        ValueError: The width is no multiple of four.
    """
    if positions.shape[-1] % 4:
        raise ValueError(f"int2 codes are packed in fours, but a row has {positions.shape[-1]} of them")
    packed = np.zeros((*positions.shape[:-1], positions.shape[-1] // 4), np.uint8)
    for index in range(4):
        packed |= positions[..., index::4] << np.uint8(2 * index)
    return packed


def unpack_int2(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo `pack_int2`: uint8 (..., width // 4) to positions (..., width)."""
    positions = np.empty((*packed.shape[:-1], packed.shape[-1] * 4), np.uint8)
    for index in range(4):
        positions[..., index::4] = packed >> np.uint8(2 * index) & np.uint8(3)
    return positions


def pack_int32(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Pack codes of 4 or 8 bits into words of 32.

    Args:
        codes: int8, shape (rows, width).
        bits: Of a code.

    Returns:
        int32, shape (rows, words).

    Raises:
        ValueError: The width is odd, at 4 bits.
    """
    octets = pack_int4(codes) if bits == 4 else codes.view(np.uint8) ^ np.uint8(SIGN_BIT)
    octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % WORD_BYTES)))
    return np.ascontiguousarray(octets).view("<i4").astype(np.int32, copy=False)


def unpack_int32(packed: NDArray[np.int32], bits: int, width: int) -> NDArray[np.int8]:
    """Undo `pack_int32`: int32 (rows, words) to int8 codes (rows, width)."""
    octets = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    codes = unpack_int4(octets) if bits == 4 else (octets ^ np.uint8(SIGN_BIT)).view(np.int8)
    return np.ascontiguousarray(codes[:, :width])
