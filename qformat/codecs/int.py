"""``int``: integers of 1 to 8 bits with a scale per block. Page: ``spec/codecs/int.md``."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from .. import bits as fields
from .. import blocks
from ..dtypes import NUMPY, Array, Float, Scale, held, rounded
from ..errors import DamagedError, UnsupportedError
from ..layout import Packed, Part, PartType
from ..records import Record

NAME = "int"
RATIOS = 1.0 - 0.0125 * np.arange(56)  # of the largest magnitude: the scales that `encode` tries


class Params(Record, frozen=True, kw_only=True):
    """``value = (code - zero) * scale``, or ``code * scale + offset`` where there are ``offsets``."""

    bits: Annotated[int, Meta(ge=1, le=8)]
    block: tuple[int, int] = (1, -1)
    view: tuple[int, int] | None = None
    scales: Scale | Packed = "float16"
    zero: Annotated[float, Meta(ge=-65536, le=65536)] = 0
    zeros: Literal["uint8", "int16"] | Float | Packed | None = None
    offsets: Float | Packed | None = None
    groups: Literal["int32"] | None = None
    rounding: Literal["none", "once", "each", "fused"] = "none"
    round_dtype: Float = "float32"

    def __post_init__(self) -> None:
        blocks.validate(self.block, self.view)
        given = [name for name in ("zero", "zeros", "offsets") if getattr(self, name) not in (None, 0)]
        if len(given) > 1:
            raise DamagedError("at most one of zero, zeros, offsets", " and ".join(given))
        if self.groups and (self.view is not None or self.block[1] == -1):
            raise DamagedError("groups beside blocks of columns of the matrix itself", str(list(self.block)))


def layout(params: Params, shape: tuple[int, int]) -> list[Part]:
    blocks.validate(params.block, params.view, shape)
    rows, cols = shape
    parts = [
        Part("codes", "uint8", (rows, fields.row_bytes(cols, params.bits)), 0, Fraction(1), 1, Fraction(8, params.bits))
    ]
    for name in ("scales", "zeros", "offsets"):
        dtype = getattr(params, name)
        if dtype is not None:
            part = blocks.part(name, dtype, shape, params.block, params.view)
            # scattered groups: any column may use any scale, so no cut along columns goes through the scales
            parts.append(Part(name, dtype, part.shape, part.out_axis, part.out_unit) if params.groups else part)
    if params.groups:
        parts.append(Part("groups", params.groups, (cols,), in_axis=0, in_unit=Fraction(1)))
    return parts


def decode(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    codes = fields.unpack(parts["codes"], params.bits, shape[1]).astype(np.float32)
    scale = _spread(params, shape, parts, "scales")
    if "offsets" in parts:
        offset = _spread(params, shape, parts, "offsets")
        if params.rounding == "fused":  # float64 holds the product of a code and a float16 or bfloat16 exactly
            return rounded(codes.astype(np.float64) * scale + offset, params.round_dtype)
        product = codes * scale
        return _final(params, (_each(params, product) + offset).astype(np.float32))
    zero = _spread(params, shape, parts, "zeros") if "zeros" in parts else np.float32(params.zero)
    return _final(params, _each(params, codes - zero) * scale)


def _spread(params: Params, shape: tuple[int, int], parts: Mapping[str, Array], name: str) -> Array:
    values = parts[name].astype(np.float32)
    if "groups" in parts:
        rows, _ = blocks.size(params.block, shape)
        return np.repeat(values, rows, axis=0)[: shape[0], parts["groups"]]
    return blocks.spread(values, shape, params.block, params.view)


def _each(params: Params, values: Array) -> Array:
    return rounded(values, params.round_dtype) if params.rounding == "each" else values


def _final(params: Params, values: Array) -> Array:
    return values if params.rounding == "none" else rounded(values, params.round_dtype)


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """float32 [out, in] -> parts. Of the scales ``RATIOS`` times the one that spans the block, the one with the
    smallest squared error is taken, each rounded to its dtype before codes are chosen. Without ``zeros`` or
    ``offsets`` both signs of the scale are tried: the integer range is not symmetric.
    """
    if params.groups or params.rounding != "none":
        raise UnsupportedError(
            "no groups and rounding none when encoding", f"groups {params.groups}, rounding {params.rounding}"
        )
    grouped = blocks.gather(weight.astype(np.float32), params.block, params.view)
    top = np.float32(2**params.bits - 1)
    best: dict[str, Array] = {}
    for candidate in candidates(params, grouped, top):
        scale, zero, offset = candidate
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ideal = np.where(scale == 0, np.float32(0), (grouped - offset) / scale) + zero
        codes = np.clip(np.rint(ideal), 0, top).astype(np.float32)
        error = ((grouped - ((codes - zero) * scale + offset)) ** 2).sum(axis=0, dtype=np.float32)
        found = {"error": error, "codes": codes.astype(np.uint8), "scales": scale, "zeros": zero, "offsets": offset}
        better = error < best["error"] if best else np.ones(error.shape, bool)
        best = {k: np.where(better, v, best[k]) if best else np.broadcast_to(v, np.shape(v)) for k, v in found.items()}
    codes = blocks.scatter(best["codes"], weight.shape, params.block, params.view)
    parts = {"codes": fields.pack(codes, params.bits)}
    for name in ("scales", "zeros", "offsets"):
        if (dtype := getattr(params, name)) is not None:
            parts[name] = (
                best[name].reshape(blocks.grid(params.block, params.view or weight.shape)).astype(NUMPY[dtype])
            )
    return parts


def candidates(params: Params, grouped: Array, top: np.float32) -> Any:
    """(scale, zero, offset) for each ratio: float32 [blocks], already rounded to what the parts can hold."""
    if not 0 <= params.zero <= top:
        raise UnsupportedError(f"a zero from 0 to {top:g} when encoding", f"{params.zero:g}")
    zeros = np.zeros(grouped.shape[1], np.float32)
    high, low = grouped.max(axis=0), grouped.min(axis=0)
    if params.zeros is None and params.offsets is None:
        above, below = top - np.float32(params.zero), np.float32(params.zero)  # steps on either side of zero
        zero = zeros + np.float32(params.zero)
        for sign in (1, -1):
            up, down = (high, -low) if sign == 1 else (-low, high)
            span = np.maximum(up / above if above else up, down / below if below else 0 * down)
            for ratio in RATIOS:
                yield _held(np.float32(sign * ratio) * span, params.scales), zero, zeros
        return
    high, low = np.maximum(high, 0), np.minimum(low, 0)
    for ratio in RATIOS:
        scale = _held((high - low) * np.float32(ratio) / top, params.scales)
        if params.offsets is not None:
            yield scale, zeros, _held(low * np.float32(ratio), params.offsets)
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(scale == 0, np.float32(0), -low * np.float32(ratio) / scale)
        yield scale, _held(np.clip(np.rint(zero), 0, top) if "int" in str(params.zeros) else zero, params.zeros), zeros


def _held(values: Array, dtype: PartType | None) -> Array:
    if not isinstance(dtype, str):
        raise UnsupportedError("parts with a dtype when encoding", "packed parts")
    return held(values, dtype)


def check(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` for numbers that no encoder writes."""
    blocks.check_finite({name: parts[name] for name in ("scales", "zeros", "offsets") if name in parts})
    if "groups" in parts:
        count = parts["scales"].shape[1]
        worst = parts["groups"][(parts["groups"] < 0) | (parts["groups"] >= count)]
        if worst.size:
            raise DamagedError(f"groups from 0 to {count - 1}", str(int(worst[0])))


def units(params: Params) -> tuple[int, int]:
    """Any matrix can be encoded."""
    return 1, 1


def preset(bits: float, rotated: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The params for ``quantize --codec int --bits BITS``: symmetric, 64 columns a scale."""
    if not 1 <= bits <= 8 or bits != int(bits):
        raise UnsupportedError("whole bits from 1 to 8 for int", f"{bits:g}")
    params: dict[str, Any] = {"bits": int(bits), "block": [1, 64], "scales": "float16"}
    if not settings.keys() & {"zeros", "offsets"}:
        params["zero"] = 2 ** (int(bits) - 1) if bits > 1 else 0.5  # one bit has the levels -s/2 and s/2
    return {**params, **settings}
