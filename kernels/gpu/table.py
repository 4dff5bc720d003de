"""``table`` on a GPU: values from the parts of ``spec/codecs/table.md``, as they lie in the file.

Codes uint8 [out, bytes of a row], fields of 1 to 16 bits, each an index into a table of entries of p values. Stored
tables, one for each ``table_block``, are read as they are, named ones as float32. Every param and every shape below
2**27 columns. Reference: ``qformat.codecs.table.decode``, equal bit for bit. Speed: unmeasured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformat.codecs.table import NAME, Params

from . import _tile
from ._tile import block, put, rounded, tile, widened, window


def dequantize(
    params: Params,
    shape: tuple[int, int],
    parts: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Tensor:
    """The codec's ``decode``, rounded once to ``dtype``: [out, in], or of the given rows, integers [n], alone: [n,
    in].

    Scales and offsets that are packed by themselves come decoded. A row that is not there gives NaN. Raises
    :class:`DamagedError` where the parts are not those of the layout.
    """
    params = _tile.plain(params)
    _tile.check(NAME, params, shape, parts)
    codes = parts["codes"].contiguous()
    named = None if params.stored else _tile.named_table(params.table, codes.device)
    return _tile.launch(
        *(kernel, shape, dtype, rows, codes),
        table=_tile.readable(parts["table"]) if named is None else named,
        scales=_tile.readable(parts.get("scales")),
        offsets=_tile.readable(parts.get("offsets")),
        TABLES=_tile.blocks_of(params.table_block if params.stored else (-1, -1), None, shape),
        BLOCKS=_tile.blocks_of(params.block, params.view, shape),
        BITS=params.bits,
        BYTES=_tile.units_touched(params.bits, params.bits),
        P=params.p,
        ROUND=getattr(tl, params.round_dtype if params.rounding == "once" else "float32"),
    )


@triton.jit
def kernel(
    out,
    codes,
    table,
    scales,
    offsets,
    picked,
    count,
    rows,
    cols,
    TABLES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    P: tl.constexpr,
    ROUND: tl.constexpr,
    TILE: tl.constexpr,
):
    place, row, col = tile(picked, count, rows, cols, TILE)
    size = tl.cdiv(cols // P * BITS, 8)
    code = window(codes + row * size, col // P * BITS, size, BITS, BYTES).to(tl.int32)
    entries = table + block(row, col, cols, TABLES) * (P << BITS)
    value = widened(tl.load(entries + (code * P + col % P)))
    if scales is not None:
        value = value * widened(tl.load(scales + block(row, col, cols, BLOCKS)))
    if offsets is not None:
        value = value + widened(tl.load(offsets + block(row, col, cols, BLOCKS)))
    put(out, place, col, cols, widened(rounded(value, ROUND)), picked, rows)
