"""``additive`` in operators of ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qformat.codecs.additive import Params

from .body import Body


def decode(body: Body, params: Params, shape: tuple[int, int], parts: Mapping[str, str]) -> str:
    """Mirrors :func:`qformat.codecs.additive.decode`: parts -> float32 [out, in]."""
    down, across = params.group
    rows, groups = shape[0] // down, shape[1] // across
    runs = -(-groups // params.run)
    size = runs * params.run * params.books * params.bits // 8
    stream = body.reshape(parts["codes"], rows, size)
    codes = body.unpack(stream, params.bits, (rows, runs * params.run * params.books))
    if runs * params.run != groups:
        codes = body.cut(codes, groups * params.books)
    codes = body.reshape(codes, rows * groups, params.books)
    entries = body.reshape(body.widen(parts["table"], params.table), -1, down * across)
    tiles = ""
    for book in range(params.books):
        code = body.op("Gather", codes, np.int64(book), axis=1)
        picked = body.op("Gather", entries, body.op("Add", code, np.int32(book << params.bits)))
        tiles = body.op("Add", tiles, picked) if book else picked
    if down > 1:
        tiles = body.op("Transpose", body.reshape(tiles, rows, groups, down, across), perm=[0, 2, 1, 3])
    values = body.reshape(tiles, *shape)
    if params.scales is not None:
        scales = body.widen(parts["scales"], params.scales)
        values = body.op("Mul", values, body.spread(scales, shape, params.block))
    return values
