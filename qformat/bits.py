"""Bit fields: little-endian, filled from the least significant bit upward in index order; each row starts at a byte."""

from __future__ import annotations

import numpy as np

from .dtypes import Array

GROUP = 8  # eight codes of b bits fill exactly b bytes, whatever b is


def row_bytes(count: int, bits: int) -> int:
    """Bytes of one row of ``count`` codes of ``bits`` bits."""
    return -(-count * bits // 8)


def _places(bits: int) -> list[tuple[int, int, int]]:
    """For each code of a group: (index in the group, first byte, shift in it)."""
    return [(j, j * bits // 8, j * bits % 8) for j in range(GROUP)]


def pack(codes: Array, bits: int) -> Array:
    """Unsigned integer codes [..., n] below 2**bits (1 to 16 bits) -> uint8 [..., ceil(n * bits / 8)]."""
    *lead, n = codes.shape
    groups = -(-n // GROUP)
    padded = np.zeros((*lead, groups * GROUP), np.uint8 if 8 % bits == 0 else np.uint16 if bits < 8 else np.uint32)
    padded[..., :n] = codes
    if 8 % bits == 0:  # whole codes to a byte
        whole = padded[..., :: 8 // bits].copy()
        for j in range(1, 8 // bits):
            whole |= padded[..., j :: 8 // bits] << (j * bits)
        return whole[..., : row_bytes(n, bits)]
    padded = padded.reshape(*lead, groups, GROUP)
    out = np.zeros((*lead, groups, bits), np.uint8)
    for j, first, shift in _places(bits):
        field = padded[..., j] << shift
        for byte in range(first, (j * bits + bits - 1) // 8 + 1):
            out[..., byte] |= (field >> (8 * (byte - first))).astype(np.uint8)
    return out.reshape(*lead, groups * bits)[..., : row_bytes(n, bits)]


def unpack(packed: Array, bits: int, n: int) -> Array:
    """The inverse of :func:`pack`: uint8 [..., ceil(n * bits / 8)] -> codes [..., n], uint8 up to 8 bits, else
    uint16.
    """
    *lead, size = packed.shape
    groups = -(-n // GROUP)
    if size != groups * bits:
        packed = np.concatenate([packed, np.zeros((*lead, groups * bits - size), np.uint8)], axis=-1)
    grouped = packed.reshape(*lead, groups, bits)
    out = np.empty((*lead, groups, GROUP), np.uint8 if bits <= 8 else np.uint16)
    for j, first, shift in _places(bits):
        field = grouped[..., first].astype(np.uint32)
        for byte in range(first + 1, (j * bits + bits - 1) // 8 + 1):
            field |= grouped[..., byte].astype(np.uint32) << (8 * (byte - first))
        out[..., j] = (field >> shift) & ((1 << bits) - 1)
    return out.reshape(*lead, groups * GROUP)[..., :n]
