"""``e8p`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_int64, c_void_p

import numpy as np

from qformat.codecs import e8p as codec
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
    points = (codec.table(params.bits) * 4).astype(np.int8)
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


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """The codec's ``encode``, its points found by the library: equal bit for bit."""
    vectors, scales = codec.scaled(params, weight)
    codes = nearest(vectors.reshape(-1, codec.WIDTH), params.bits)
    return {"codes": codes.reshape(*vectors.shape[:2], params.bits), **scales}


def nearest(vectors: Array, bits: int, *, threads: int = 0) -> Array:
    """The code of the point nearest to each of ``vectors``, float32 [n, 8]: uint8 [n, bits]."""
    codes = np.empty((len(vectors), bits), np.uint8)
    source = np.ascontiguousarray(vectors, np.float32)
    native.call("qf_e8p_search", source, len(source), bits, codec.table(bits), threads, codes)
    return codes
