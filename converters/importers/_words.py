"""Integers packed in 32-bit words, as the GPTQ family does: streams, bit planes, Marlin tiles, and zeros minus one.

A stream is qformat's own order of bits (:mod:`qformat.bits`), since the words are little-endian: code i takes the bits
[i * bits, (i + 1) * bits). Sizes along a packed axis are those of whole words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qformat import bits as fields
from qformat.dtypes import Array

from ._permute import BLOCK, numbers, permutation, permute

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # widths, low plane first; 2, 4 and 8 bits are a stream
ORDERS = {2: range(16), 4: (0, 4, 1, 5, 2, 6, 3, 7), 8: range(4)}  # AWQ: where in a word the code of each row lies
TILE = 16  # words in a cache line


def sizes(count: int, bits: int, planar: bool) -> set[int]:
    """Words that ``count`` codes may take: those of whole blocks, or as many as the bits of a stream need."""
    needed, whole = -(-count * bits // 32), -(-count // BLOCK) * bits
    return {whole} if planar else {needed, whole} if 32 % bits else {needed}


def unpack(words: Array, bits: int, count: int, planar: bool) -> Array:
    """int32 [rows, words] -> codes, uint8 [rows, count]."""
    codes = _joined(words.T, bits) if planar else np.ascontiguousarray(words).view(np.uint8)
    return fields.unpack(codes[:, : fields.row_bytes(count, bits)], bits, count)


def repack(words: Array, bits: int, count: int, planar: bool) -> tuple[Array, bool]:
    """int32 [words, columns], packed down the columns -> uint8 [columns, row bytes], qformat's codes of each column.

    And whether there is anything but zeros beyond the last of them.
    """
    codes = _joined(words, bits) if planar else transposed(words).view(np.uint8)
    byte, bit = divmod(count * bits, 8)
    beyond = codes[:, byte:].any() if bit == 0 else (codes[:, byte] >> bit).any() or codes[:, byte + 1 :].any()
    return codes[:, : fields.row_bytes(count, bits)], bool(beyond)


def _joined(words: Array, bits: int) -> Array:
    """int32 [words, columns], bit planes down the columns -> uint8 [columns, 4 * words], streams."""
    tops = np.cumsum([0, *PLANES[bits]])
    planes = [numbers(32 * bits)[32 * top : 32 * (top + width)] for top, width in zip(tops, PLANES[bits], strict=False)]
    rule = permutation(np.concatenate([plane.reshape(BLOCK, -1) for plane in planes], axis=1))
    out = np.empty(words.shape[::-1], np.uint32)
    for here in strips(len(words), bits):
        planar = words[here].reshape(-1, bits, words.shape[1])
        joined = np.empty_like(planar)
        permute(rule, planar.swapaxes(0, 1), joined.swapaxes(0, 1))
        transposed(joined.reshape(-1, words.shape[1]), out[:, here])
    return out.view(np.uint8)


def turned(words: Array, bits: int) -> Array:
    """AWQ's gemm, int32 [columns, words], each with codes of several rows -> uint8 [rows, row bytes], qformat's codes.

    ``bits``: those of ORDERS.
    """
    count = 32 // bits
    cols, width = words.shape
    lines = -(-cols // count)
    if cols % count:
        words = np.concatenate([words, np.zeros((lines * count - cols, width), words.dtype)])
    rule = permutation(numbers(count, count, bits)[:, ORDERS[bits]].swapaxes(0, 1))
    stored = words.reshape(lines, count, width)
    out = np.empty((width * count, lines), np.uint32)
    for here in strips(lines):
        crossed = np.empty((len(stored[here]), width, count), np.uint32)
        permute(rule, stored[here].swapaxes(0, 1), np.moveaxis(crossed, -1, 0))
        transposed(crossed.reshape(-1, width * count), out[:, here])
    return out.view(np.uint8)[:, : fields.row_bytes(cols, bits)]


def strips(rows: int, unit: int = 1) -> Iterator[slice]:
    """Rows of words, in whole units, a few cache lines of the transposed at a time."""
    step = -(-2 * TILE // unit) * unit
    return (slice(top, min(top + step, rows)) for top in range(0, rows, step))


def transposed(matrix: Array, out: Array | None = None) -> Array:
    """A copy of ``matrix.T``, a cache line at a time: a plain copy misses the cache on each word."""
    if out is None:
        out = np.empty(matrix.shape[::-1], matrix.dtype)
    tile = 4 * TILE // max(4, matrix.itemsize)
    for top in range(0, len(matrix), tile):
        out[:, top : top + tile] = matrix[top : top + tile].T
    return out


class Full(NamedTuple):
    """Whether zeros that were stored minus one have fields of 2**bits - 1, and what these say about their writer."""

    any: bool
    borrowed: bool  # some such field has a smaller one above it in its word: a subtraction borrowed from the next field


def full_fields(words: Array, bits: int) -> Full:
    """``words`` of zeros of 2, 4 or 8 bits."""
    unsigned, lowest = words.view(np.uint32), _ones(bits)
    found = np.full_like(unsigned, lowest)
    for shift in range(bits):
        found &= unsigned >> np.uint32(shift)
    bottom = found & (~found + np.uint32(1))
    to_the_top = lowest & (~bottom + np.uint32(1))  # every field from the lowest full one upward
    return Full(bool(found.any()), bool(((found != 0) & (found != to_the_top)).any()))


def add_one(words: Array, bits: int) -> Array:
    """1 added to every field of each word at once, carries and all: undoes a subtraction from whole words."""
    return (words.view(np.uint32) + _ones(bits)).view(np.int32)


def _ones(bits: int) -> np.uint32:
    return np.uint32(sum(1 << at for at in range(0, 32, bits)))


def in_order(codes: Array) -> Array:
    """AWQ's codes of 4 bits along the last axis in their own order."""
    return codes.reshape(-1, 8)[:, ORDERS[4]].reshape(codes.shape)


def gemv_fast_codes(words: Array) -> Array:
    """AWQ's gemv_fast, int16 [out / 4, in] -> qformat's codes, uint8 [out, in / 2]. Four rows a block, 64 columns a
    run.
    """
    blocks, runs = len(words), words.shape[1] // 64
    rule = permutation(numbers(4, 2, 4, 2, 4, 4).transpose(0, 1, 4, 2, 3, 5))  # row, half, then 32 columns
    source = words.view(np.uint32).reshape(blocks, runs, 32)
    out = np.empty((blocks, 4, runs, 8), np.uint32)
    permute(rule, np.moveaxis(source, -1, 0), out.transpose(1, 3, 0, 2))
    return out.view(np.uint8).reshape(4 * blocks, -1)


def marlin_codes(words: Array) -> Array:
    """Marlin's ``B``, int32 [in / 16, 2 * out] -> qformat's codes, uint8 [out, in / 2].

    A word holds what thread t of a tensor core does in a tile of 16 x 16: with r = t modulo 4 the rows 2 r, 2 r + 1 and
    these plus 8, of the columns t / 4 and that plus 8. Four tiles lie side by side.
    """
    tiles, runs = len(words), words.shape[1] // 128
    rule = permutation(numbers(4, 2, 2, 2, 4).transpose(2, 3, 0, 1, 4))  # pair of rows; one of it, column's 8, row's 8
    stored = words.reshape(tiles, runs, 8, 4, 4)  # ..., column, pair of rows, tile
    out = np.empty((64 * runs, tiles), np.uint64)
    for here in strips(tiles):
        plain = np.empty((len(stored[here]), runs, 4, 2, 8, 2), np.uint32)  # ..., tile, column's 8, column; row's 8
        permute(rule, stored[here].transpose(3, 0, 1, 2, 4), plain.transpose(3, 5, 0, 1, 4, 2))
        transposed(plain.view(np.uint64).reshape(-1, 64 * runs), out[:, here])
    return out.view(np.uint8)


def marlin_scales(stored: Array) -> Array:
    """Marlin's ``s`` [groups, out] in the order of columns."""
    if len(stored) > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    runs = stored.reshape(-1, len(order))
    plain = np.empty_like(runs)
    plain[:, order] = runs
    return plain.reshape(stored.shape)
