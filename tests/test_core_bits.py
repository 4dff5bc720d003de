"""Bit fields against a string of bits, which is how the specification draws them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import seeds

from qformat import bits


def by_hand(codes: list[int], width: int) -> list[int]:
    """The codes' bits, lowest first, one after the other, cut into bytes."""
    string = "".join(f"{code:0{width}b}"[::-1] for code in codes)
    string += "0" * (-len(string) % 8)
    return [int(string[i : i + 8][::-1], 2) for i in range(0, len(string), 8)]


def test_the_example_of_the_specification() -> None:
    assert bits.pack(np.array([5, 2, 7]), 3).tolist() == [0b11_010_101, 0b1]


@given(st.integers(1, 16), st.integers(1, 40), seeds)
def test_pack_is_the_string_of_bits(width: int, count: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 2**width, count)
    packed = bits.pack(codes, width)
    assert packed.dtype == np.uint8 and len(packed) == bits.row_bytes(count, width)
    assert packed.tolist() == by_hand(codes.tolist(), width)


@given(st.integers(1, 16), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 40), seeds)
def test_unpack_undoes_pack(width: int, lead: list[int], count: int, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 2**width, (*lead, count))
    packed = bits.pack(codes, width)
    assert packed.shape == (*lead, bits.row_bytes(count, width))
    unpacked = bits.unpack(packed, width, count)
    assert unpacked.dtype == (np.uint8 if width <= 8 else np.uint16)
    np.testing.assert_array_equal(unpacked, codes)


@given(st.integers(1, 16), st.integers(1, 40), seeds)
def test_bits_behind_the_last_code_do_not_matter(width: int, count: int, rng: np.random.Generator) -> None:
    random = rng.integers(0, 256, bits.row_bytes(count, width), np.uint8)
    codes = bits.unpack(random, width, count)
    used = np.packbits(np.arange(8 * len(random)) < width * count, bitorder="little")
    np.testing.assert_array_equal(bits.pack(codes, width), random & used)


@pytest.mark.parametrize("width", range(1, 17))
def test_each_row_starts_at_a_byte(width: int) -> None:
    codes = np.full((3, 5), 2**width - 1)
    rows = bits.pack(codes, width)
    for row in rows:
        np.testing.assert_array_equal(row, bits.pack(codes[0], width))
