"""``int`` on a GPU: values from the parts of ``spec/codecs/int.md``, as they lie in the file.

Codes uint8 [out, bytes of a row], fields of a row from its first bit up, straddling bytes; scales, zeros and offsets
one a block. Every param and every shape below 2**27 columns. Reference: ``qformat.codecs.int.decode``, equal bit for
bit. Speed: unmeasured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformat.codecs.int import NAME, Params

from . import _tile
from ._tile import block, put, rounded, tile, widened, window, within


def dequantize(
    params: Params,
    shape: tuple[int, int],
    parts: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Tensor:
    """The codec's ``decode``, rounded once to ``dtype``: [out, in], or of the given rows, integers [n], alone: [n, in].

    Parts that are packed by themselves come decoded. A row or a group that is not there gives NaN. Raises
    :class:`DamagedError` where the parts are not those of the layout.
    """
    params = _tile.plain(params)
    _tile.check(NAME, params, shape, parts)
    side = {name: _tile.readable(parts.get(name)) for name in ("scales", "zeros", "offsets", "groups")}
    return _tile.launch(
        *(kernel, shape, dtype, rows, parts["codes"].contiguous()),
        **side,
        BLOCKS=_tile.blocks_of(params.block, params.view, shape),
        BITS=params.bits,
        BYTES=_tile.units_touched(params.bits, params.bits),
        ZERO=float(params.zero),
        ROUNDING=params.rounding,
        ROUND=getattr(tl, params.round_dtype),
    )


@triton.jit
def kernel(
    out,
    codes,
    scales,
    zeros,
    offsets,
    groups,
    picked,
    count,
    rows,
    cols,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    ZERO: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROUND: tl.constexpr,
    TILE: tl.constexpr,
):
    place, row, col = tile(picked, count, rows, cols, TILE)
    size = tl.cdiv(cols * BITS, 8)
    code = window(codes + row * size, col * BITS, size, BITS, BYTES).to(tl.float32)
    if groups is None:
        at = block(row, col, cols, BLOCKS)
        scale = widened(tl.load(scales + at))
    else:
        number = tl.cdiv(cols, BLOCKS.cols) if BLOCKS.cols else 1
        group = tl.load(groups + (row * 0 + col))  # as a whole tile: one row would be divided among the threads anew
        at = block(row, 0, cols, BLOCKS) + within(group, number)
        scale = tl.where((group >= 0) & (group < number), widened(tl.load(scales + at)), float("nan"))
    if offsets is not None:
        offset = widened(tl.load(offsets + at))
        if ROUNDING == "fused":
            value = code.to(tl.float64) * scale.to(tl.float64) + offset.to(tl.float64)
        elif ROUNDING == "each":
            value = widened(rounded(code * scale, ROUND)) + offset
        else:
            value = code * scale + offset
    else:
        value = code - (ZERO if zeros is None else widened(tl.load(zeros + at)))
        if ROUNDING == "each":
            value = widened(rounded(value, ROUND))
        value = value * scale
    if ROUNDING != "none":
        value = widened(rounded(value, ROUND))
    put(out, place, col, cols, value, picked, rows)
