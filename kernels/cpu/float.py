"""``float`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_float, c_int64, c_void_p

import numpy as np

from qformat import blocks
from qformat.codecs import float as codec
from qformat.codecs.float import Params
from qformat.dtypes import Array

from .. import native


class Float(Structure):
    _fields_ = [
        ("matrix", native.Head),
        ("codes", c_void_p),
        ("bits", c_int64),
        ("p", c_int64),
        ("table", c_void_p),
        ("grid", native.Grid),
        ("scales", native.Values),
        ("scale_numbers", c_void_p),
        ("last", c_float),
    ]


def matrix(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix | None:
    grid = native.grid(params.block, params.view, shape)
    if grid is None or params.rounding != "none":
        return None
    bits, table = params.bits, codec.elements(params.format)[:, None]
    if bits == 4 and shape[1] % 2 == 0:  # two codes at a time
        bits, table = 8, np.concatenate([np.tile(table, (16, 1)), np.repeat(table, 16, axis=0)], axis=1)
    p, last = table.shape[1], 1.0
    scales: Array | None = None
    numbers: Array | None = None
    if params.scales is not None:
        scales = parts["scales"]
        if scales.dtype.itemsize == 1:  # stay bytes: what each stands for is looked up
            numbers = np.arange(256, dtype=np.uint8).view(scales.dtype)
            with np.errstate(invalid="ignore"):
                numbers, whole = codec.factors(params, {**parts, "scales": numbers})
            scales = scales.view(np.uint8)
        else:
            factor, whole = codec.factors(params, parts)
            scales = scales if params.global_scale is None or whole is not None else factor
        last = 1.0 if whole is None else float(whole[0])
    values, kept = native.values(scales)
    address = None if numbers is None else numbers.ctypes.data
    head = Float(
        native.Head(CODE, *shape, 1, 8 * p),
        *(parts["codes"].ctypes.data, bits, p, table.ctypes.data, grid, values, address, last),
    )
    return native.Matrix(head, (parts["codes"], table, *kept, *([] if numbers is None else [numbers])))


CODE = 4  # QF_FLOAT of qformat.h


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """The codec's ``encode``, its candidates weighed by the library."""
    if params.scales is None or params.global_form == "last" and params.global_scale is not None:
        return codec.encode(params, weight)
    grouped = blocks.gather(weight.astype(np.float32), params.block, params.view)
    parts = codec.global_part(params, grouped)
    n, number = grouped.shape
    levels, codes_of = codec.magnitudes(params.format)
    borders, order = (levels[1:] + levels[:-1]) / 2, np.arange(len(levels), dtype=np.int32)
    found, best = np.empty((n, number), np.uint16), np.empty(number, np.int32)
    kept = np.empty(number, np.float32)
    for here in native.stretches(number):
        tried = list(codec.candidates(params, grouped[:, here], parts))
        scale, factor = (np.stack(one) for one in zip(*tried, strict=True))
        native.call(
            *("qf_table_search", grouped[:1, here], n, here.stop - here.start, number, len(factor), factor),
            *(1, len(levels), levels, borders, order, number == 1, 0, found[:1, here], best[here]),
        )
        kept[here] = np.take_along_axis(scale, best[None, here], axis=0)[0]
    return codec.stored(params, weight.shape, codes_of[found], kept, parts)
