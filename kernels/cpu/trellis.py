"""``trellis`` for the native library: its decoder and the tail-biting search."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from ctypes import Structure, c_int64, c_void_p

import msgspec
import numpy as np

from qformat.codecs import trellis as codec
from qformat.codecs.trellis import Params
from qformat.dtypes import Array

from .. import native


class Trellis(Structure):
    _fields_ = [
        ("matrix", native.Head),
        ("codes", c_void_p),
        ("L", c_int64),
        ("V", c_int64),
        ("string_bits", c_int64),
        ("starts", c_void_p),
        ("values", c_void_p),
        ("place", c_void_p),
        ("grid", native.Grid),
        ("scales", native.Values),
    ]


def matrix(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix | None:
    grid = native.grid(params.block, None, shape)
    if grid is None:
        return None
    starts, place, values = _shared(msgspec.structs.replace(params, scales=None, block=(1, -1)))
    if "table" in parts:
        values = codec.values(params, parts)
    scales, kept = native.values(parts.get("scales"))
    head = Trellis(
        native.Head(2, *shape, *params.tile),
        parts["codes"].ctypes.data,
        params.L,
        params.V,
        params.string_bits,
        starts.ctypes.data,
        values.ctypes.data,
        place.ctypes.data,
        grid,
        scales,
    )
    return native.Matrix(head, (parts["codes"], starts, place, values, *kept))


@functools.lru_cache(maxsize=16)
def _shared(params: Params) -> tuple[Array, Array, Array]:
    """What weights of equal settings have in common: starts, places and, unless each stores its own table, values."""
    stored = codec.states.stores_table(params)
    values = np.empty(0, np.float32) if stored else codec.values(params, {})
    return params.starts[:-1].astype(np.int32), codec.place(params), np.ascontiguousarray(values)


def search(params: Params, targets: Array, values: Array, *, seam: int = 0, threads: int = 0) -> Array:
    """The path of each tile, float32 [tiles, steps, V] -> packed strings uint8 [tiles, bytes]; equal to
    :func:`qformat.codecs._trellis_search.viterbi` bit for bit. ``seam`` > 0 shortens the first pass to that many steps.
    """
    codes, _ = search_error(params, targets, values, seam=seam, threads=threads)
    return codes


def search_error(
    params: Params, targets: Array, values: Array, *, seam: int = 0, threads: int = 0
) -> tuple[Array, Array]:
    """As :func:`search`, and the squared error of each tile, float64 [tiles]."""
    tiles, steps, width = targets.shape
    targets, values = np.ascontiguousarray(targets, np.float32), np.ascontiguousarray(values, np.float32)
    assert (steps, width) == (params.steps, params.V) and values.shape == (2**params.L, params.V)
    bits = np.array(params.bits, np.int32)
    codes, error = np.empty((tiles, params.string_bits // 8), np.uint8), np.empty(tiles)
    native.call(
        *("qf_trellis_encode", targets, tiles, steps, values, params.L, params.V, bits, len(bits), seam, threads),
        *(codes, error),
    )
    return codes, error


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """The codec's ``encode``, its paths found by the library."""
    return codec.encode(params, weight, path=search)
