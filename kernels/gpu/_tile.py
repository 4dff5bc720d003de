"""What the Triton kernels share. A program makes one tile of the output, and in it each element by itself: it finds the
element's bits, its block and its table, and stores one value. Nothing is masked: a tile that would reach beyond the
matrix does its last row and column again instead, so every load and store lies inside the tensors.

Bit for bit: kernels are compiled without contraction of products and sums (``enable_fp_fusion=False``), and bfloat16 is
made and read by integer arithmetic, because the interpreter truncates. The interpreter, a compiled kernel and the
reference give the same.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import msgspec
import torch
import triton
import triton.language as tl
from torch import Tensor

from qformat import blocks, codecs, tables
from qformat.errors import DamagedError, UnsupportedError

MANY, ONE = (16, 128), (1, 256)  # rows and columns of a tile: a matrix, or a single row
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
READ = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32)  # what every GPU loads
MOST_COLUMNS = 1 << 27  # the bits of a row are counted in int32; the elements of a matrix in int64


@dataclass(frozen=True)
class Tile:
    rows: int
    cols: int
    ragged: bool  # the output has no whole number of them


@dataclass(frozen=True)
class Blocks:
    """How a kernel finds the block of an element."""

    rows: int  # of a block; 0: all
    cols: int  # of a block; 0: all
    view: int  # columns of the reshape whose blocks are meant; 0: the matrix itself


def blocks_of(block: blocks.Block, view: blocks.Block | None, shape: tuple[int, int]) -> Blocks:
    """The blocks of a matrix, as few different ones as can be: each is a kernel of its own."""
    rows, cols = blocks.size(block, view or shape)
    if view is not None and rows == 1 and view[1] % cols == 0 and shape[1] % cols == 0:
        block, view = (1, cols), None  # runs of elements, a whole number of them in each row
    down, across = blocks.grid(block, view or shape)
    rows, cols = blocks.size(block, view or shape)
    return Blocks(rows if down > 1 else 0, cols if across > 1 else 0, view[1] if view is not None else 0)


def units_touched(width: int, step: int, unit: int = 8) -> int:
    """The most units of ``unit`` bits that a field of ``width`` bits reaches into, where fields begin at multiples of
    ``step``.
    """
    return -(-(unit - gcd(unit, step) + width) // unit)


def plain(params: Any) -> Any:
    """The params of parts that come decoded where they are packed by themselves; hashable."""
    packed = {name: "float32" for name in params.__struct_fields__ if isinstance(getattr(params, name), Mapping)}
    return msgspec.structs.replace(params, **packed) if packed else params


def check(codec: str, params: Any, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> None:
    """Raise :class:`DamagedError` where the parts are not those of the layout: a kernel trusts their sizes."""
    for name, expected in _shapes(codec, params, shape):
        if parts[name].shape != expected:
            raise DamagedError(f"{name} {list(expected)}", str(list(parts[name].shape)))


@functools.lru_cache(maxsize=1024)
def _shapes(codec: str, params: Any, shape: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
    return [(part.name, part.shape) for part in codecs.get(codec).layout(params, shape)]


def readable(part: Tensor | None) -> Tensor | None:
    """A part as a kernel takes it: contiguous, float8 widened to float32."""
    if part is None:
        return None
    return (part if part.dtype in READ else part.float()).contiguous()


@functools.lru_cache(maxsize=64)
def named_table(name: str, device: torch.device) -> Tensor:
    """A named table on a device: float32 [entries, values of an entry]."""
    return torch.from_numpy(tables.named(name).astype("float32")).to(device)


def launch(
    kernel: Any, shape: tuple[int, int], dtype: torch.dtype, rows: Tensor | None, codes: Tensor, **arguments: Any
) -> Tensor:
    """``dtype`` [out, in], or the given rows of it [n, in]; ``arguments`` are the kernel's own.

    Raises :class:`UnsupportedError` for a dtype or a number of columns that no kernel has.
    """
    if dtype not in FLOATS:
        raise UnsupportedError("values in float32, float16 or bfloat16", str(dtype))
    if shape[1] >= MOST_COLUMNS:
        raise UnsupportedError(f"fewer than {MOST_COLUMNS} columns", str(shape[1]))
    count = shape[0] if rows is None else rows.numel()
    out = torch.empty(count, shape[1], dtype=dtype, device=codes.device)
    if out.numel():
        high, wide = MANY if count > 1 else ONE
        tile = Tile(high, wide, bool(count % high or shape[1] % wide))
        programs = triton.cdiv(count, high) * triton.cdiv(shape[1], wide)
        picked = None if rows is None else rows.reshape(-1).contiguous()
        where = {"picked": picked, "count": count, "rows": shape[0], "cols": shape[1], "TILE": tile}
        with torch.cuda.device_of(out):
            kernel[(programs,)](out, codes, **where, **arguments, enable_fp_fusion=False)
    return out


@triton.jit
def tile(picked, count, rows, cols, TILE: tl.constexpr):
    """Of this program: the rows of the output and those of the matrix that belong there, int64 [rows of a tile, 1], and
    the columns [1, columns of a tile].
    """
    across = tl.cdiv(cols, TILE.cols)
    place = (tl.program_id(0) // across * TILE.rows + tl.arange(0, TILE.rows)).to(tl.int64)[:, None]
    col = (tl.program_id(0) % across * TILE.cols + tl.arange(0, TILE.cols)).to(tl.uint32)[None, :]
    if TILE.ragged:
        place = tl.minimum(place, count - 1)
        col = tl.minimum(col, cols - 1)
    if picked is None:
        row = place
    else:
        row = within(tl.load(picked + place).to(tl.int64), rows)
    return place, row, col


@triton.jit
def put(out, place, col, cols, value, picked, rows):
    """Store a tile in the dtype of ``out``; NaN for rows that the matrix has not."""
    if picked is not None:
        asked = tl.load(picked + place)
        value = tl.where((asked >= 0) & (asked < rows), value, float("nan"))
    tl.store(out + place * cols + col, rounded(value, out.dtype.element_ty))


@triton.jit
def within(at, size):
    """``at`` where it is an index below ``size``, else 0."""
    return tl.where((at >= 0) & (at < size), at, 0)


@triton.jit
def block(row, col, cols, BLOCKS: tl.constexpr):
    """The number of an element's block."""
    if BLOCKS.view:
        flat = row * cols + col
        row = flat // BLOCKS.view
        col = flat % BLOCKS.view
        cols = BLOCKS.view
    down = row // BLOCKS.rows if BLOCKS.rows else row * 0
    if BLOCKS.cols:
        return down * tl.cdiv(cols, BLOCKS.cols) + col // BLOCKS.cols
    else:
        return down


@triton.jit
def window(string, first, size, WIDTH: tl.constexpr, UNITS: tl.constexpr):
    """The WIDTH bits from bit ``first`` on, which lie in UNITS units of a string of ``size`` units (bytes, or what
    ``string`` points to): uint32.

    The string is cyclic. Where it is a row, what is read from its beginning lies above the field and is masked away.
    """
    UNIT: tl.constexpr = string.dtype.element_ty.primitive_bitwidth
    bits = tl.full(first.shape, 0, tl.uint32)
    for k in tl.static_range(UNITS):
        at = first // UNIT + k
        if k:
            at = tl.where(at < size, at, at - size)
        bits |= tl.load(string + at).to(tl.uint32) << (UNIT * k)
    return (bits >> (first % UNIT)) & ((1 << WIDTH) - 1)


@triton.jit
def widened(x):
    """To float32."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 or float64 -> the nearest value of DTYPE, ties to even, in one rounding."""
    if DTYPE == tl.float32:
        return x.to(tl.float32)
    else:
        if x.dtype == tl.float64:
            x = _to_odd(x)
        if DTYPE == tl.float16:
            return x.to(tl.float16)
        else:
            bits = x.to(tl.uint32, bitcast=True)
            near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return tl.where(x == x, near, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _to_odd(x):
    """float64 -> float32 rounded to odd, as in ``qformat/dtypes.py``: it keeps ties of the next rounding apart."""
    near = x.to(tl.float32)
    bits = near.to(tl.int32, bitcast=True) - (tl.abs(near.to(tl.float64)) > tl.abs(x)).to(tl.int32)
    return (bits | (near.to(tl.float64) != x).to(tl.int32)).to(tl.float32, bitcast=True)
