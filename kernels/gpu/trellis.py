"""``trellis`` on a GPU: values from the parts of ``spec/codecs/trellis.md``, as they lie in the file.

Codes uint8 [row tiles, column tiles, N / 8], a cyclic string of N bits a tile. Where the window of an element begins
comes from a table of the elements of a tile, whatever the order, the direction and the mix of widths. What a state
stands for is computed, but for the code ``table``, which looks it up among 2**L entries. Every param and every shape
below 2**27 columns. Reference: ``qformat.codecs.trellis.decode``, equal bit for bit. Speed: unmeasured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import msgspec
import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qformat.codecs.trellis import NAME, Params, place, states

from . import _tile
from ._tile import block, put, tile, widened, window


def dequantize(
    params: Params,
    shape: tuple[int, int],
    parts: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Tensor:
    """The codec's ``decode``, rounded once to ``dtype``: [out, in], or of the given rows, integers [n], alone: [n, in].

    Scales that are packed by themselves come decoded. A row that is not there gives NaN. Raises :class:`DamagedError`
    where the parts are not those of the layout.
    """
    params = _tile.plain(params)
    _tile.check(NAME, params, shape, parts)
    codes = parts["codes"].contiguous()
    if codes.shape[-1] % 2 == 0 and codes.storage_offset() % 2 == 0:
        codes = codes.view(torch.uint16)  # fewer loads
    table = _tile.readable(parts.get("table"))
    if params.table and table is None:
        table = _tile.named_table(params.table, codes.device)
    common = _common(params)
    return _tile.launch(
        *(kernel, shape, dtype, rows, codes),
        windows=_windows(common, codes.device),
        table=table,
        scales=_tile.readable(parts.get("scales")),
        BLOCKS=_tile.blocks_of(params.block, None, shape),
        SIZE=codes.shape[-1],
        UNITS=_tile.units_touched(params.L, 1, 8 * codes.element_size()),
        P=common,
    )


@functools.lru_cache(maxsize=64)
def _common(params: Params) -> Params:
    """What weights of equal settings have in common, a multiplier of its own filled in."""
    multiplier = states.MULTIPLIERS.get(params.code) if params.multiplier is None else params.multiplier
    return msgspec.structs.replace(params, scales=None, block=(1, -1), multiplier=multiplier)


@functools.lru_cache(maxsize=64)
def _windows(params: Params, device: torch.device) -> Tensor:
    """For each element of a tile, row-major, V times the bit at which its window begins, plus which of the step's
    values it is: int32 [elements].
    """
    windows = np.empty(params.steps * params.V, np.int32)
    windows[place(params)] = (params.starts[:-1, None] * params.V + np.arange(params.V)).ravel()
    return torch.from_numpy(windows).to(device)


@triton.jit
def kernel(
    out,
    codes,
    windows,
    table,
    scales,
    picked,
    count,
    rows,
    cols,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    at, row, col = tile(picked, count, rows, cols, TILE)
    begin = tl.load(windows + row % P.tile[0] * P.tile[1] + col % P.tile[1]).to(tl.uint32)
    string = codes + (row // P.tile[0] * (cols // P.tile[1]) + col // P.tile[1]) * SIZE
    state = window(string, begin // P.V, SIZE, P.L, UNITS)
    value = stands_for(state, begin % P.V, table, P)
    if scales is not None:
        value = value * widened(tl.load(scales + block(row, col, cols, BLOCKS)))
    put(out, at, col, cols, value, picked, rows)


@triton.jit
def stands_for(s, v, table, P: tl.constexpr):
    """Value v of the state s, float32, as ``qformat/codecs/_trellis_codes.py`` defines it."""
    if P.code == "table":
        return widened(tl.load(table + s.to(tl.int32) * P.V + v))
    elif P.code == "hyb":
        return _hyb(s, v, table, P.index[0])
    elif P.code == "lut":
        at = (s * (s + 1) >> (16 - P.index[0]) & ((1 << P.index[0]) - 1)).to(tl.int32)
        return widened(tl.load(table + at * P.V + v))
    elif P.code == "hash":
        return _hash(s, table, P)
    elif P.code == "1mad":
        return _centred(s * 34038481 + 76625530)
    elif P.code == "2mad":
        x = s * 264435761 + 1013904223
        return _centred(x + (x.to(tl.uint64) * 1664525 >> 32).to(tl.uint32))
    elif P.code == "3inst":
        return _two_halves(s * 89226354 + 64248484)
    elif P.code == "mcg":
        return _two_halves(s * P.multiplier)
    else:
        return _mul1(s * P.multiplier)


@triton.jit
def _centred(x):
    return tl.div_rn((_byte_sum(x) - 510).to(tl.float32), 147.800537109375)


@triton.jit
def _byte_sum(x):
    return ((x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)).to(tl.int32)


@triton.jit
def _two_halves(x):
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return (low.to(tl.float32) + high.to(tl.float32)).to(tl.float16).to(tl.float32)  # the sum is exact in float32


@triton.jit
def _mul1(x):
    """(1024 + bytes) * 1774 / 2**18 - 1329 / 2**7, counted in units of 2**-18: below 2**24, so that only the last step
    rounds.
    """
    units = (1024 + _byte_sum(x)) * 1774 - (1329 << 11)
    return (units.to(tl.float32) * (1 / (1 << 18))).to(tl.float16).to(tl.float32)


@triton.jit
def _hyb(s, v, table, BITS: tl.constexpr):
    z = s * (s + 1)
    at = (z >> (15 - BITS) & ((1 << BITS) - 1)).to(tl.int32)
    flip = (v == 0) & ((z & 0x8000) != 0)
    return widened(tl.load(table + at * 2 + v)) * tl.where(flip, -1.0, 1.0)  # -x would be 0 - x, which has no -0


@triton.jit
def _hash(s, table, P: tl.constexpr):
    u = s >> P.shift
    v = tl.zeros_like(s)
    for tap in tl.static_range(16):
        if P.taps.count(tap) % 2:
            v ^= s >> tap
    u = (u & ((1 << P.index[0]) - 1)).to(tl.int32)
    v = (v & ((1 << P.index[1]) - 1)).to(tl.int32)
    if P.additive:
        return widened(tl.load(table + u)) + widened(tl.load(table + (1 << P.index[0]) + v))
    else:
        return widened(tl.load(table + (u | v << P.index[0])))
