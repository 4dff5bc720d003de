"""``additive`` on a GPU: values from the parts of ``spec/codecs/additive.md``, as they lie in the file.

Codes uint8 [out / rows of a group, runs, bytes of a run]: a row of them is one string of bits, the codes of all books
of a group side by side. Books are read as they are. Every param and every shape whose row has fewer than 2**31 bits.
Reference: ``qformat.codecs.additive.decode``, equal bit for bit. Speed: unmeasured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformat.codecs.additive import NAME, Params
from qformat.errors import UnsupportedError

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
    where the parts are not those of the layout, :class:`UnsupportedError` for rows that are too long.
    """
    params = _tile.plain(params)
    _tile.check(NAME, params, shape, parts)
    codes = parts["codes"].contiguous()
    size = codes.shape[1] * codes.shape[2]
    if 8 * size >= 1 << 31:
        raise UnsupportedError("rows of fewer than 2**31 bits", str(8 * size))
    return _tile.launch(
        *(kernel, shape, dtype, rows, codes),
        table=_tile.readable(parts["table"]),
        scales=_tile.readable(parts.get("scales")),
        size=size,
        BLOCKS=_tile.blocks_of(params.block, None, shape),
        BITS=params.bits,
        BYTES=_tile.units_touched(params.bits, params.bits),
        BOOKS=params.books,
        DOWN=params.group[0],
        ACROSS=params.group[1],
    )


@triton.jit
def kernel(
    out,
    codes,
    table,
    scales,
    picked,
    count,
    rows,
    cols,
    size,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    BOOKS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    TILE: tl.constexpr,
):
    place, row, col = tile(picked, count, rows, cols, TILE)
    string = codes + row // DOWN * size
    first = col // ACROSS * (BOOKS * BITS)
    within_tile = row % DOWN * ACROSS + col % ACROSS
    code = window(string, first, size, BITS, BYTES).to(tl.int64)
    value = widened(tl.load(table + code * (DOWN * ACROSS) + within_tile))
    for book in range(1, BOOKS):
        code = window(string, first + book * BITS, size, BITS, BYTES).to(tl.int64) + (book << BITS)
        value += widened(tl.load(table + code * (DOWN * ACROSS) + within_tile))
    if scales is not None:
        value = value * widened(tl.load(scales + block(row, col, cols, BLOCKS)))
    put(out, place, col, cols, value, picked, rows)
