"""EXL3, as its kernels have it (turboderp-org/exllamav3, exl3_dq.cuh, codebook.cuh): a state is the 16 bits of a tile's
circle that end with a step's own, counted from the top of 32-bit words; a multiplication mixes it into a value. What
lies between the Hadamard transforms, outputs first.
"""

from __future__ import annotations

import functools

import numpy as np

from qformat.checkpoint import Checkpoint
from qformat.dtypes import Array

from ..plan import Item

TILE = 16


def rows(source: Checkpoint, item: Item, start: int, stop: int) -> Array:
    """Rows [start, stop) of the stored matrix, padded columns too: float32 [stop - start, cols]."""
    part = {name.rpartition(".")[2]: name for name in item.consumes}
    trellis = source.array(part["trellis"])[:, start // TILE : stop // TILE]
    code = next((name for name in ("mcg", "mul1") if name in part), "3inst")
    multiplier = int(source.array(part[code]).reshape(()).view(np.uint32)) if code in part else 0
    values = _values(code, multiplier)[_states(trellis.reshape(-1, trellis.shape[2]))]
    lanes = values.reshape(*trellis.shape[:2], 8, 4, 2, 2, 2)  # lane / 4, lane % 4, output + 8, input + 8, input + 1
    outputs_first = lanes.transpose(1, 4, 2, 0, 5, 3, 6)
    return outputs_first.reshape(stop - start, TILE * len(trellis)).astype(np.float32)


def _states(tiles: Array) -> Array:
    """int16 [tiles, 16 K] -> states of the 256 steps of each."""
    words = np.ascontiguousarray(tiles).view(np.uint16).reshape(len(tiles), -1, 2)[..., ::-1].reshape(len(tiles), -1)
    K = words.shape[1] // TILE
    circle = np.concatenate([words[:, -1:], words], axis=1).astype(np.uint32)
    word, bit = np.divmod(np.arange(K, 256 * K + 1, K), 16)  # a state ends before this bit, and 16 are ahead
    before: Array = circle[:, word] << 16 | circle[:, np.minimum(word + 1, circle.shape[1] - 1)]
    return before >> (16 - bit).astype(np.uint32) & 0xFFFF


@functools.cache
def _values(code: str, multiplier: int) -> Array:
    """The value of each state, float16 [65536]."""
    state = np.arange(1 << 16, dtype=np.uint64)
    if code == "mul1":
        total = (state * multiplier).astype("<u4").view(np.uint8).reshape(-1, 4).sum(axis=1, dtype=np.int64)
        scale, offset = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        fused: Array = ((1024 + total) * scale + offset).astype(np.float16)
        return fused
    mixed = state * multiplier if code == "mcg" else state * 89226354 + 64248484
    halves = ((mixed & 0x8FFF8FFF) ^ 0x3B603B60).astype("<u4").view(np.float16).reshape(-1, 2)
    added: Array = halves[:, 0] + halves[:, 1]
    return added
