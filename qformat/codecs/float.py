"""``float``: floating-point numbers of 4 to 8 bits with a scale per block, and a global scale where there is one. Page:
``spec/codecs/float.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from .. import bits as fields
from .. import blocks
from ..dtypes import NUMPY, Array, Float, Scale, held, rounded
from ..errors import DamagedError, UnsupportedError
from ..layout import Packed, Part
from ..records import Record

NAME = "float"
RATIOS = (2.0 ** (np.arange(-12, 9) / 16)).astype(np.float32)  # of the scale that spans the block: what `encode` tries
LARGEST = {  # what a scale can be
    "float16": 65504.0,
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "float32": (2 - 2**-23) * 2.0**127,
    "float8_e4m3fn": 448.0,
    "float8_e8m0fnu": 2.0**127,
}
Name = Literal["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m3", "e2m2", "e2m1"]


class Format(NamedTuple):
    """A sign, then bits of the exponent and the fraction. ``special``: which codes are no finite numbers."""

    exponent: int
    fraction: int
    bias: int
    special: Literal["none", "last", "ieee", "fnuz"] = "none"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.fraction


FORMATS: dict[str, Format] = {
    "e4m3fn": Format(4, 3, 7, "last"),
    "e5m2": Format(5, 2, 15, "ieee"),
    "e4m3fnuz": Format(4, 3, 8, "fnuz"),
    "e5m2fnuz": Format(5, 2, 16, "fnuz"),
    "e3m2": Format(3, 2, 3),
    "e2m3": Format(2, 3, 1),
    "e2m2": Format(2, 2, 1),
    "e2m1": Format(2, 1, 1),
}


class Params(Record, frozen=True, kw_only=True):
    """``value = element * scale``; a ``global_scale`` enters as ``global_form`` says."""

    format: Name
    block: tuple[int, int] = (1, -1)
    view: tuple[int, int] | None = None
    scales: Scale | Packed | None = None
    global_scale: Float | None = None
    global_form: Literal["multiply", "divide", "last"] = "multiply"
    global_divisor: Annotated[float, Meta(ge=1, le=65536)] = 1
    rounding: Literal["none", "once", "each"] = "none"
    round_dtype: Float = "float32"

    def __post_init__(self) -> None:
        blocks.validate(self.block, self.view)
        if self.global_scale is not None and self.scales is None:
            raise DamagedError("scales beside a global_scale", "none")

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits


def layout(params: Params, shape: tuple[int, int]) -> list[Part]:
    blocks.validate(params.block, params.view, shape)
    rows, cols = shape
    size = fields.row_bytes(cols, params.bits)
    parts = [Part("codes", "uint8", (rows, size), 0, Fraction(1), 1, Fraction(8, params.bits))]
    if params.scales is not None:
        parts.append(blocks.part("scales", params.scales, shape, params.block, params.view))
    if params.global_scale is not None:
        parts.append(Part("global_scale", params.global_scale, (1,)))
    return parts


def decode(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    values = elements(params.format)[fields.unpack(parts["codes"], params.bits, shape[1])]
    if params.scales is not None:
        scale, last = factors(params, parts)
        values *= blocks.spread(scale, shape, params.block, params.view)
        if last is not None:
            values = each(params, values) * last
    return values if params.rounding == "none" else rounded(values, params.round_dtype)


@functools.cache
def elements(name: str) -> Array:
    """What every code of a format stands for: float32 [2**bits]; read-only."""
    form = FORMATS[name]
    code = np.arange(1 << form.bits)
    sign = code >> (form.bits - 1)
    exponent = code >> form.fraction & ((1 << form.exponent) - 1)
    fraction = code & ((1 << form.fraction) - 1)
    normal = (fraction + (1 << form.fraction)) * 2.0 ** (exponent - form.bias - form.fraction)
    subnormal = fraction * 2.0 ** (1 - form.bias - form.fraction)
    magnitude = np.where(exponent > 0, normal, subnormal)
    top = exponent == (1 << form.exponent) - 1
    if form.special == "last":
        magnitude[top & (fraction == (1 << form.fraction) - 1)] = np.nan
    elif form.special == "ieee":
        magnitude[top] = np.where(fraction[top] > 0, np.nan, np.inf)
    elif form.special == "fnuz":
        magnitude[(sign == 1) & (exponent == 0) & (fraction == 0)] = np.nan
    values = np.where(sign == 1, -magnitude, magnitude).astype(np.float32)
    values.flags.writeable = False
    return values


def factors(params: Params, parts: Mapping[str, Array]) -> tuple[Array, Array | None]:
    """What elements are multiplied by: a factor for each block, and after it one for all, or None. float32."""
    scale = parts["scales"].astype(np.float32)
    if params.global_scale is None:
        return scale, None
    whole = parts["global_scale"].astype(np.float32) / np.float32(params.global_divisor)
    if params.global_form == "last":
        return scale, whole
    return each(params, scale * whole if params.global_form == "multiply" else scale / whole), None


def each(params: Params, values: Array) -> Array:
    return rounded(values, params.round_dtype) if params.rounding == "each" else values


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """float32 [out, in] -> parts. Of the scales ``RATIOS`` times the one that spans the block, each rounded to its
    dtype, the one with the smallest squared error is taken; the code is the nearest number, never a negative zero. The
    global scale spans the largest scale.
    """
    weight = weight.astype(np.float32)
    levels, codes = magnitudes(params.format)
    if params.scales is None:
        return {"codes": fields.pack(codes[nearest(weight, levels)], params.bits)}
    grouped = blocks.gather(weight, params.block, params.view)
    parts = global_part(params, grouped)
    best: dict[str, Array] = {}
    for scale, factor in candidates(params, grouped, parts):
        with np.errstate(divide="ignore", invalid="ignore"):
            ideal = np.where(factor == 0, np.float32(0), grouped / factor)
        found = nearest(ideal, levels)
        error = ((grouped - levels[found] * factor) ** 2).sum(axis=0)
        tried = {"error": error, "codes": found, "scales": scale}
        better = error < best["error"] if best else np.ones(error.shape, bool)
        best = {key: np.where(better, new, best[key]) if best else new for key, new in tried.items()}
    return stored(params, weight.shape, codes[best["codes"]], best["scales"], parts)


def stored(
    params: Params, shape: tuple[int, ...], codes: Array, scales: Array, parts: Mapping[str, Array]
) -> dict[str, Array]:
    """Codes [elements of a block, blocks] and scales [blocks] as they lie in the file, beside ``parts``."""
    matrix = blocks.scatter(codes, shape, params.block, params.view)
    grid = blocks.grid(params.block, params.view or shape)
    packed = {
        "codes": fields.pack(matrix, params.bits),
        "scales": scales.reshape(grid).astype(NUMPY[str(params.scales)]),
    }
    return {**packed, **parts}


def global_part(params: Params, grouped: Array) -> dict[str, Array]:
    """The global scale with which the largest of the scales is the largest that their dtype has (1 beyond 8 bits)."""
    if params.rounding != "none" or not isinstance(params.scales, str):
        raise UnsupportedError("rounding none and no packed parts when encoding", params.rounding)
    if params.global_scale is None:
        return {}
    top = magnitudes(params.format)[0][-1] * _top(params.scales if "e4m3" in params.scales else "")
    wanted = np.abs(grouped).max(initial=0) / top
    divisor = np.float32(params.global_divisor)
    whole = divisor if wanted == 0 else divisor / wanted if params.global_form == "divide" else wanted * divisor
    return {"global_scale": np.array([whole], np.float32).astype(NUMPY[params.global_scale])}


def candidates(params: Params, grouped: Array, parts: Mapping[str, Array]) -> Iterator[tuple[Array, Array]]:
    """The scales that ``encode`` tries, as they would be stored, and what they multiply by: float32 [blocks]."""
    dtype = str(params.scales)
    one, last = factors(params, {"scales": np.ones(1, np.float32), **parts})
    whole = one if last is None else last
    span = np.abs(grouped).max(axis=0) / magnitudes(params.format)[0][-1]
    for ratio in RATIOS:
        scale = held(np.minimum(span * ratio / whole, _top(dtype)), dtype)
        factor, last = factors(params, {"scales": scale, **parts})
        yield scale, factor if last is None else factor * last


def _top(dtype: str) -> np.float32:
    """The largest number of a dtype; 1 for none."""
    return np.float32(LARGEST.get(dtype, 1))


@functools.cache
def magnitudes(name: str) -> tuple[Array, Array]:
    """The finite numbers of a format in ascending order, and their codes; zero is the positive one."""
    values = elements(name)
    kept = np.flatnonzero(np.isfinite(values) & ~((values == 0) & np.signbit(values)))
    order = kept[np.argsort(values[kept], kind="stable")]
    return values[order], order.astype(np.uint8)


def nearest(values: Array, levels: Array) -> Array:
    """The place of the nearest level, the lower one of two as near."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values).astype(np.uint16)


def check(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` for numbers that no encoder writes."""
    blocks.check_finite({name: parts[name] for name in ("scales", "global_scale") if name in parts})
    if params.global_form == "divide" and "global_scale" in parts and not parts["global_scale"].all():
        raise DamagedError("a global_scale to divide by", "0")
    if count := special(params.format, parts["codes"]):
        raise DamagedError("codes of finite numbers", f"{count} that are not")


def special(name: str, codes: Array) -> int:
    """How many codes, uint8, stand for no finite number; only formats of 8 bits have such."""
    bad = np.flatnonzero(~np.isfinite(elements(name))).astype(np.uint8)
    if not bad.size:
        return 0
    if FORMATS[name].special == "fnuz":
        return int(np.count_nonzero(codes == bad[0]))
    return int(np.count_nonzero(codes & np.uint8(0x7F) >= bad[0]))  # the largest magnitudes of either sign


def units(params: Params) -> tuple[int, int]:
    """Any matrix can be encoded."""
    return 1, 1


PRESETS: dict[int, dict[str, Any]] = {  # NVFP4; 5 and 6 bits as MXFP6; FP8 with a scale a row
    4: {"format": "e2m1", "block": [1, 16], "scales": "float8_e4m3fn", "global_scale": "float32"},
    5: {"format": "e2m2", "block": [1, 32], "scales": "float8_e8m0fnu"},
    6: {"format": "e2m3", "block": [1, 32], "scales": "float8_e8m0fnu"},
    8: {"format": "e4m3fn", "block": [1, -1], "scales": "float32"},
}


def preset(bits: float, rotated: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The params for ``quantize --codec float --bits BITS``."""
    if bits not in PRESETS:
        raise UnsupportedError("4, 5, 6 or 8 bits for float", f"{bits:g}", hint="--set format= reaches the others")
    found = {**PRESETS[int(bits)], **settings}
    if settings.get("scales", "") is None and "global_scale" not in settings:
        del found["global_scale"]
    return found
