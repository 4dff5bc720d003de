"""``table`` in operators of ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qformat import blocks, tables
from qformat.codecs.table import Params

from .body import Body


def decode(body: Body, params: Params, shape: tuple[int, int], parts: Mapping[str, str]) -> str:
    """Mirrors :func:`qformat.codecs.table.decode`: parts -> float32 [out, in]."""
    vectors = shape[0], shape[1] // params.p
    codes = body.unpack(parts["codes"], params.bits, vectors)
    if params.stored:
        entries = body.reshape(body.widen(parts["table"], params.table), -1, params.p)
        down, across = blocks.grid(params.table_block, shape)
        if down * across > 1:
            firsts = body.op("Range", np.int32(0), np.int32(down * across << params.bits), np.int32(1 << params.bits))
            rows, cols = blocks.size(params.table_block, shape)
            first = body.spread(body.reshape(firsts, down, across), vectors, (rows, cols // params.p))
            codes = body.op("Add", codes, first)
        values = body.op("Gather", entries, codes)
    else:
        values = body.op("Gather", tables.named(params.table).astype(np.float32), codes)
    values = body.reshape(values, *shape)
    if params.scales is not None:
        scales = body.widen(parts["scales"], params.scales)
        values = body.op("Mul", values, body.spread(scales, shape, params.block, params.view))
    if params.offsets is not None:
        offsets = body.widen(parts["offsets"], params.offsets)
        values = body.op("Add", values, body.spread(offsets, shape, params.block, params.view))
    return values if params.rounding == "none" else body.rounded(values, params.round_dtype)
