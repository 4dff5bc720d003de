"""The codes of ``trellis``: what a state stands for. Each is defined for states of L bits, ``s`` from 0 to 2**L - 1."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import tables
from ..dtypes import NUMPY, Array
from ..errors import DamagedError, UnsupportedError

if TYPE_CHECKING:
    from .trellis import Params

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}  # of EXL3 since 2025-10; a file may carry others
FACTORS = (2654435769, 668265263)  # 2**32 over the golden ratio, and one of xxHash: they mix the bits of a state
NEEDS = {
    "hash": ("index", "taps", "table"),
    "hyb": ("index", "table"),
    "lut": ("index", "table"),
    "table": ("table",),
}
USES = {"hash": ("shift", "additive"), "mcg": ("multiplier",), "mul1": ("multiplier",)}  # besides
STORED = ("float16", "bfloat16", "float32", "int8")


def stores_table(params: Params) -> bool:
    return params.table in STORED


def table_shape(params: Params) -> tuple[int, int]:
    """[entries, values of an entry]."""
    if params.code == "hash":
        u, v = params.index
        return (2**u + 2**v if params.additive else 2 ** (u + v), 1)
    if params.code in ("hyb", "lut"):
        return 2 ** params.index[0], params.V
    return 2**params.L, params.V


def validate(params: Params) -> None:
    """Raise :class:`DamagedError` where params are given that the code has no use for, or lacks one."""
    allowed = {*NEEDS.get(params.code, ()), *USES.get(params.code, ())}
    given = {
        name: getattr(params, name)
        for name, empty in (
            ("index", ()),
            ("taps", ()),
            ("shift", 0),
            ("additive", False),
            ("table", None),
            ("multiplier", None),
        )
        if getattr(params, name) != empty
    }
    for name in given.keys() - allowed:
        raise DamagedError(f"no {name} beside code {params.code}", str(given[name]))
    for name in NEEDS.get(params.code, ()):
        if name not in given:
            raise DamagedError(f"{name} beside code {params.code}", "none")
    width = {"hyb": (2,), "lut": (1, 2), "table": (1, 2)}.get(params.code, (1,))
    if params.V not in width:
        raise DamagedError(f"V = {width[0]} for code {params.code}", str(params.V))
    if len(params.index) != {"hash": 2, "hyb": 1, "lut": 1}.get(params.code, 0):
        raise DamagedError(
            f"an index of {2 if params.code == 'hash' else 1} numbers for code {params.code}", str(params.index)
        )
    if params.code == "hash":
        reach = max(params.shift + params.index[0], max(params.taps) + 1)
        if reach > params.L:
            raise DamagedError(f"a hash within the L = {params.L} bits of the state", f"{reach} bits")
    if params.table is not None and not stores_table(params):
        found = tables.named(params.table).shape
        if found != table_shape(params):
            raise DamagedError(f"a table of shape {list(table_shape(params))}", f"{params.table} with {list(found)}")


def expand(params: Params, table: Array | None) -> Array:
    """What each state stands for: float32 [2**L, V]."""
    s = np.arange(2**params.L, dtype=np.uint32)
    if params.code == "table":
        assert table is not None
        return table.astype(np.float32)
    if params.code in ("hyb", "lut"):
        assert table is not None
        return _hyb(s, table) if params.code == "hyb" else _lut(s, table)
    if params.code == "hash":
        assert table is not None
        return _hash(params, s, table)[:, None]
    if params.code == "1mad":
        return _1mad(s)[:, None]
    if params.code == "2mad":
        return _2mad(s)[:, None]
    if params.code == "3inst":
        return _two_halves(s * np.uint32(89226354) + np.uint32(64248484))[:, None]
    multiplied = s * np.uint32(params.multiplier if params.multiplier is not None else MULTIPLIERS[params.code])
    return (_two_halves(multiplied) if params.code == "mcg" else _mul1(multiplied))[:, None]


def _byte_sum(x: Array) -> Array:
    out: Array = (x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24)
    return out


def _1mad(s: Array) -> Array:
    """QTIP, bitshift codebook, decode mode 1mad."""
    return _centred(s * np.uint32(34038481) + np.uint32(76625530))


def _2mad(s: Array) -> Array:
    """QTIP, decode mode 2mad: the upper half of a second product is added to the first."""
    x = s * np.uint32(264435761) + np.uint32(1013904223)
    return _centred(x + (x.astype(np.uint64) * np.uint64(1664525) >> np.uint64(32)).astype(np.uint32))


def _centred(x: Array) -> Array:
    """The sum of four bytes with mean 0 and variance 1."""
    return (_byte_sum(x).astype(np.float32) - np.float32(510)) / np.float32(147.800537109375)


def _two_halves(x: Array) -> Array:
    """QTIP's 3inst and EXL3's mcg: two float16 numbers made of the bits of x, added with one float16 rounding."""
    x = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    low, high = (x & 0xFFFF).astype(np.uint16).view(np.float16), (x >> 16).astype(np.uint16).view(np.float16)
    return (low + high).astype(np.float32)


def _mul1(x: Array) -> Array:
    """EXL3's mul1: one fused float16 multiply-add of the byte sum; float64 holds the exact result before the
    rounding.
    """
    a, b = (float(np.uint16(bits).view(np.float16)) for bits in (0x1EEE, 0xC931))
    return ((1024 + _byte_sum(x).astype(np.float64)) * a + b).astype(np.float16).astype(np.float32)


def _hyb(s: Array, table: Array) -> Array:
    """QTIP's quantlut_sym: an index into 2**Q pairs and the sign of the first."""
    bits = len(table).bit_length() - 1
    z = s * (s + np.uint32(1))
    pairs: Array = table[z >> np.uint32(15 - bits) & np.uint32(len(table) - 1)].astype(np.float32)
    pairs[:, 0] = np.where(z & 0x8000, -pairs[:, 0], pairs[:, 0])
    return pairs


def _lut(s: Array, table: Array) -> Array:
    """QTIP's quantlut: the index alone."""
    z = s * (s + np.uint32(1))
    entries: Array = table[z >> np.uint32(17 - len(table).bit_length()) & np.uint32(len(table) - 1)].astype(np.float32)
    return entries


def _hash(params: Params, s: Array, table: Array) -> Array:
    """Two filtered copies of the bit string: u = s >> shift, v = xor of s >> tap; the entry at u | v << bits of u, or
    the sum of an entry for u and one for v.
    """
    u_bits, v_bits = params.index
    u = s >> np.uint32(params.shift) & np.uint32(2**u_bits - 1)
    v = np.bitwise_xor.reduce([s >> np.uint32(tap) for tap in params.taps]) & np.uint32(2**v_bits - 1)
    entries: Array = table[:, 0].astype(np.float32)
    out: Array = entries[u] + entries[2**u_bits + v] if params.additive else entries[u | v << np.uint32(u_bits)]
    return out


def initial_table(params: Params) -> Array:
    """A table to encode with where the weight stores its own: Gaussian quantiles, each of the V values in an order of
    its own that mixes the state's bits.

    Raises :class:`DamagedError` for ``hash``, ``hyb`` and ``lut``, for which there are named tables.
    """
    assert params.table is not None
    if params.code != "table":
        raise DamagedError("a named table when encoding with code " + params.code, params.table)
    s = np.arange(2**params.L, dtype=np.uint32)
    quantiles = np.array([NormalDist().inv_cdf((k + 0.5) / len(s)) for k in range(len(s))], np.float32)
    orders = [np.argsort(s * np.uint32(factor) ^ s >> 7) for factor in FACTORS[: params.V]]
    levels = np.stack([quantiles[order] for order in orders], axis=1)
    table: Array = np.rint(levels * np.float32(127 / 4.5)) if params.table == "int8" else levels
    return table.astype(NUMPY[params.table])


HASHES: dict[int, dict[str, Any]] = {  # bits -> shift, taps and table, found together (`bench/train_hash.py`)
    2: {"shift": 7, "taps": [0, 2, 10], "index": [2, 2], "table": "hash-16"},
    3: {"shift": 4, "taps": [0, 9], "index": [3, 3], "table": "hash-64"},
    4: {"shift": 5, "taps": [0, 2, 8], "index": [4, 4], "table": "hash-16+16", "additive": True},
}


def preset(widths: list[int], code: str | None) -> dict[str, Any]:
    """The params of a code: ``hash`` at 2 to 4 bits and ``mul1`` elsewhere unless one is asked for."""
    tuned = HASHES.get(widths[0]) if len(widths) == 1 else None
    code = code or ("hash" if tuned else "mul1")
    if code == "hash":
        if tuned is None:
            raise UnsupportedError("2, 3 or 4 bits for code hash, unless its table is given", str(widths))
        return {"L": 12, "code": code, **tuned}
    if code == "hyb":
        return {"L": 16, "V": 2, "code": code, "index": [9], "table": "hyb-q9"}
    if code == "table":
        return {"L": 12, "code": code, "table": "float16"}
    return {"L": 16, "code": code}
