"""``int`` in operators of ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qformat import blocks
from qformat.codecs.int import Params

from .body import Body


def decode(body: Body, params: Params, shape: tuple[int, int], parts: Mapping[str, str]) -> str:
    """Mirrors :func:`qformat.codecs.int.decode`: parts -> float32 [out, in]."""
    codes = body.cast(body.unpack(parts["codes"], params.bits, shape), "float32")
    scale = _spread(body, params, shape, parts, "scales")
    if "offsets" in parts:
        offset = _spread(body, params, shape, parts, "offsets")
        if params.rounding == "fused":
            codes, scale, offset = (body.cast(value, "float64") for value in (codes, scale, offset))
            return body.rounded_double(body.op("Add", body.op("Mul", codes, scale), offset), params.round_dtype)
        return _final(body, params, body.op("Add", _each(body, params, body.op("Mul", codes, scale)), offset))
    zero = _spread(body, params, shape, parts, "zeros") if "zeros" in parts else np.float32(params.zero)
    return _final(body, params, body.op("Mul", _each(body, params, body.op("Sub", codes, zero)), scale))


def _spread(body: Body, params: Params, shape: tuple[int, int], parts: Mapping[str, str], name: str) -> str:
    values = body.widen(parts[name], getattr(params, name))
    if "groups" not in parts:
        return body.spread(values, shape, params.block, params.view)
    by_row = body.spread(values, (shape[0], blocks.grid(params.block, shape)[1]), (params.block[0], 1))
    return body.op("Gather", by_row, parts["groups"], axis=1)


def _each(body: Body, params: Params, values: str) -> str:
    return body.rounded(values, params.round_dtype) if params.rounding == "each" else values


def _final(body: Body, params: Params, values: str) -> str:
    return values if params.rounding == "none" else body.rounded(values, params.round_dtype)
