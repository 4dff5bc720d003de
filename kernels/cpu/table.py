"""``table`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_int64, c_void_p

import numpy as np

from qformat import bits as fields
from qformat import blocks, tables
from qformat.codecs import table as codec
from qformat.codecs.table import Params
from qformat.dtypes import NUMPY, Array

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
        ("offsets", native.Values),
    ]


def matrix(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix | None:
    grid = native.grid(params.block, params.view, shape)
    if grid is None or params.rounding != "none" or (params.stored and parts["table"].shape[:2] != (1, 1)):
        return None
    entries = parts["table"][0, 0] if params.stored else tables.named(params.table)
    bits, entries = _pairs(params.bits, np.ascontiguousarray(entries, np.float32), shape[1])
    scales, offsets = (native.values(parts.get(name)) for name in ("scales", "offsets"))
    p = entries.shape[1]
    found = native.Head(1, *shape, 1, 8 * p), parts["codes"].ctypes.data, bits, p, entries.ctypes.data, grid
    held = (parts["codes"], entries, *scales[1], *offsets[1])
    return native.Matrix(Table(*found, scales[0], offsets[0]), held)


def _pairs(bits: int, entries: Array, cols: int) -> tuple[int, Array]:
    """Neighbouring codes taken as one code of twice the bits, as long as the table stays small: the same values with
    fewer look-ups.
    """
    while 2 * bits <= 10 and 2 * entries.shape[1] <= 8 and cols % (2 * entries.shape[1]) == 0:
        n = len(entries)
        entries = np.concatenate([np.tile(entries, (n, 1)), np.repeat(entries, n, axis=0)], axis=1)
        bits *= 2
    return bits, entries


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """The codec's ``encode``, its candidates weighed by the library."""
    if params.stored or params.view is not None or params.rounding != "none" or not isinstance(params.scales, str):
        return codec.encode(params, weight)
    if blocks.size(params.block, weight.shape)[1] % params.p:
        return codec.encode(params, weight)
    entries = np.ascontiguousarray(tables.named(params.table), np.float32)
    grouped = blocks.gather(weight.astype(np.float32), params.block)
    n, number = grouped.shape
    borders, order = _borders(entries)
    codes, best = np.empty((n // params.p, number), np.uint16), np.empty(number, np.int32)
    kept = np.empty(number, np.float32)
    for here in native.stretches(number):
        scale = codec.candidates(params, grouped[:, here], entries)
        native.call(
            *("qf_table_search", grouped[:1, here], n, here.stop - here.start, number, len(scale), scale),
            *(params.p, len(entries), entries, borders, order, number == 1, 0, codes[:1, here], best[here]),
        )
        kept[here] = np.take_along_axis(scale, best[None, here], axis=0)[0]
    rows, cols = blocks.size(params.block, weight.shape)
    matrix = blocks.scatter(codes, (weight.shape[0], weight.shape[1] // params.p), (rows, cols // params.p))
    stored = kept.reshape(blocks.grid(params.block, weight.shape)).astype(NUMPY[params.scales])
    return {"codes": fields.pack(matrix, params.bits), "scales": stored}


def _borders(entries: Array) -> tuple[Array, Array | None]:
    """What the library finds the nearest entry by: see qformat.h."""
    if entries.shape[1] > 1:
        return (entries**2).sum(axis=1) / 2, None
    order = np.argsort(entries[:, 0], kind="stable")
    levels = entries[order, 0]
    return (levels[1:] + levels[:-1]) / 2, order.astype(np.int32)
