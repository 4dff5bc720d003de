"""``e8p``: codes of eight values at a time, points of the lattice E8, with a scale per block. Page:
``spec/codecs/e8p.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from .. import blocks, tables
from ..dtypes import NUMPY, Array, Float, Scale, held, rounded
from ..errors import DamagedError, UnsupportedError
from ..layout import Packed, Part
from ..records import Record

NAME = "e8p"
WIDTH = 8  # values of a code
SUMS = {3: (2, 1), 4: (2, 2)}
GAIN = {1: 0.61, 2: 1.03}  # root mean square of Gaussian numbers that the codebook takes best: `bench/distortion.py`
SEARCHED = 1 << 18  # products of vectors and patterns held at a time: bounds the memory of the search

# For each byte of signs and each value of a vector: its sign, and what is added to all eight. Bit 0 is flipped where
# the number of ones is odd, so that it is even.
_BYTE = np.arange(256)
_ODD = (_BYTE[:, None] >> np.arange(8) & 1).sum(axis=1) % 2
SIGN_BITS = np.array([0, 4, 1, 5, 2, 6, 3, 7])
SIGNS = (1 - 2.0 * ((_BYTE ^ _ODD)[:, None] >> SIGN_BITS & 1)).astype(np.float32)
SHIFTS = np.where(_ODD, -0.25, 0.25).astype(np.float32)


class Params(Record, frozen=True, kw_only=True):
    """``value = point[code] * scale``. ``bits`` 2: a byte of signs and one that picks a pattern; 1: one that picks a
    point.
    """

    bits: Literal[1, 2] = 2
    block: tuple[int, int] = (-1, -1)
    scales: Scale | Packed | None = None
    rounding: Literal["none", "once"] = "none"
    round_dtype: Float = "float32"

    def __post_init__(self) -> None:
        blocks.validate(self.block, None)


def layout(params: Params, shape: tuple[int, int]) -> list[Part]:
    rows, cols = shape
    if cols % WIDTH:
        raise DamagedError(f"columns in multiples of {WIDTH}", str(cols))
    parts = [Part("codes", "uint8", (rows, cols // WIDTH, params.bits), 0, Fraction(1), 1, Fraction(WIDTH))]
    if params.scales is not None:
        parts.append(blocks.part("scales", params.scales, shape, params.block))
    return parts


def decode(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    values = points(parts["codes"]).reshape(shape)
    if params.scales is not None:
        values = values * blocks.spread(parts["scales"].astype(np.float32), shape, params.block)
    return values if params.rounding == "none" else rounded(values, params.round_dtype)


def points(codes: Array) -> Array:
    """uint8 [..., 1 or 2] -> float32 [..., 8]."""
    if codes.shape[-1] == 1:
        return table(1)[codes[..., 0]]
    signs, patterns = codes[..., 0], codes[..., 1]
    values: Array = table(2)[patterns] * SIGNS[signs] + SHIFTS[signs][..., None]
    return values


def table(bits: int) -> Array:
    """The patterns with 2 bits, the points with 1: float32 [256, 8]."""
    return tables.named("e8p" if bits == 2 else "e81b").astype(np.float32)


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """float32 [out, in] -> parts: the nearest point for each vector. A block's scale is its root mean square over
    ``GAIN``.
    """
    vectors, scales = scaled(params, weight)
    flat = vectors.reshape(-1, WIDTH)
    chunks = np.array_split(flat, max(1, len(flat) * 256 // SEARCHED))
    codes = np.concatenate([nearest(chunk, params.bits) for chunk in chunks])
    return {"codes": codes.reshape(*vectors.shape[:2], params.bits), **scales}


def scaled(params: Params, weight: Array) -> tuple[Array, dict[str, Array]]:
    """The vectors that are to become points, float32 [out, in / 8, 8], and the part ``scales`` that divided them."""
    weight = weight.astype(np.float32)
    shape = weight.shape[0], weight.shape[1] // WIDTH, WIDTH
    if params.scales is None:
        return weight.reshape(shape), {}
    if not isinstance(params.scales, str):
        raise UnsupportedError("parts with a dtype when encoding", "packed parts")
    grid, size = blocks.grid(params.block, weight.shape), blocks.size(params.block, weight.shape)
    squares = blocks.gather(weight.astype(np.float64) ** 2, params.block).sum(axis=0).reshape(grid)
    count = np.minimum(size[0], weight.shape[0] - size[0] * np.arange(grid[0]))[:, None] * np.minimum(
        size[1], weight.shape[1] - size[1] * np.arange(grid[1])
    )
    scales = held((np.sqrt(squares / count) / GAIN[params.bits]).astype(np.float32), params.scales)
    spread = blocks.spread(scales, weight.shape, params.block)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(spread == 0, np.float32(0), weight / spread)
    return weight.reshape(shape), {"scales": scales.astype(NUMPY[params.scales])}


def nearest(vectors: Array, bits: int) -> Array:
    """The code of the point nearest to each of ``vectors``, float32 [n, 8]: uint8 [n, bits]."""
    if bits == 1:
        known = table(1)
        likeness = sum(vectors[:, k, None] * known[:, k] for k in range(WIDTH)) - (known**2).sum(axis=1) / 2
        found: Array = np.asarray(likeness).argmax(axis=1).astype(np.uint8)[:, None]
        return found
    above, below = _with_even_signs(vectors - np.float32(0.25)), _with_even_signs(vectors + np.float32(0.25))
    below[:, 0] ^= 1  # an odd number of ones stands for the other shift
    errors = [((vectors - points(codes)) ** 2).sum(axis=1) for codes in (above, below)]
    codes: Array = np.where((errors[1] < errors[0])[:, None], below, above)
    return codes


def _with_even_signs(vectors: Array) -> Array:
    """The pattern, and the even number of signs, whose product is nearest to each vector: uint8 [n, 2]. Every sign goes
    where the vector's does; where that makes an odd number, the one that costs least is turned.
    """
    patterns = table(2)
    size, wide = np.abs(vectors), np.abs(patterns)
    likeness = np.zeros((len(vectors), len(patterns)), np.float32)
    least = np.full_like(likeness, np.inf)
    for k in range(WIDTH):  # one by one: the order of a matrix product differs from machine to machine
        product = size[:, k, None] * wide[:, k]
        likeness += product
        np.minimum(least, product, out=least)
    odd = (vectors < 0).sum(axis=1)[:, None] + (patterns < 0).sum(axis=1) & 1
    likeness -= (patterns**2).sum(axis=1) / 2
    likeness -= np.where(odd, 2 * least, np.float32(0))
    found = likeness.argmax(axis=1)
    negative = (vectors < 0) ^ (patterns[found] < 0)
    turned = (size * wide[found]).argmin(axis=1)
    negative[np.arange(len(vectors)), turned] ^= negative.sum(axis=1) % 2 == 1
    return np.stack([(negative << SIGN_BITS).sum(axis=1), found], axis=1).astype(np.uint8)


def check(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` for scales that are not finite."""
    blocks.check_finite({name: values for name, values in parts.items() if name != "codes"})


def units(params: Params) -> tuple[int, int]:
    """Columns come eight at a time."""
    return 1, WIDTH


def preset(bits: float, rotated: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The params for ``quantize --codec e8p --bits BITS``: one scale for a rotated weight, else one for each row."""
    if bits not in GAIN:
        raise UnsupportedError("1, 2, 3 or 4 bits for e8p", f"{bits:g}")
    return {"bits": int(bits), "block": [-1, -1] if rotated else [1, -1], "scales": "float16", **settings}
