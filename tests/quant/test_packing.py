"""Packing of int4 and int2 codes: the documented layout, and that nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest

from qat_edge.quant.packing import pack_int2, pack_int4, unpack_int2, unpack_int4

EVERY_PAIR = np.array([(low, high) for low in range(-8, 8) for high in range(-8, 8)], np.int8)  # (256, 2)


def test_the_low_nibble_is_the_first_code_plus_eight() -> None:
    codes = np.array([[-8, 7, 0, -1]], np.int8)
    assert pack_int4(codes).tolist() == [[0xF0, 0x78]]
    assert pack_int4(codes, high_first=True).tolist() == [[0x0F, 0x87]]


@pytest.mark.parametrize("high_first", [False, True])
def test_every_pair_of_codes_has_a_byte_of_its_own_and_comes_back(high_first: bool) -> None:
    packed = pack_int4(EVERY_PAIR, high_first=high_first)
    assert packed.dtype == np.uint8 and packed.shape == (256, 1) and len(np.unique(packed)) == 256
    unpacked = unpack_int4(packed, high_first=high_first)
    assert unpacked.dtype == np.int8 and np.array_equal(unpacked, EVERY_PAIR)


def test_twos_complement_nibbles_are_one_xor_away() -> None:
    nibbles = (EVERY_PAIR & 0x0F).astype(np.uint8)
    assert np.array_equal(pack_int4(EVERY_PAIR) ^ 0x88, nibbles[:, :1] | nibbles[:, 1:] << 4)


def test_leading_dimensions_and_wider_integers_are_kept_apart() -> None:
    codes = np.arange(-8, 8, dtype=np.int64).reshape(2, 2, 4)
    packed = pack_int4(codes)
    assert packed.shape == (2, 2, 2) and np.array_equal(unpack_int4(packed), codes)


def test_an_odd_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row has 3 of them"):
        pack_int4(np.zeros((2, 3), np.int8))


def test_the_first_of_four_positions_has_the_lowest_bits() -> None:
    assert pack_int2(np.array([[0, 1, 2, 3], [3, 0, 0, 0]], np.uint8)).tolist() == [[0b11100100], [0b11]]


def test_every_four_positions_have_a_byte_of_their_own_and_come_back() -> None:
    every = np.stack(np.meshgrid(*[np.arange(4, dtype=np.uint8)] * 4), axis=-1).reshape(256, 4)
    packed = pack_int2(every)
    assert packed.dtype == np.uint8 and packed.shape == (256, 1) and len(np.unique(packed)) == 256
    assert np.array_equal(unpack_int2(packed), every) and np.array_equal(
        unpack_int2(packed.reshape(2, 128)), every.reshape(2, 512)
    )


def test_a_width_that_is_no_multiple_of_four_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row has 6 of them"):
        pack_int2(np.zeros((2, 6), np.uint8))
