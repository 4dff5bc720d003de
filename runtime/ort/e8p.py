"""``e8p`` in operators of ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qformat import tables
from qformat.codecs.e8p import SHIFTS, SIGNS, WIDTH, Params

from .body import Body


def decode(body: Body, params: Params, shape: tuple[int, int], parts: Mapping[str, str]) -> str:
    """Mirrors :func:`qformat.codecs.e8p.decode`: parts -> float32 [out, in]."""
    codes = body.cast(body.reshape(parts["codes"], shape[0] * shape[1] // WIDTH, params.bits), "int32")
    if params.bits == 1:
        values = body.op("Gather", tables.named("e81b").astype(np.float32), codes)
    else:
        signs, patterns = (body.op("Gather", codes, np.int64(k), axis=1) for k in range(2))
        values = body.op("Gather", tables.named("e8p").astype(np.float32), patterns)
        values = body.op("Mul", values, body.op("Gather", SIGNS, signs))
        values = body.op("Add", values, body.op("Gather", SHIFTS[:, None], signs))
    values = body.reshape(values, *shape)
    if params.scales is not None:
        scales = body.widen(parts["scales"], params.scales)
        values = body.op("Mul", values, body.spread(scales, shape, params.block))
    return values if params.rounding == "none" else body.rounded(values, params.round_dtype)
