"""Vectors of the codec ``int``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qformat.dtypes import NUMPY

from . import foreign
from .case import Draft, entry, packed, refused

FLOATS = ("float16", "bfloat16", "float32")
HALVES = ("float16", "bfloat16")


def term(bits: int, block: tuple[int, int] = (1, 8), **params: Any) -> dict[str, Any]:
    return {"codec": "int", "bits": bits, "block": list(block), **params}


def drafts() -> Iterator[Draft]:
    yield example()
    yield from _codes()
    yield from _numbers()
    yield from _blocks()
    yield from _rounding()
    yield from _invalid()
    yield from foreign.drafts("int")


def example() -> Draft:
    """The example of the page."""
    codes = np.array([[0x88, 0x0E], [0x77, 0xF2]], np.uint8)
    scales = np.array([[0.5], [-0.1]], np.float16)
    return packed(
        "int/example",
        "the example of the page: two rows of three 4-bit codes, padding bits set",
        "int-1 int-2 int-3",
        {"codec": "int", "bits": 4, "zero": 8},
        (2, 3),
        parts={"codes": codes, "scales": scales},
    )


def _codes() -> Iterator[Draft]:
    for bits in range(1, 9):
        zero = {"zero": 2 ** (bits - 1)} if bits > 1 else {"zero": 0.5}
        yield packed(
            f"int/bits-{bits}",
            f"{bits} bits, 13 columns: codes cross bytes, the last byte of a row is padded with any bits",
            "C1 int-1 int-2 int-3",
            term(bits, (1, 5), **zero),
            (3, 13),
        )
    yield packed(
        "int/slices",
        "rows anywhere, columns at whole blocks and whole bytes",
        "V10",
        term(4, (1, 6), zero=8),
        (5, 20),
        slices=[(0, 1, 4), (1, 6, 12), (1, 12, 20), (1, 0, 20), (1, 3, 9, "unsupported"), (1, 0, 8, "unsupported")],
    )
    yield packed(
        "int/slices-3-bits",
        "eight 3-bit codes are three bytes: columns are cut at multiples of 8",
        "V10",
        term(3, (2, 4), zero=4),
        (6, 32),
        slices=[(0, 2, 4), (0, 4, 6), (1, 8, 24), (1, 24, 32), (1, 4, 12, "unsupported"), (0, 1, 3, "unsupported")],
    )


def _numbers() -> Iterator[Draft]:
    for dtype in (*FLOATS, "float8_e4m3fn", "float8_e8m0fnu"):
        yield packed(f"int/scales-{dtype}", f"scales of {dtype}", "int-3", term(4, zero=8, scales=dtype), (4, 24))
    yield packed("int/zero-default", "no zero at all: codes times scale", "int-3", term(4), (4, 24))
    yield packed("int/zero-negative", "a zero that is not in the range of codes", "int-3", term(2, zero=-1.75), (4, 24))
    for dtype in ("uint8", "int16", *FLOATS):
        yield packed(
            f"int/zeros-{dtype}",
            f"a zero for each block, {dtype}; 2 to the bits is among them" if dtype == "uint8" else f"zeros of {dtype}",
            "int-4",
            term(3, zeros=dtype),
            (6, 24),
        )
    for dtype in FLOATS:
        yield packed(
            f"int/offsets-{dtype}", f"offsets of {dtype}", "int-5", term(4, scales=dtype, offsets=dtype), (4, 24)
        )


def _blocks() -> Iterator[Draft]:
    shared = "C2 int-3"
    yield packed(
        "int/block-short", "short last blocks along both axes", shared, term(4, (2, 8), zeros="uint8"), (5, 22)
    )
    yield packed("int/block-row", "the default block: a row", shared, {"codec": "int", "bits": 8, "zero": 128}, (4, 9))
    yield packed("int/block-whole", "one scale for the matrix", shared, term(8, (-1, -1), zero=128), (4, 9))
    yield packed("int/block-columns", "one scale for a column", shared, term(5, (-1, 1), zero=16), (6, 11))
    yield packed("int/block-larger", "a block larger than the matrix", shared, term(4, (64, 128), zero=8), (3, 10))
    yield packed(
        "int/view-down",
        "blocks are the columns of the reshape [16, 21]: members 21 apart (HQQ, axis 0)",
        "C3 int-4",
        term(4, (16, 1), view=[16, 21], zeros="float16"),
        (14, 24),
    )
    yield packed(
        "int/view-flat", "flat blocks that cross rows", "C3 int-3", term(3, (1, 4), view=[15, 4], zero=4), (6, 10)
    )
    yield packed(
        "int/groups",
        "columns name their scale, and blocks lie scattered",
        "int-6",
        term(4, (1, 8), zeros="uint8", groups="int32"),
        (4, 24),
        slices=[(0, 1, 3), (1, 8, 16, "unsupported")],
    )
    yield packed(
        "int/groups-rows",
        "scattered columns and blocks of rows",
        "int-6",
        term(2, (3, 8), zero=2, groups="int32"),
        (7, 20),
    )


def _rounding() -> Iterator[Draft]:
    for dtype in HALVES:
        for rounding in ("once", "each"):
            name, what = f"int/rounding-{rounding}-{dtype}", f"rounding {rounding} to {dtype}"
            params = {"scales": dtype, "rounding": rounding, "round_dtype": dtype}
            yield packed(f"{name}-zeros", f"{what}, float zeros", "int-7", term(4, zeros=dtype, **params), (6, 40))
            yield packed(f"{name}-offsets", f"{what}, offsets", "int-7", term(4, offsets=dtype, **params), (6, 40))
    for dtype in FLOATS:
        yield packed(
            f"int/rounding-fused-{dtype}",
            f"a fused multiply-add rounded once to {dtype}",
            "int-7",
            term(6, scales=dtype, offsets=dtype, rounding="fused", round_dtype=dtype),
            (6, 40),
        )
    for dtype, ulp in (("float16", 2.0**-10), ("bfloat16", 2.0**-7)):
        scales = np.full((1, 2), 1 + ulp / 2, np.float32)
        yield packed(
            f"int/rounding-fused-tie-{dtype}",
            f"sums just above and below a tie of {dtype}: rounding them to float32 on the way would make both a tie",
            "int-7",
            term(1, (1, 1), scales="float32", offsets="float32", rounding="fused", round_dtype=dtype),
            (1, 2),
            parts={
                "codes": np.array([[3]], np.uint8),
                "scales": scales,
                "offsets": np.array([[2.0**-40, -(2.0**-40)]], np.float32),
            },
        )
    yield packed(
        "int/rounding-fused-zeros",
        "fused without offsets: the difference is not rounded, the product once",
        "int-7",
        term(4, zeros="float16", scales="float16", rounding="fused", round_dtype="float16"),
        (6, 40),
    )


def _invalid() -> Iterator[Draft]:
    def bad(name: str, what: str, rules: str, wrong: dict[str, Any], like: dict[str, Any] | None = None) -> Draft:
        shape = (4, 16)
        return refused(f"int/invalid-{name}", what, rules, entry(wrong, shape), like=entry(like or term(4), shape))

    zeros, groups = term(4, zeros="uint8"), term(4, groups="int32")
    yield bad("bits-9", "nine bits", "M4 int-8", term(9), term(8))
    yield bad("two-zeros", "a zero and zeros", "int-8", term(4, zero=8, zeros="uint8"), zeros)
    yield bad("groups-and-view", "groups and a view", "int-8", term(4, view=[4, 16], groups="int32"), groups)
    yield bad("groups-and-rows", "groups of whole rows", "int-8", term(4, (1, -1), groups="int32"), groups)
    yield bad("scales-dtype", "a dtype that scales do not have", "M4 int-8", term(4, scales="uint8"))
    yield bad("block-zero", "a block of no columns", "C2", term(4, (1, 0)))
    yield bad("block-minus-2", "a block of -2 rows", "C2", term(4, (-2, 8)))
    yield bad("view-size", "a view with another number of elements", "C3", term(4, view=[4, 17]))
    yield bad("view-negative", "a view of negative sizes whose product is right", "C3", term(4, view=[-4, -16]))
    yield bad("zero-infinite", "an infinite zero", "M4 int-8", term(4, zero=float("inf")))
    for name, part, value in (("scale-nan", "scales", "nan"), ("scale-infinite", "scales", "inf")):
        scales = np.full((4, 2), 0.5, np.float16)
        scales[3, 1] = float(value)
        yield packed(
            f"int/invalid-{name}",
            f"a scale that is {value}",
            "V9",
            term(4),
            (4, 16),
            parts={part: scales},
            error="damaged",
        )
    nan = np.full((4, 2), 127, np.uint8)
    nan[2, 0] = 255
    yield packed(
        "int/invalid-scale-e8m0-nan",
        "the byte 255 of E8M0 is a NaN",
        "V9",
        term(4, scales="float8_e8m0fnu"),
        (4, 16),
        parts={"scales": nan.view(NUMPY["float8_e8m0fnu"])},
        error="damaged",
    )
    for name, wrong in (("above", 3), ("below", -1)):
        groups = np.arange(24, dtype=np.int32) // 8
        groups[5] = wrong
        yield packed(
            f"int/invalid-group-{name}",
            f"a column in group {wrong} of 3",
            "int-9",
            term(4, groups="int32"),
            (4, 24),
            parts={"groups": groups},
            error="damaged",
        )
