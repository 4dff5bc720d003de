"""``trellis``: a bitshift trellis; each state of L bits is a window of a tile's cyclic bit string and stands for V
values.

Page: ``spec/codecs/trellis.md``. After QTIP (Tseng et al. 2024); one layout holds QTIP, YAQA and EXL3 files and our
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from .. import blocks, tables
from ..dtypes import NUMPY, Array, Scale, held
from ..errors import DamagedError, UnsupportedError
from ..layout import Packed, Part
from ..records import Record
from . import _trellis_codes as states
from . import _trellis_search as search

NAME = "trellis"
CHUNK = 1 << 12  # tiles decoded at a time: bounds the memory of the unpacked bit strings


class Params(Record, frozen=True, kw_only=True):
    """``value = code(state) * scale``. ``bits`` is a cyclic list of bits per weight, one for each step; ``order``
    names, lowest first, the bit of the row (r) or column (c) that each bit of an element's number is. ``shift``,
    ``taps``, ``index`` and ``additive`` belong to the code ``hash`` (``index``, the bits of an index into a table, to
    ``hyb`` and ``lut`` too); ``multiplier`` to ``mcg`` and ``mul1``; ``table`` to ``hash``, ``hyb``, ``lut`` and
    ``table``: a named table, or the dtype of the part ``table``.
    """

    L: Annotated[int, Meta(ge=8, le=16)]
    V: Literal[1, 2] = 1
    bits: Annotated[tuple[Annotated[int, Meta(ge=1, le=8)], ...], Meta(min_length=1, max_length=32)]
    code: Literal["hash", "1mad", "2mad", "3inst", "hyb", "lut", "mcg", "mul1", "table"]
    tile: tuple[Annotated[int, Meta(ge=1, le=4096)], Annotated[int, Meta(ge=1, le=4096)]] = (16, 16)
    order: str
    reversed: bool = False
    multiplier: Annotated[int, Meta(ge=0, lt=1 << 32)] | None = None
    shift: Annotated[int, Meta(ge=0, le=15)] = 0
    taps: Annotated[tuple[Annotated[int, Meta(ge=0, le=15)], ...], Meta(max_length=16)] = ()
    index: Annotated[tuple[Annotated[int, Meta(ge=1, le=12)], ...], Meta(max_length=2)] = ()
    additive: bool = False
    table: str | None = None
    block: tuple[int, int] = (1, -1)
    scales: Scale | Packed | None = None

    def __post_init__(self) -> None:
        blocks.validate(self.block, None)
        if any(self.V * bits > self.L for bits in self.bits) or 32 % len(self.bits):
            raise DamagedError(
                f"bits whose number divides 32, each at most L / V = {self.L // self.V}", str(list(self.bits))
            )
        rows, cols = (side.bit_length() - 1 for side in self.tile)
        if (1 << rows, 1 << cols) != self.tile or not 32 <= self.tile[0] * self.tile[1] <= 4096:
            raise DamagedError("a tile of powers of two with 32 to 4096 elements", str(list(self.tile)))
        if sorted(self.order.split(" ")) != sorted([f"r{i}" for i in range(rows)] + [f"c{i}" for i in range(cols)]):
            raise DamagedError(f"an order of the bits of a {self.tile[0]} x {self.tile[1]} tile", repr(self.order))
        if self.string_bits < self.L or self.string_bits % 8:
            raise DamagedError(
                f"a bit string of whole bytes and at least L = {self.L} bits", f"{self.string_bits} bits"
            )
        states.validate(self)

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.tile[0] * self.tile[1] // self.V

    @property
    def starts(self) -> Array:
        """The bit at which each step's window starts, int64 [steps + 1]; the last is the length of the string."""
        widths = self.V * np.resize(np.array(self.bits), self.steps)
        return np.concatenate([[0], np.cumsum(widths)])

    @property
    def string_bits(self) -> int:
        return int(self.starts[-1])


def layout(params: Params, shape: tuple[int, int]) -> list[Part]:
    (rows, cols), (high, wide) = shape, params.tile
    if rows % high or cols % wide:
        raise DamagedError(
            f"rows and columns in whole {high} x {wide} tiles", f"{rows} x {cols}", hint="see stored_shape"
        )
    size = (rows // high, cols // wide, params.string_bits // 8)
    parts = [Part("codes", "uint8", size, 0, Fraction(high), 1, Fraction(wide))]
    if params.scales is not None:
        parts.append(blocks.part("scales", params.scales, shape, params.block))
    if states.stores_table(params):
        assert params.table is not None
        parts.append(Part("table", params.table, states.table_shape(params)))
    return parts


def values(params: Params, parts: Mapping[str, Array]) -> Array:
    """What each state stands for: float32 [2**L, V]."""
    table = parts["table"] if states.stores_table(params) else tables.named(params.table) if params.table else None
    return states.expand(params, table)


def place(params: Params) -> Array:
    """Element number of step u, value v (``u * V + v``) -> its index in the row-major tile: int32 [elements of a
    tile].
    """
    number = np.arange(params.tile[0] * params.tile[1])
    row, col = np.zeros_like(number), np.zeros_like(number)
    for bit, name in enumerate(params.order.split()):
        target = row if name[0] == "r" else col
        target |= (number >> bit & 1) << int(name[1:])
    place = (row * params.tile[1] + col).reshape(params.steps, params.V)
    return (place[::-1] if params.reversed else place).ravel().astype(np.int32)


def unpack(params: Params, codes: Array) -> Array:
    """uint8 [tiles, bytes] -> the state of every step, uint16 [tiles, steps]."""
    string = np.unpackbits(codes, axis=-1, bitorder="little")
    starts = params.starts[:-1]
    state = np.zeros((len(codes), params.steps), np.uint16)
    for i in range(params.L):
        state |= string[:, (starts + i) % params.string_bits].astype(np.uint16) << i
    return state


def pack(params: Params, state: Array) -> Array:
    """The inverse of :func:`unpack` for states of a closed path: each step contributes the bits that it starts with."""
    starts = params.starts
    string = np.zeros((len(state), params.string_bits), np.uint8)
    for u in range(params.steps):
        for i in range(starts[u + 1] - starts[u]):
            string[:, starts[u] + i] = state[:, u] >> i & 1
    return np.packbits(string, axis=-1, bitorder="little")


def to_steps(params: Params, weight: Array) -> Array:
    """Matrix -> [tiles, steps, V] in the order of the trellis."""
    (rows, cols), (high, wide) = weight.shape, params.tile
    tiles = weight.reshape(rows // high, high, cols // wide, wide).transpose(0, 2, 1, 3).reshape(-1, high * wide)
    return np.ascontiguousarray(tiles[:, place(params)]).reshape(-1, params.steps, params.V)


def from_steps(params: Params, steps: Array, shape: tuple[int, int]) -> Array:
    """The inverse of :func:`to_steps`."""
    (rows, cols), (high, wide) = shape, params.tile
    tiles = np.empty((len(steps), high * wide), steps.dtype)
    tiles[:, place(params)] = steps.reshape(len(steps), -1)
    return tiles.reshape(rows // high, cols // wide, high, wide).transpose(0, 2, 1, 3).reshape(shape)


def decode(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    table = values(params, parts)
    codes = parts["codes"].reshape(-1, params.string_bits // 8)
    steps = np.empty((len(codes), params.steps, params.V), np.float32)
    for start in range(0, len(codes), CHUNK):
        steps[start : start + CHUNK] = table[unpack(params, codes[start : start + CHUNK])]
    out = from_steps(params, steps, shape)
    if params.scales is not None:
        out *= blocks.spread(parts["scales"].astype(np.float32), shape, params.block)
    return out


def encode(params: Params, weight: Array, path: search.Search = search.viterbi) -> dict[str, Array]:
    """float32 [out, in] in whole tiles -> parts. ``path`` finds the states; scales are fitted to it afterwards."""
    if params.scales is not None and not isinstance(params.scales, str):
        raise UnsupportedError("parts with a dtype when encoding", "packed parts")
    weight = weight.astype(np.float32)
    parts: dict[str, Array] = {}
    if states.stores_table(params):
        parts["table"] = states.initial_table(params)
    table = values(params, parts)
    scale = np.ones((1, 1), np.float32)
    if params.scales is not None:
        scale = _scales(params, weight, table)
    full = blocks.spread(scale, weight.shape, params.block) if params.scales is not None else scale
    with np.errstate(divide="ignore", invalid="ignore"):
        target = np.where(full == 0, np.float32(0), weight / full)
    parts["codes"] = path(params, to_steps(params, target), table)
    if params.scales is not None:
        plain = Params(**{**{f: getattr(params, f) for f in params.__struct_fields__}, "scales": None})
        units = decode(plain, weight.shape, parts | {"codes": parts["codes"]})
        parts["scales"] = _refit(params, weight, units, scale)
    tiles = weight.shape[0] // params.tile[0], weight.shape[1] // params.tile[1]
    parts["codes"] = parts["codes"].reshape(*tiles, -1)
    return parts


def gain(params: Params) -> float:
    """The root mean square that a source is brought to, in units of the table's: a finer trellis wants more of the
    table's reach, a small table less of it. Measured on Gaussian samples (`bench/distortion.py`).
    """
    above = float(np.mean(params.bits)) - 2
    return 0.94 - 0.045 * above if params.code == "hash" else min(1.0, max(0.8, 1.0 - 0.05 * above))


def _scales(params: Params, weight: Array, table: Array) -> Array:
    grouped = blocks.gather(weight, params.block)
    spread = np.sqrt((grouped**2).mean(axis=0)) / np.sqrt((table**2).mean()) / gain(params)
    return held(spread.reshape(blocks.grid(params.block, weight.shape)), str(params.scales))


def _refit(params: Params, weight: Array, units: Array, scale: Array) -> Array:
    """The scale of each block with the smallest squared error for the chosen path."""
    target, found = blocks.gather(weight, params.block), blocks.gather(units, params.block)
    energy = (found**2).sum(axis=0)
    best = np.where(energy > 0, (target * found).sum(axis=0) / np.maximum(energy, 1e-30), scale.ravel())
    return held(best.reshape(scale.shape), str(params.scales)).astype(NUMPY[str(params.scales)])


def check(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` for numbers that no encoder writes. Every bit string is a valid path."""
    blocks.check_finite({name: parts[name] for name in ("scales", "table") if name in parts})


ORDERS = {
    1: "c0 c1 c2 c3 r0 r1 r2 r3",
    2: "c2 c3 c0 c1 r0 r1 r2 r3",
    3: "c0 c1 r0 r1 r2 r3 c2 c3",
    4: "c2 c0 c1 r0 r1 r2 r3 c3",
}


def units(params: Params) -> tuple[int, int]:
    """Rows and columns come in whole tiles."""
    return params.tile


def preset(bits: float, rotated: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The params for ``quantize --codec trellis --bits BITS``: the code ``hash`` at 2 to 4 bits with L = 12, else
    ``mul1`` with L = 16. A fraction of eighths alternates between neighbouring widths. One scale for a rotated
    weight, else one a row.
    """
    if not 1 <= bits <= 8 or bits * 8 != int(bits * 8):
        raise UnsupportedError("eighths of bits from 1 to 8 for trellis", f"{bits:g}")
    widths = _widths(bits)
    order = ORDERS.get(widths[0] if len(widths) == 1 else 1, ORDERS[1])
    code = states.preset(widths, settings.get("code"))
    scales = {"block": [-1, -1] if rotated else [1, -1], "scales": "float16"}
    return {"bits": widths, "order": order, **code, **scales, **settings}


def _widths(bits: float) -> list[int]:
    """The shortest cyclic list of whole widths, as even as possible, whose mean is ``bits``."""
    length = Fraction(bits).limit_denominator(8).denominator
    ends = [math.floor(bits * i + 1e-9) for i in range(length + 1)]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]
