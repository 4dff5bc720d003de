"""QTIP and YAQA, as their code has it (Cornell-RelaxML/qtip, lib/codebook/bitshift.py, lib/utils/kernel_decompress.py):
a state is a window of 16 bits that moves through the circle of a tile's bits, a table of all states gives the values.
What lies between the Hadamard transforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from ..plan import Item


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the stored matrix: float32 [stop - start, cols]."""
    settings = source.config["quip_params"]
    part = {name.rpartition(".")[2]: name for name in item.consumes}
    trellis = source.array(part["trellis"])
    (m,), (n,) = source.tensors[part["SV"]].shape, source.tensors[part["SU"]].shape
    high, wide, V = settings["td_x"], settings["td_y"], settings["V"]
    K = 16 * trellis.size // (m * n)
    lut = _lut(settings, source.array(part["tlut"]) if "tlut" in part else np.empty(0))
    kernel = _has_kernel(settings, K)
    step = 32 if kernel else high
    first, last = start // step * step, -(-stop // step) * step
    packed = trellis.reshape(-1)[first * n * K // 16 : last * n * K // 16]
    words = _unswizzled(packed, n, K) if kernel else packed.view(np.uint16).reshape(-1, high * wide * K // 16)
    values = lut[_states(words, K * V)]
    if kernel:  # the order of a tensor core's registers: lane / 4, lane % 4, column + 8, row + 8, column + 1
        tiles = values.reshape(-1, n // 16, 8, 4, 2, 2, 2).transpose(0, 5, 2, 1, 4, 3, 6)
    else:
        tiles = values.reshape(-1, n // wide, high, wide).swapaxes(1, 2)
    return tiles.reshape(last - first, n)[start - first : stop - first].astype(np.float32)


def _has_kernel(settings: Mapping[str, Any], K: int) -> bool:
    """``has_kernel``: whether words lie as the CUDA kernels read them."""
    fixed = {"decode_mode": "quantlut_sym", "L": 16, "V": 2, "tlut_bits": 9, "td_x": 16, "td_y": 16}
    return K in (2, 3, 4) and all(settings[key] == value for key, value in fixed.items())


def _unswizzled(packed: Array, n: int, K: int) -> Array:
    """``decode_compressed``: bytes [row of 2 x 2 tiles, column of them, lane, column, row, K], the last of a lane's K
    first -> words of each tile, uint16.
    """
    lanes = packed.view(np.uint8).reshape(-1, n // 32, 32, 2, 2, K)[..., ::-1]
    tiles = np.ascontiguousarray(lanes.transpose(0, 4, 1, 3, 2, 5)).reshape(-1, 32 * K)
    return tiles.view(">u2").astype(np.uint16)


def _states(words: Array, step: int) -> Array:
    """The windows that begin at bits 0, step, 2 step, ... of each row of words, counted from the top of the first."""
    circle = np.concatenate([words, words[:, :1]], axis=1).astype(np.uint32)
    word, bit = np.divmod(np.arange(0, 16 * words.shape[1], step), 16)
    return (circle[:, word] << 16 | circle[:, word + 1]) >> (16 - bit).astype(np.uint32) & 0xFFFF


def _lut(settings: Mapping[str, Any], tlut: Array) -> Array:
    """``lut``: the values of all states, [65536, V]."""
    state: Array = np.arange(1 << 16, dtype=np.uint64)
    mode, bits = settings["decode_mode"], settings.get("tlut_bits", 0)
    if mode == "lut":
        return tlut
    if mode in ("quantlut", "quantlut_sym"):
        square, symmetric = (state + 1) * state, mode == "quantlut_sym"
        lut: Array = tlut[square >> np.uint64(16 - bits - symmetric) & np.uint64((1 << bits) - 1)]
        if symmetric:
            lut[:, 0] = np.where(square >> np.uint64(15) & np.uint64(1), -lut[:, 0], lut[:, 0])
        return lut
    if mode == "3inst":
        mixed = state * 89226354 + 64248484 & 0x8FFF8FFF ^ 0x3B603B60
        high, low = mixed.astype("<u4").view(np.float16).reshape(-1, 2, 1).swapaxes(0, 1)
        total: Array = high + low
        return total
    mixed = state * 34038481 + 76625530
    if mode == "2mad":
        mixed = state * 264435761 + 1013904223 & 0xFFFFFFFF
        mixed += mixed * 1664525 >> np.uint64(32)
    total = mixed.astype("<u4").view(np.uint8).reshape(-1, 4).sum(axis=1, keepdims=True, dtype=np.int32) - 510
    return total.astype(np.float32) / np.float32(147.800537109375)
