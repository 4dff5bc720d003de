"""``table``: codes into a table of 2**bits entries of p values each, with a scale and an offset per block. Page:
``spec/codecs/table.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from .. import bits as fields
from .. import blocks, tables
from ..dtypes import NUMPY, Array, Float, Scale, held, rounded
from ..errors import DamagedError, UnsupportedError
from ..layout import Packed, Part
from ..records import Record

NAME = "table"
STEPS = 24  # scales that `encode` tries for each block
SEARCHED = 1 << 24  # products of vectors and entries held at a time: bounds the memory of the search


class Params(Record, frozen=True, kw_only=True):
    """``value = table[code] * scale + offset``. ``table`` is the name of a table of the specification, or the dtype of
    the part ``table``, one for each ``table_block`` of the matrix.
    """

    bits: Annotated[int, Meta(ge=1, le=16)]
    p: Literal[1, 2, 4] = 1
    table: str
    table_block: tuple[int, int] = (-1, -1)
    block: tuple[int, int] = (1, -1)
    view: tuple[int, int] | None = None
    scales: Scale | Packed | None = None
    offsets: Float | Packed | None = None
    rounding: Literal["none", "once"] = "none"
    round_dtype: Float = "float32"

    def __post_init__(self) -> None:
        blocks.validate(self.block, self.view)
        blocks.validate(self.table_block, None)
        if self.table_block[1] != -1 and self.table_block[1] % self.p:
            raise DamagedError(f"table_block of a multiple of p = {self.p} columns", str(self.table_block[1]))
        if self.stored:
            return
        shape = tables.named(self.table).shape
        if shape != (2**self.bits, self.p):
            raise DamagedError(f"a table of {2**self.bits} entries of {self.p}", f"{self.table} with {list(shape)}")

    @property
    def stored(self) -> bool:
        return self.table in ("float16", "bfloat16", "float32")


def layout(params: Params, shape: tuple[int, int]) -> list[Part]:
    blocks.validate(params.block, params.view, shape)
    rows, cols = shape
    if cols % params.p:
        raise DamagedError(f"columns in multiples of p = {params.p}", str(cols))
    size = fields.row_bytes(cols // params.p, params.bits)
    parts = [Part("codes", "uint8", (rows, size), 0, Fraction(1), 1, Fraction(8 * params.p, params.bits))]
    for name in ("scales", "offsets"):
        if (dtype := getattr(params, name)) is not None:
            parts.append(blocks.part(name, dtype, shape, params.block, params.view))
    if params.stored:
        tables_part = blocks.part("table", params.table, shape, params.table_block)
        parts.append(_with_entries(tables_part, params))
    return parts


def _with_entries(part: Part, params: Params) -> Part:
    return Part(
        part.name,
        part.dtype,
        (*part.shape, 2**params.bits, params.p),
        part.out_axis,
        part.out_unit,
        part.in_axis,
        part.in_unit,
    )


def decode(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> Array:
    codes = fields.unpack(parts["codes"], params.bits, shape[1] // params.p)
    values = np.empty(shape, np.float32)
    if params.stored:
        table = parts["table"].astype(np.float32)
        rows, cols = blocks.size(params.table_block, shape)
        for i in range(table.shape[0]):
            for j in range(table.shape[1]):
                here = slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
                picked = codes[here[0], here[1].start // params.p : -(-here[1].stop // params.p)]
                values[here] = table[i, j][picked].reshape(values[here].shape)
    else:
        values[:] = tables.named(params.table).astype(np.float32)[codes].reshape(shape)
    if params.scales is not None:
        values *= blocks.spread(parts["scales"].astype(np.float32), shape, params.block, params.view)
    if params.offsets is not None:
        values += blocks.spread(parts["offsets"].astype(np.float32), shape, params.block, params.view)
    return values if params.rounding == "none" else rounded(values, params.round_dtype)


def encode(params: Params, weight: Array) -> dict[str, Array]:
    """float32 [out, in] -> parts. Each block tries ``STEPS`` scales, evenly spaced from 0.7 times the one that
    matches the table's root mean square to the one that reaches the largest magnitude (at least 1.5, at most 3 times
    the first), and keeps the one with the smallest squared error; the code is the nearest entry. A stored table is
    Lloyd's for the whole weight.
    """
    if params.rounding != "none" or params.view is not None or params.offsets is not None:
        found = f"view {params.view}, offsets {params.offsets}, rounding {params.rounding}"
        raise UnsupportedError("no view, no offsets and rounding none when encoding", found)
    weight = weight.astype(np.float32)
    if params.stored:
        if params.scales is not None or params.table_block != (-1, -1):
            raise UnsupportedError(
                "one stored table and no scales when encoding",
                f"table_block {list(params.table_block)}, scales {params.scales}",
            )
        table = _lloyd(weight.reshape(-1, params.p), 2**params.bits).astype(NUMPY[params.table])
        codes = nearest(weight.reshape(-1, params.p), table.astype(np.float32)).reshape(weight.shape[0], -1)
        return {"codes": fields.pack(codes, params.bits), "table": table[None, None]}
    table = tables.named(params.table).astype(np.float32)
    if params.scales is None:
        codes = nearest(weight.reshape(-1, params.p), table).reshape(weight.shape[0], -1)
        return {"codes": fields.pack(codes, params.bits)}
    if not isinstance(params.scales, str):
        raise UnsupportedError("parts with a dtype when encoding", "packed parts")
    if blocks.size(params.block, weight.shape)[1] % params.p:
        raise UnsupportedError(f"blocks of a multiple of p = {params.p} columns", str(params.block[1]))
    grouped = blocks.gather(weight, params.block)
    scales, codes = _search(params, grouped, table)
    vectors = codes.reshape(len(grouped) // params.p, -1)
    rows, cols = blocks.size(params.block, weight.shape)
    codes = blocks.scatter(vectors, (weight.shape[0], weight.shape[1] // params.p), (rows, cols // params.p))
    stored = scales.reshape(blocks.grid(params.block, weight.shape)).astype(NUMPY[params.scales])
    return {"codes": fields.pack(codes, params.bits), "scales": stored}


def _search(params: Params, grouped: Array, table: Array) -> tuple[Array, Array]:
    """The best scale [blocks] and the codes [elements / p, blocks] that go with it."""
    assert isinstance(params.scales, str)
    count, number = grouped.shape
    vectors = grouped.reshape(count // params.p, params.p, number)
    best_error = np.full(number, np.inf, np.float32)
    best_scale = np.zeros(number, np.float32)
    best_codes = np.zeros((count // params.p, number), np.uint16)
    for scale in candidates(params, grouped, table):
        with np.errstate(divide="ignore", invalid="ignore"):
            ideal = np.where(scale == 0, np.float32(0), vectors / scale)
        codes = nearest(ideal.transpose(0, 2, 1).reshape(-1, params.p), table).reshape(-1, number)
        error = ((vectors - table[codes].transpose(0, 2, 1) * scale) ** 2).reshape(count, number).sum(axis=0)
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
        best_codes[:, better] = codes[:, better]
    return best_scale, best_codes


def candidates(params: Params, grouped: Array, table: Array) -> Array:
    """The scales that `encode` tries for each block, as they would be stored: float32 [STEPS, blocks]."""
    spread = np.sqrt((grouped**2).sum(axis=0, dtype=np.float32) / np.float32(len(grouped)))
    low = np.float32(0.7) * spread / np.float32(np.sqrt((table**2).mean()))
    reach = np.abs(grouped).max(axis=0) / np.abs(table).max()
    high = np.clip(reach, np.float32(1.5) * low, np.float32(3) * low)
    steps = (np.arange(STEPS) / (STEPS - 1)).astype(np.float32)[:, None]
    return held(low + (high - low) * steps, str(params.scales))


def nearest(vectors: Array, table: Array) -> Array:
    """Index of the nearest entry of ``table`` [entries, p] for each of ``vectors`` [n, p]; the first of equals."""
    if table.shape[1] == 1:
        order = np.argsort(table[:, 0], kind="stable")
        levels = table[order, 0]
        return order[np.searchsorted((levels[1:] + levels[:-1]) / 2, vectors[:, 0])].astype(np.uint16)
    half = (table**2).sum(axis=1) / 2
    parts = np.array_split(vectors, max(1, len(vectors) * len(table) // SEARCHED))
    # products added one by one and not by a matrix product, whose order differs from machine to machine
    likeness = (sum(part[:, k, None] * table[:, k] for k in range(table.shape[1])) - half for part in parts)
    return np.concatenate([one.argmax(axis=1) for one in likeness]).astype(np.uint16)


def _lloyd(vectors: Array, entries: int, rounds: int = 30) -> Array:
    """Lloyd's algorithm from evenly spaced quantiles of the norm-ordered vectors: [entries, p]."""
    order = np.argsort(vectors[:, 0] if vectors.shape[1] == 1 else (vectors**2).sum(axis=1), kind="stable")
    points = vectors[order[((np.arange(entries) + 0.5) * len(vectors) / entries).astype(np.int64)]]
    for _ in range(rounds):
        codes = nearest(vectors, points)
        counts = np.bincount(codes, minlength=entries)
        sums = np.stack([np.bincount(codes, weights=column, minlength=entries) for column in vectors.T], axis=1)
        points = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], points).astype(np.float32)
    return points


def check(params: Params, shape: tuple[int, int], parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` for numbers that no encoder writes."""
    blocks.check_finite({name: parts[name] for name in ("scales", "offsets", "table") if name in parts})


def units(params: Params) -> tuple[int, int]:
    """Columns come p at a time."""
    return 1, params.p


# bits -> the best that is known for a Gaussian weight, at 2 and 3 bits with one scale: `bench/distortion.py`
ROTATED: dict[int, dict[str, Any]] = {
    2: {"bits": 8, "p": 4, "table": "gauss-p4-n256", "block": [-1, -1], "scales": "float16"},
    3: {"bits": 6, "p": 2, "table": "higgs-p2-n64", "block": [-1, -1], "scales": "float16"},
}


def preset(bits: float, rotated: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The params for ``quantize --codec table --bits BITS``: the optimal scalar quantizer with 64 columns a scale.

    For a rotated weight, whose variance the rotation carries, scales of 8 bits do, or a vector grid and one scale.
    """
    if not 1 <= bits <= 8 or bits != int(bits):
        raise UnsupportedError(
            "whole bits from 1 to 8 for table", f"{bits:g}", hint="--set bits=, p= and table= reach others"
        )
    scales = "float8_e4m3fn" if rotated else "float16"
    scalar = {"bits": int(bits), "table": f"gauss-p1-n{2 ** int(bits)}", "block": [1, 64], "scales": scales}
    return {**(ROTATED.get(int(bits), scalar) if rotated else scalar), **settings}
