"""``float`` on a GPU: values from the parts of ``spec/codecs/float.md``, as they lie in the file.

Codes uint8 [out, bytes of a row], fields of 4 to 8 bits, each an index into the numbers of the format. A global scale
is taken into the scales beforehand, one operation a block, where the params say so. Every param and every shape below
2**27 columns. Reference: ``qformat.codecs.float.decode``, equal bit for bit. Speed: unmeasured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformat.codecs import float as codec
from qformat.codecs.float import NAME, Params

from . import _tile
from ._tile import block, put, rounded, tile, widened, window


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
    scales, last = factors(params, parts)
    return _tile.launch(
        *(kernel, shape, dtype, rows, codes),
        numbers=numbers(params.format, codes.device),
        scales=scales,
        last=last,
        BLOCKS=_tile.blocks_of(params.block, params.view, shape),
        BITS=params.bits,
        BYTES=_tile.units_touched(params.bits, params.bits),
        EACH=getattr(tl, params.round_dtype if params.rounding == "each" else "float32"),
        ROUND=getattr(tl, params.round_dtype if params.rounding != "none" else "float32"),
    )


@functools.lru_cache(maxsize=64)
def numbers(name: str, device: torch.device) -> Tensor:
    """What the codes of a format stand for: float32 [2**bits]."""
    return torch.from_numpy(codec.elements(name).copy()).to(device)


def factors(params: Params, parts: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The codec's ``factors``, in torch; scales as they are where there is no global one."""
    scales = _tile.readable(parts.get("scales"))
    if scales is None or params.global_scale is None:
        return scales, None
    whole = parts["global_scale"].float() / params.global_divisor
    if params.global_form == "last":
        return scales, whole
    combined = scales.float() * whole if params.global_form == "multiply" else scales.float() / whole
    if params.rounding == "each":
        combined = combined.to(getattr(torch, params.round_dtype)).float()
    return combined, None


@triton.jit
def kernel(
    out,
    codes,
    numbers,
    scales,
    last,
    picked,
    count,
    rows,
    cols,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    BYTES: tl.constexpr,
    EACH: tl.constexpr,
    ROUND: tl.constexpr,
    TILE: tl.constexpr,
):
    place, row, col = tile(picked, count, rows, cols, TILE)
    size = tl.cdiv(cols * BITS, 8)
    code = window(codes + row * size, col * BITS, size, BITS, BYTES).to(tl.int32)
    value = tl.load(numbers + code)
    if scales is not None:
        value = value * widened(tl.load(scales + block(row, col, cols, BLOCKS)))
    if last is not None:
        value = widened(rounded(value, EACH)) * tl.load(last)
    put(out, place, col, cols, widened(rounded(value, ROUND)), picked, rows)
