"""``int`` for the native library."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_float, c_int64, c_void_p

from qformat.codecs.int import Params
from qformat.dtypes import Array
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
