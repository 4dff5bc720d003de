"""Numbers packed in 32-bit words, as GPTQ and AWQ have them, taken apart one by one."""

from __future__ import annotations

import numpy as np

from qformat.dtypes import Array

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # bits of each, low plane first


def stream(words: Array, index: Array, bits: int) -> Array:
    """Numbers ``index`` of the bits of int32 [words, columns], the lowest first: uint32 [index, columns]."""
    unsigned: Array = words.view(np.uint32)
    word, shift = np.divmod(index * bits, 32)
    out: Array = unsigned[word] >> shift.astype(np.uint32)[:, None]
    over = np.flatnonzero(shift + bits > 32)
    out[over] |= unsigned[word[over] + 1] << (32 - shift[over]).astype(np.uint32)[:, None]
    return out & np.uint32((1 << bits) - 1)


def planar(words: Array, index: Array, bits: int) -> Array:
    """The same where 32 numbers are several planes of fewer bits, one after another."""
    unsigned: Array = words.view(np.uint32)
    block, place = np.divmod(index, 32)
    out = np.zeros((len(index), words.shape[1]), np.uint32)
    low = 0
    for width in PLANES.get(bits, (bits,)):
        word, at = np.divmod(place, 32 // width)
        plane = unsigned[bits * block + low + word] >> (width * at).astype(np.uint32)[:, None]
        out |= (plane & np.uint32((1 << width) - 1)) << np.uint32(low)
        low += width
    return out


def marlin(words: Array, scales: Array, start: int, stop: int) -> Array:
    """Columns [start, stop), in 64s, of a Marlin layer, int32 [in / 16, 2 * out] and [groups, out], as rows: float32
    [stop - start, in]. The orders are those of ``_get_perms`` (IST-DASLab/marlin).
    """
    held = np.ascontiguousarray(words[:, 2 * start : 2 * stop]).view(np.uint32)
    codes = held[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    order, order_of_scales = _orders(single=len(scales) == 1)
    tiles = np.empty((codes.size // 1024, 1024), np.int32)
    tiles[:, order] = codes.reshape(-1, 1024)
    across = tiles.reshape(len(words), -1, 16, 16).swapaxes(1, 2).reshape(16 * len(words), stop - start)
    runs = scales[:, start:stop].reshape(-1, len(order_of_scales))
    plain = np.empty_like(runs, np.float32)
    plain[:, order_of_scales] = runs
    each = np.repeat(plain.reshape(len(scales), -1), len(across) // len(scales), axis=0)
    return np.ascontiguousarray((each * (across - 8).astype(np.float32)).T)


def _orders(single: bool) -> tuple[list[int], list[int]]:
    """Of 1024 codes and of scales, which are ``single`` where a column has one group."""
    codes = []
    for lane in range(32):
        first = []
        for block in (0, 1):
            for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1):
                first.append(16 * row + lane // 4 + 8 * block)
        for tile in range(4):
            codes += [place + 256 * tile for place in first]
    codes = [codes[8 * run + at] for run in range(128) for at in (0, 2, 4, 6, 1, 3, 5, 7)]
    if single:
        return codes, [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return codes, [i + 8 * j for i in range(8) for j in range(8)]
