"""``trellis`` in operators of ONNX: the value of every state, then a state for every element of the matrix."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qformat import tables
from qformat.codecs import trellis as codec
from qformat.codecs.trellis import Params

from .body import Body

WORD = np.int64(0xFFFFFFFF)  # 32-bit arithmetic in int64, which every runtime has


def decode(body: Body, params: Params, shape: tuple[int, int], parts: Mapping[str, str]) -> str:
    """Mirrors :func:`qformat.codecs.trellis.decode`: parts -> float32 [out, in].

    Each element of a tile reads its own step's window, so that nothing need be moved within a tile afterwards.
    """
    number = np.argsort(codec.place(params)).reshape(params.tile)  # of the element at each place of the tile
    state = body.windows(parts["codes"], params.string_bits // 8, params.starts[number // params.V], params.L)
    if params.V > 1:
        state = body.op("Add", body.op("Mul", state, np.int32(params.V)), (number % params.V).astype(np.int32))
    tiles = body.op("Transpose", body.op("Gather", _values(body, params, parts), state), perm=[0, 2, 1, 3])
    values = body.reshape(tiles, *shape)
    if params.scales is not None:
        scales = body.widen(parts["scales"], params.scales)
        values = body.op("Mul", values, body.spread(scales, shape, params.block))
    return values


def _values(body: Body, params: Params, parts: Mapping[str, str]) -> str:
    """What each state stands for: float32 [2**L * V]. Mirrors ``qformat.codecs._trellis_codes.expand``."""
    table = ""
    if codec.states.stores_table(params):
        table = body.widen(parts["table"], str(params.table))
    elif params.table is not None:
        table = body.constant(tables.named(params.table).astype(np.float32))
    if params.code == "table":
        return body.reshape(table, -1)
    s = body.op("Range", np.int64(0), np.int64(2**params.L), np.int64(1))
    if params.code in ("hyb", "lut"):
        return _hyb(body, params, s, table) if params.code == "hyb" else _lut(body, params, s, table)
    if params.code == "hash":
        return _hash(body, params, s, body.reshape(table, -1))
    if params.code in ("1mad", "2mad"):
        x = _linear(body, s, 34038481, 76625530) if params.code == "1mad" else _2mad(body, s)
        return body.op("Div", body.op("Sub", _byte_sum(body, x), np.float32(510)), np.float32(147.800537109375))
    if params.code == "3inst":
        return _two_halves(body, _linear(body, s, 89226354, 64248484))
    factor = params.multiplier if params.multiplier is not None else codec.states.MULTIPLIERS[params.code]
    word = _linear(body, s, factor, 0)
    return _two_halves(body, word) if params.code == "mcg" else _mul1(body, word)


def _linear(body: Body, s: str, factor: int, term: int) -> str:
    product = body.op("Add", body.op("Mul", s, np.int64(factor)), np.int64(term))
    return body.op("BitwiseAnd", product, WORD)


def _2mad(body: Body, s: str) -> str:
    x = _linear(body, s, 264435761, 1013904223)
    upper = body.op("Div", body.op("Mul", x, np.int64(1664525)), np.int64(1 << 32))
    return body.op("BitwiseAnd", body.op("Add", x, upper), WORD)


def _bits(body: Body, x: str, first: int, count: int) -> str:
    shifted = body.op("Div", x, np.int64(1 << first)) if first else x
    return body.op("BitwiseAnd", shifted, np.int64((1 << count) - 1))


def _byte_sum(body: Body, x: str) -> str:
    return body.op("Sum", *(body.cast(_bits(body, x, first, 8), "float32") for first in (0, 8, 16, 24)))


def _two_halves(body: Body, x: str) -> str:
    """The masks leave only exponents of normal numbers: a half is (1024 + mantissa) times a power of two, and the sum
    of two is exact in float32, where it is rounded to float16 once.
    """
    x = body.op("BitwiseXor", body.op("BitwiseAnd", x, np.int64(0x8FFF8FFF)), np.int64(0x3B603B60))
    power = (np.arange(64, dtype=np.uint16) << 10).view(np.float16).astype(np.float32) / np.float32(1024)
    halves = []
    for first in (0, 16):
        mantissa = body.op("Add", body.cast(_bits(body, x, first, 10), "float32"), np.float32(1024))
        halves.append(body.op("Mul", mantissa, body.op("Gather", power, _bits(body, x, first + 10, 6))))
    return body.rounded(body.op("Add", *halves), "float16")


def _mul1(body: Body, x: str) -> str:
    """Product and sum of these two float16 numbers fit float32 exactly."""
    a, b = (np.uint16(word).view(np.float16).astype(np.float32) for word in (0x1EEE, 0xC931))
    total = body.op("Add", _byte_sum(body, x), np.float32(1024))
    return body.rounded(body.op("Add", body.op("Mul", total, a), b), "float16")


def _hyb(body: Body, params: Params, s: str, table: str) -> str:
    bits = params.index[0]
    z = body.op("Mul", s, body.op("Add", s, np.int64(1)))
    pairs = body.op("Gather", table, _bits(body, z, 15 - bits, bits))
    negative = body.reshape(body.cast(_bits(body, z, 15, 1), "bool"), -1, 1)
    first = body.op("And", negative, np.array([[True, False]]))
    return body.reshape(body.op("Where", first, body.op("Neg", pairs), pairs), -1)


def _lut(body: Body, params: Params, s: str, table: str) -> str:
    bits = params.index[0]
    z = body.op("Mul", s, body.op("Add", s, np.int64(1)))
    return body.reshape(body.op("Gather", table, _bits(body, z, 16 - bits, bits)), -1)


def _hash(body: Body, params: Params, s: str, entries: str) -> str:
    u_bits, v_bits = params.index
    u = _bits(body, s, params.shift, u_bits)
    v = ""
    for tap in params.taps:
        filtered = _bits(body, s, tap, v_bits)
        v = body.op("BitwiseXor", v, filtered) if v else filtered
    if params.additive:
        second = body.op("Add", v, np.int64(2**u_bits))
        return body.op("Add", body.op("Gather", entries, u), body.op("Gather", entries, second))
    return body.op("Gather", entries, body.op("Add", u, body.op("Mul", v, np.int64(2**u_bits))))
