"""``e8p`` on a GPU: values from the parts of ``spec/codecs/e8p.md``, as they lie in the file.

Codes uint8 [out, in / 8, bits]. Every param and every shape. Reference: ``qformat.codecs.e8p.decode``, equal bit for
bit. Speed: unmeasured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformat.codecs.e8p import NAME, Params

from . import _tile
from ._tile import block, put, rounded, tile, widened


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
    return _tile.launch(
        *(kernel, shape, dtype, rows, codes),
        points=_tile.named_table("e8p" if params.bits == 2 else "e81b", codes.device),
        scales=_tile.readable(parts.get("scales")),
        BLOCKS=_tile.blocks_of(params.block, None, shape),
        BITS=params.bits,
        ROUND=getattr(tl, params.round_dtype if params.rounding == "once" else "float32"),
    )


@triton.jit
def kernel(
    out,
    codes,
    points,
    scales,
    picked,
    count,
    rows,
    cols,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    ROUND: tl.constexpr,
    TILE: tl.constexpr,
):
    place, row, col = tile(picked, count, rows, cols, TILE)
    code = codes + (row * (cols // 8) + col // 8) * BITS
    point = tl.load(code + (BITS - 1)).to(tl.int32)
    i = (col % 8).to(tl.int32)
    value = tl.load(points + (point * 8 + i))
    if BITS == 2:
        signs = tl.load(code).to(tl.int32)
        odd = signs ^ (signs >> 4)
        odd = (0x6996 >> (odd & 15)) & 1  # whether four bits have an odd number of ones
        negative = ((signs ^ odd) >> ((i >> 1) + 4 * (i & 1))) & 1
        value = tl.where(negative != 0, -value, value) + tl.where(odd != 0, -0.25, 0.25)
    if scales is not None:
        value = value * widened(tl.load(scales + block(row, col, cols, BLOCKS)))
    put(out, place, col, cols, widened(rounded(value, ROUND)), picked, rows)
