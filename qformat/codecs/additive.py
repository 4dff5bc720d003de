"""``additive``: a tile of the matrix is the sum of one entry from each of several books, times a scale. Page:
``spec/codecs/additive.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import gcd
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from .. import bits as fields
from .. import blocks
from ..dtypes import NUMPY, Array, Float, Scale, held
from ..errors import DamagedError, UnsupportedError
from ..layout import Packed, Part
from ..records import Record
from ._additive_search import Nearest, nearest, search, train

NAME = "additive"

Side = Annotated[int, Meta(ge=1, le=1024)]


class Params(Record, frozen=True, kw_only=True):
    """``value = (table[0][code 0] + table[1][code 1] + ...) * scale`` over tiles of ``group`` rows and columns, with
    ``books`` codes of ``bits`` bits each.
    """

    bits: Annotated[int, Meta(ge=1, le=16)]
    books: Annotated[int, Meta(ge=1, le=256)] = 1
    group: tuple[Side, Side] = (1, 8)
    table: Float = "float16"
    block: tuple[int, int] = (1, -1)
    scales: Scale | Packed | None = None

    def __post_init__(self) -> None:
        blocks.validate(self.block, None)

    @property
    def run(self) -> int:
        """The fewest groups of a row whose codes fill whole bytes."""
        return 8 // gcd(8, self.books * self.bits)


def layout(params: Params, shape: tuple[int, int]) -> list[Part]:
    rows, cols = shape
    down, across = params.group
    if rows % down or cols % across:
        raise DamagedError(f"rows and columns in multiples of the group {list(params.group)}", str([rows, cols]))
    span = params.run * across
    size = params.run * params.books * params.bits // 8
    codes = (rows // down, -(-cols // span), size)
    parts = [Part("codes", "uint8", codes, 0, Fraction(down), 1, Fraction(span))]
    if params.scales is not None:
        parts.append(blocks.part("scales", params.scales, shape, params.block))
    return [*parts, Part("table", params.table, (params.books, 2**params.bits, down, across))]


def decode(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    (rows, cols), (down, across) = shape, params.group
    stream = parts["codes"].reshape(rows // down, -1)  # runs fill their bytes, so that a row of them is one bit string
    count = cols // across * params.books
    codes = fields.unpack(stream[:, : fields.row_bytes(count, params.bits)], params.bits, count)
    codes = codes.reshape(rows // down, -1, params.books)
    table = parts["table"].astype(np.float32)
    tiles = table[0][codes[:, :, 0]]
    for book in range(1, params.books):
        tiles += table[book][codes[:, :, book]]
    values = np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(shape)
    if params.scales is not None:
        values *= blocks.spread(parts["scales"].astype(np.float32), shape, params.block)
    return values


def encode(params: Params, weight: Array, nearest: Nearest = nearest) -> dict[str, Array]:
    """float32 [out, in] -> parts. Each block is divided by its root mean square; the books are residual k-means of its
    tiles, refined by turns; codes are searched for with the books as they are stored; the scale is then the one of
    least squared error. ``nearest`` finds the nearest entries and may be replaced by a faster equal.
    """
    if params.scales is not None and not isinstance(params.scales, str):
        raise UnsupportedError("parts with a dtype when encoding", "packed parts")
    shape, weight = (weight.shape[0], weight.shape[1]), weight.astype(np.float32)
    layout(params, shape)
    block = blocks.size(params.block, shape)
    if params.scales is not None and (block[0] % params.group[0] or block[1] % params.group[1]):
        raise UnsupportedError(f"blocks of whole groups {list(params.group)}", str(list(params.block)))
    scales = np.ones((1, 1), np.float32)
    if params.scales is not None:
        spread = np.sqrt((blocks.gather(weight, params.block) ** 2).sum(axis=0, dtype=np.float32) / block[0] / block[1])
        scales = held(spread.reshape(blocks.grid(params.block, shape)), params.scales)
    full = np.broadcast_to(blocks.spread(scales, shape, params.block) if params.scales else scales, shape)
    ideal = np.divide(weight, full, out=np.zeros(shape, np.float32), where=full != 0)
    vectors, importance = _tiles(ideal, params.group), _tiles(full, params.group)[:, 0] ** 2
    table = train(vectors, importance, params.books, 2**params.bits, nearest).astype(NUMPY[params.table])
    codes = search(vectors, table.astype(np.float32), nearest)
    parts = {"codes": pack(params, shape, codes), "table": table.reshape(*table.shape[:2], *params.group)}
    if params.scales is None:
        return parts
    unscaled = decode(params, shape, {**parts, "scales": np.ones_like(scales)})
    return {**parts, "scales": _best(params, weight, unscaled, scales).astype(NUMPY[params.scales])}


def _tiles(matrix: Array, group: tuple[int, int]) -> Array:
    """[out, in] -> a vector for each tile, row-major: [tiles, elements of a tile]."""
    return np.ascontiguousarray(blocks.gather(np.ascontiguousarray(matrix), group).T)


def pack(params: Params, shape: tuple[int, int], codes: Array) -> Array:
    """Codes, integers [..., books] of tiles in row-major order -> the part; rows end in zeros."""
    part = layout(params, shape)[0]
    rows, runs, size = part.shape
    stream = fields.pack(codes.reshape(rows, -1), params.bits)
    out = np.zeros((rows, runs * size), np.uint8)
    out[:, : stream.shape[1]] = stream
    return out.reshape(part.shape)


def _best(params: Params, weight: Array, unscaled: Array, before: Array) -> Array:
    """For each block the scale of least squared error, as it is stored; ``before`` where every entry is zero."""
    want, have = (blocks.gather(one.astype(np.float64), params.block) for one in (weight, unscaled))
    product, square = (have * want).sum(axis=0), (have * have).sum(axis=0)
    best = np.divide(product, square, out=before.astype(np.float64).ravel(), where=square > 0)
    return held(best.astype(np.float32).reshape(before.shape), str(params.scales))


def check(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` for numbers that no encoder writes."""
    blocks.check_finite({name: parts[name] for name in ("scales", "table") if name in parts})


def units(params: Params) -> tuple[int, int]:
    """Rows and columns come a group at a time."""
    return params.group


def preset(bits: float, rotated: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The params for ``quantize --codec additive --bits BITS``: a book of 256 entries of eight columns for each bit,
    and a scale for each row of groups.
    """
    if not 1 <= bits <= 8 or bits != int(bits):
        hint = "--set bits=, books= and group= reach others"
        raise UnsupportedError("whole bits from 1 to 8 for additive", f"{bits:g}", hint=hint)
    group = settings.get("group", [1, 8])
    rows = group[0] if isinstance(group, (list, tuple)) and group else 1
    return {"bits": 8, "books": int(bits), "group": [1, 8], "block": [rows, -1], "scales": "float16", **settings}
