"""``table`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_int64, c_void_p

import numpy as np

from qformat import tables
from qformat.codecs.table import Params
from qformat.dtypes import Array

from .. import native


class Table(Structure):
    _fields_ = [
        ("matrix", native.Head),
        ("codes", c_void_p),
        ("bits", c_int64),
        ("p", c_int64),
        ("table", c_void_p),
        ("grid", native.Grid),
        ("scales", native.Values),
    ]


def matrix(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix | None:
    grid = native.grid(params.block, params.view, shape)
    if grid is None or params.rounding != "none" or (params.stored and parts["table"].shape[:2] != (1, 1)):
        return None
    entries = parts["table"][0, 0] if params.stored else tables.named(params.table)
    bits, entries = _pairs(params.bits, np.ascontiguousarray(entries, np.float32), shape[1])
    scales, kept = native.values(parts.get("scales"))
    p = entries.shape[1]
    head = Table(
        native.Head(1, *shape, 1, 8 * p), parts["codes"].ctypes.data, bits, p, entries.ctypes.data, grid, scales
    )
    return native.Matrix(head, (parts["codes"], entries, *kept))


def _pairs(bits: int, entries: Array, cols: int) -> tuple[int, Array]:
    """Neighbouring codes taken as one code of twice the bits, as long as the table stays small: the same values with
    fewer look-ups.
    """
    while 2 * bits <= 10 and 2 * entries.shape[1] <= 8 and cols % (2 * entries.shape[1]) == 0:
        n = len(entries)
        entries = np.concatenate([np.tile(entries, (n, 1)), np.repeat(entries, n, axis=0)], axis=1)
        bits *= 2
    return bits, entries
