"""``int`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_float, c_int64, c_void_p

import numpy as np

from qformat import bits as fields
from qformat import blocks
from qformat.codecs import int as codec
from qformat.codecs.int import Params
from qformat.dtypes import NUMPY, Array
from qformat.errors import DamagedError

from .. import native


class Int(Structure):
    _fields_ = [
        ("matrix", native.Head),
        ("codes", c_void_p),
        ("bits", c_int64),
        ("grid", native.Grid),
        ("scales", native.Values),
        ("zeros", native.Values),
        ("offsets", native.Values),
        ("groups", c_void_p),
        ("zero", c_float),
    ]


def matrix(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix | None:
    grid = native.grid(params.block, params.view, shape)
    if grid is None or params.rounding != "none":
        return None
    groups = parts.get("groups")
    if groups is not None and groups.size and not 0 <= groups.min() <= groups.max() < grid.across:
        raise DamagedError(f"groups from 0 to {grid.across - 1}", f"{groups.min()} to {groups.max()}")
    scales, zeros, offsets = (native.values(parts.get(name)) for name in ("scales", "zeros", "offsets"))
    head = Int(
        native.Head(0, *shape, 1, 8),
        parts["codes"].ctypes.data,
        params.bits,
        grid,
        scales[0],
        zeros[0],
        offsets[0],
        None if groups is None else groups.ctypes.data,
        params.zero,
    )
    held = (parts["codes"], *scales[1], *zeros[1], *offsets[1], *([] if groups is None else [groups]))
    return native.Matrix(head, held)


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """The codec's ``encode``, its candidates weighed by the library: equal bit for bit."""
    if params.groups or params.rounding != "none":
        return codec.encode(params, weight)
    grouped = blocks.gather(weight.astype(np.float32), params.block, params.view)
    n, number = grouped.shape
    top = np.float32(2**params.bits - 1)
    codes, best = np.empty((n, number), np.uint16), np.empty(number, np.int32)
    names = ("scales", "zeros", "offsets")
    kept = {name: np.empty(number, np.float32) for name in names}
    for here in native.stretches(number):
        tried = zip(*codec.candidates(params, grouped[:, here], top), strict=True)
        tables = {name: np.stack(values) for name, values in zip(names, tried, strict=True)}
        native.call(
            *("qf_int_search", grouped[:1, here], n, here.stop - here.start, number, len(tables["scales"])),
            *(tables["scales"], tables["zeros"], tables["offsets"], 0.0, top, number == 1, 0),
            *(codes[:1, here], best[here]),
        )
        for name in names:
            kept[name][here] = np.take_along_axis(tables[name], best[None, here], axis=0)[0]
    matrix = blocks.scatter(codes.astype(np.uint8), weight.shape, params.block, params.view)
    parts = {"codes": fields.pack(matrix, params.bits)}
    for name in names:
        if (dtype := getattr(params, name)) is not None:
            stored = kept[name].reshape(blocks.grid(params.block, params.view or weight.shape))
            parts[name] = stored.astype(NUMPY[dtype])
    return parts
