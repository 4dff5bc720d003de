"""``e8p`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_int64, c_void_p

import numpy as np

from qformat import tables
from qformat.codecs.e8p import Params
from qformat.dtypes import Array, rounded

from .. import native

CODE = 5  # in qformat.h
QUARTERS = np.arange(-32, 32)  # that a value may be, before its scale


class E8P(Structure):
    _fields_ = [
        ("matrix", native.Head),
        ("codes", c_void_p),
        ("bits", c_int64),
        ("points", c_void_p),
        ("numbers", c_void_p),
        ("grid", native.Grid),
        ("scales", native.Values),
    ]


def matrix(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix | None:
    grid = native.grid(params.block, None, shape)
    assert grid is not None  # there is no view
    points = (tables.named("e8p" if params.bits == 2 else "e81b").astype(np.float32) * 4).astype(np.int8)
    numbers, stored = (QUARTERS / 4).astype(np.float32), parts.get("scales")
    if stored is not None and stored.size == 1:  # a single scale is taken in
        numbers, stored = numbers * stored.astype(np.float32).reshape(1), None
    if params.rounding == "once":
        if stored is not None:
            return None
        numbers = rounded(numbers, params.round_dtype)
    scales, kept = native.values(stored)
    head = native.Head(CODE, *shape, 1, 8)
    codes = parts["codes"]
    return native.Matrix(
        E8P(head, codes.ctypes.data, params.bits, points.ctypes.data, numbers.ctypes.data, grid, scales),
        (codes, points, numbers, *kept),
    )
