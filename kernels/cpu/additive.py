"""``additive`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_int64, c_void_p

import numpy as np

from qformat.codecs import additive as codec
from qformat.codecs._additive_search import nearest
from qformat.codecs.additive import Params
from qformat.dtypes import Array

from .. import native

WIDTHS = (1, 2, 4, 8, 16)  # elements of a tile that the library's search for the nearest entry knows
ROWS, COLUMNS, BOOKS = 16, 1024, 64  # of what it decodes, at most


class Additive(Structure):
    _fields_ = [
        ("matrix", native.Head),
        ("codes", c_void_p),
        *((name, c_int64) for name in ("bits", "books", "out_group", "in_group", "run", "row_bytes")),
        ("table", c_void_p),
        ("grid", native.Grid),
        ("scales", native.Values),
    ]


def matrix(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix | None:
    down, across = params.group
    span = params.run * across
    if down & (down - 1) or span & (span - 1) or down > ROWS or span > COLUMNS or params.books > BOOKS:
        return None
    grid = native.grid(params.block, None, shape)
    assert grid is not None  # there is no view
    table = np.ascontiguousarray(parts["table"], np.float32)
    scales, kept = native.values(parts.get("scales"))
    codes = parts["codes"]
    sizes = params.bits, params.books, down, across, params.run, codes.shape[1] * codes.shape[2]
    head = native.Head(3, *shape, down, span)
    return native.Matrix(
        Additive(head, codes.ctypes.data, *sizes, table.ctypes.data, grid, scales), (codes, table, *kept)
    )


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """The codec's ``encode``, its nearest entries found by the library."""
    return codec.encode(params, weight, _nearest if params.group[0] * params.group[1] in WIDTHS[1:] else nearest)


def _nearest(vectors: Array, entries: Array) -> Array:
    codes, best = np.empty(len(vectors), np.uint16), np.empty(1, np.int32)
    half, one = (entries**2).sum(axis=1) / 2, np.ones(1, np.float32)
    native.call(
        *("qf_table_search", np.ascontiguousarray(vectors), vectors.size, 1, 1, 1, one),
        *(entries.shape[1], len(entries), np.ascontiguousarray(entries), half, None, 1, 0, codes, best),
    )
    return codes
