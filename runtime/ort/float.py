"""``float`` in operators of ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qformat.codecs import float as codec
from qformat.codecs.float import Params

from .body import Body


def decode(body: Body, params: Params, shape: tuple[int, int], parts: Mapping[str, str]) -> str:
    """Mirrors :func:`qformat.codecs.float.decode`: parts -> float32 [out, in]."""
    values = body.op("Gather", codec.elements(params.format), body.unpack(parts["codes"], params.bits, shape))
    if params.scales is not None:
        scale, last = _factors(body, params, parts)
        values = body.op("Mul", values, body.spread(scale, shape, params.block, params.view))
        if last is not None:
            values = body.op("Mul", _each(body, params, values), last)
    return values if params.rounding == "none" else body.rounded(values, params.round_dtype)


def _factors(body: Body, params: Params, parts: Mapping[str, str]) -> tuple[str, str | None]:
    assert params.scales is not None
    scale = body.widen(parts["scales"], params.scales)
    if params.global_scale is None:
        return scale, None
    whole = body.widen(parts["global_scale"], params.global_scale)
    if params.global_divisor != 1:
        whole = body.op("Div", whole, np.float32(params.global_divisor))
    if params.global_form == "last":
        return scale, whole
    return _each(body, params, body.op("Mul" if params.global_form == "multiply" else "Div", scale, whole)), None


def _each(body: Body, params: Params, values: str) -> str:
    return body.rounded(values, params.round_dtype) if params.rounding == "each" else values
