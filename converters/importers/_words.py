"""Integers packed in 32-bit words, as the GPTQ family does: streams, bit planes, Marlin tiles, and zeros minus one.

A stream is qformat's own order of bits (:mod:`qformat.bits`), since the words are little-endian: code i takes the bits
[i * bits, (i + 1) * bits). Sizes along a packed axis are those of whole words.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from qformat import bits as fields
from qformat.dtypes import Array

BLOCK = 32  # codes of b bits fill exactly b words, whatever b is
CHUNK = 1 << 12  # blocks whose planes are joined at a time: stays in the cache
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # widths, low plane first; 2, 4 and 8 bits are a stream


def sizes(count: int, bits: int, planar: bool) -> set[int]:
    """Words that ``count`` codes may take: those of whole blocks, or as many as the bits of a stream need."""
    needed, whole = -(-count * bits // 32), -(-count // BLOCK) * bits
    return {whole} if planar else {needed, whole} if 32 % bits else {needed}


def unpack(words: Array, bits: int, count: int, planar: bool) -> Array:
    """int32 [rows, words] -> codes, uint8 [rows, count]."""
    codes = _stream(np.ascontiguousarray(words), bits, planar)
    return fields.unpack(codes[:, : fields.row_bytes(count, bits)], bits, count)


def repack(words: Array, bits: int, count: int, planar: bool) -> tuple[Array, bool]:
    """int32 [words, columns], packed down the columns -> uint8 [columns, row bytes], qformat's codes of each column.

    And whether there is anything but zeros beyond the last of them.
    """
    codes = _stream(transposed(words), bits, planar)
    byte, bit = divmod(count * bits, 8)
    beyond = codes[:, byte:].any() if bit == 0 else (codes[:, byte] >> bit).any() or codes[:, byte + 1 :].any()
    return codes[:, : fields.row_bytes(count, bits)], bool(beyond)


def _stream(words: Array, bits: int, planar: bool) -> Array:
    """int32 [rows, words] -> uint8 [rows, 4 * words]: a stream as it is, planes brought together."""
    if not planar:
        return words.view(np.uint8)
    blocks = words.view(np.uint8).reshape(-1, 4 * bits)
    out = np.empty((len(blocks), BLOCK // 8, bits), np.uint8)
    for start in range(0, len(blocks), CHUNK):
        out[start : start + CHUNK] = _joined(blocks[start : start + CHUNK], bits)
    return out.reshape(len(words), -1)


def _joined(blocks: Array, bits: int) -> Array:
    """Planes of 32 codes, uint8 [blocks, 4 * bits] -> streams of 8 codes, uint8 [blocks, 4, bits]."""
    eight = np.zeros((len(blocks), BLOCK // 8), np.uint64)
    start = shift = 0
    for width in PLANES[bits]:
        plane = blocks[:, start : start + 4 * width].reshape(*eight.shape, width)
        for byte in range(width):
            eight |= _spread(width, bits)[plane[..., byte]] << np.uint64(shift + byte * (8 // width) * bits)
        start, shift = start + 4 * width, shift + width
    return eight.view(np.uint8).reshape(*eight.shape, 8)[..., :bits]


@functools.cache
def _spread(width: int, bits: int) -> Array:
    """For each byte of a plane, its fields of ``width`` bits set ``bits`` apart: uint64 [256]."""
    byte, mask = np.arange(256, dtype=np.uint64), np.uint64((1 << width) - 1)
    fields_apart = [(byte >> np.uint64(k * width) & mask) << np.uint64(k * bits) for k in range(8 // width)]
    out: Array = np.bitwise_or.reduce(fields_apart)
    return out


def transposed(matrix: Array, tile: int = 16) -> Array:
    """A contiguous copy of ``matrix.T``, a cache line of words at a time: a plain copy misses the cache on each."""
    rows, cols = matrix.shape
    out = np.empty((cols, rows), matrix.dtype)
    for top in range(0, rows, tile):
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
    """AWQ's codes, in runs of 8 along the last axis stored as 0 2 4 6 1 3 5 7, in their own order."""
    runs = codes.reshape(-1, 8)
    return runs[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(codes.shape)


def gemv_fast_codes(words: Array) -> Array:
    """AWQ's gemv_fast, int16 [out / 4, in] -> codes, uint8 [out, in]: four rows a block, 64 columns a run."""
    blocks, cols = words.shape
    stored = fields.unpack(words.view(np.uint8), 4, 4 * cols).reshape(blocks, cols // 64, 4, 2, 4, 2, 4)
    runs = stored.swapaxes(-1, -2).reshape(blocks, cols // 64, 4, 2, 4, 4, 2)  # ..., row, half, then 32 columns
    plain = runs.swapaxes(-2, -3).reshape(blocks, cols // 64, 4, 64)
    return np.ascontiguousarray(plain.swapaxes(1, 2)).reshape(4 * blocks, cols)


def marlin_codes(words: Array) -> Array:
    """Marlin's ``B``, int32 [in / 16, 2 * out] -> codes, uint8 [out, in]."""
    stored = fields.unpack(words.view(np.uint8), 4, 8 * words.shape[1]).reshape(-1, 1024)
    plain = np.empty_like(stored)
    plain[:, _marlin_order()] = stored
    tiles = plain.reshape(len(words), words.shape[1] // 32, 16, 16)  # tile of rows, tile of columns, row, column
    return np.ascontiguousarray(tiles.transpose(1, 3, 0, 2)).reshape(words.shape[1] // 2, 16 * len(words))


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


def _marlin_order() -> Array:
    """Where each of 1024 stored codes lies in four 16 x 16 tiles: the registers of a tensor core, read lane by lane."""
    lanes = []
    for lane in range(32):
        rows = [2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1]
        held = [16 * row + lane // 4 + 8 * half for half in (0, 1) for row in rows]
        lanes += [place + 256 * tile for tile in range(4) for place in held]
    return np.array(lanes).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
