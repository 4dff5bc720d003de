"""Vectors of the codec ``trellis``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import foreign
from .case import WIDE, Draft, entry, packed, refused

ROWS = "c0 c1 c2 c3 r0 r1 r2 r3"  # row-major
ORDERS = {
    "exl3": "c0 c3 r3 c1 c2 r0 r1 r2",
    "qtip-kernel": "c0 r3 c3 c1 c2 r0 r1 r2",
    "qtip-plain": ROWS,
    "2-bits": "c2 c3 c0 c1 r0 r1 r2 r3",
    "3-bits": "c0 c1 r0 r1 r2 r3 c2 c3",
    "4-bits": "c2 c0 c1 r0 r1 r2 r3 c3",
}
HASHES = {
    "hash-16": {"shift": 7, "taps": [0, 2, 10], "index": [2, 2]},
    "hash-64": {"shift": 4, "taps": [0, 9], "index": [3, 3]},
    "hash-16+16": {"shift": 5, "taps": [0, 2, 8], "index": [4, 4], "additive": True},
}
SMALL = (16, 16)


def term(code: str, bits: int | list[int] = 2, L: int = 16, order: str = ROWS, **params: Any) -> dict[str, Any]:
    widths = bits if isinstance(bits, list) else [bits]
    return {"codec": "trellis", "L": L, "bits": widths, "code": code, "order": order, **params}


def drafts() -> Iterator[Draft]:
    yield example()
    yield from _codes()
    yield from _strings()
    yield from _places()
    yield from _scales()
    yield from _invalid()
    yield from foreign.drafts("trellis")


def example() -> Draft:
    """The example of the page."""
    return packed(
        "trellis/example",
        "the example of the page: one tile of 4 x 8, one bit a weight",
        "trellis-1 trellis-2 trellis-4 trellis-6",
        term("1mad", 1, 8, "c0 c1 c2 r0 r1", tile=[4, 8]),
        (4, 8),
        parts={"codes": np.array([[[0x4B, 0x01, 0x00, 0xFE]]], np.uint8)},
        group="optional",
        error="unsupported",
    )


def _codes() -> Iterator[Draft]:
    for code, rule in (("1mad", 6), ("2mad", 16), ("3inst", 7), ("mcg", 8), ("mul1", 9)):
        for L in (16, 12, 8):
            yield packed(
                f"trellis/{code}-L{L}", f"code {code}, L = {L}", f"trellis-2 trellis-{rule}", term(code, 2, L), SMALL
            )
    for code, rule in (("mcg", 8), ("mul1", 9)):
        params = term(code, 2, multiplier=0x89ABCDEF)
        yield packed(
            f"trellis/{code}-multiplier", f"code {code} with a multiplier of its own", f"trellis-{rule}", params, SMALL
        )
    empty = term("mul1", 2, shift=0, taps=[], index=[], additive=False, table=None)
    what = "params of other codes, all at their defaults: none is given"
    yield packed("trellis/defaults", what, "M4 trellis-9 trellis-14", empty, SMALL)
    yield packed("trellis/hyb", "code hyb, the named table", "trellis-10", hyb("hyb-q9", 9), SMALL)
    yield packed(
        "trellis/hyb-stored",
        "code hyb, a stored table of 16 pairs",
        "trellis-10 trellis-12",
        hyb("float16", 4, 12),
        SMALL,
    )
    lut = term("lut", 2, index=[9], table="hyb-q9", V=2)
    yield packed("trellis/lut", "code lut, a named table of pairs", "trellis-15", lut, SMALL)
    lut = term("lut", 3, 12, index=[5], table="bfloat16")
    yield packed("trellis/lut-stored", "code lut, a stored table of 32 entries", "trellis-15 trellis-12", lut, SMALL)
    for name, params in HASHES.items():
        bits = {"hash-16": 2, "hash-64": 3, "hash-16+16": 4}[name]
        what = f"code hash at {bits} bits, its named table, element order and L = 12"
        yield packed(
            f"trellis/{name.replace('+', '-and-')}",
            what,
            "trellis-4 trellis-11",
            term("hash", bits, 12, ORDERS[f"{bits}-bits"], table=name, **params),
            (32, 48),
        )
    for L, last in ((12, 10), (14, 12)):
        finer = {"shift": 7, "taps": [0, 3, 5, last], "index": [3, 2], "table": "hash-32"}
        yield packed(
            f"trellis/hash-32-L{L}",
            f"code hash at 2 bits with 32 entries, L = {L}",
            "trellis-11",
            term("hash", 2, L, ORDERS["2-bits"], **finer),
            SMALL,
        )
    odd = {"taps": [7, 1, 15], "index": [3, 5], "table": "int8"}
    yield packed(
        "trellis/hash-stored",
        "code hash, no shift, unequal indexes, taps out of order and up to the last bit, a stored table of int8",
        "trellis-11 trellis-12",
        term("hash", 2, 16, **odd),
        SMALL,
    )
    yield packed(
        "trellis/hash-stored-sum",
        "code hash as a sum, a stored table of 8 + 4 float16 entries",
        "trellis-11 trellis-12",
        term("hash", 3, 10, shift=2, taps=[0, 4], index=[3, 2], additive=True, table="float16"),
        SMALL,
    )
    for dtype, V in (("float16", 1), ("bfloat16", 2), ("float32", 1), ("int8", 2)):
        yield packed(
            f"trellis/table-{dtype}-V{V}",
            f"code table: every state has its entry of {V} in a stored table of {dtype}",
            "O1 trellis-12",
            term("table", 2, 8, V=V, table=dtype),
            SMALL,
            group="optional",
            error="unsupported",
        )


def hyb(table: str, index: int, L: int = 16, bits: int = 2, **params: Any) -> dict[str, Any]:
    return term("hyb", bits, L, V=2, index=[index], table=table, **params)


def _strings() -> Iterator[Draft]:
    for bits in range(1, 9):
        yield packed(
            f"trellis/bits-{bits}", f"{bits} bits a weight", "trellis-1 trellis-2", term("3inst", bits), (16, 32)
        )
    for L in (9, 11, 13, 14, 15):
        yield packed(f"trellis/L-{L}", f"states of {L} bits", "trellis-2", term("mul1", 3, L), SMALL)
    for bits in (1, 3, 4):
        yield packed(
            f"trellis/V2-bits-{bits}",
            f"two values a step, {bits} bits a weight",
            "trellis-2",
            hyb("hyb-q9", 9, bits=bits),
            SMALL,
        )
    yield packed(
        "trellis/V2-bits-8", "a step of 16 bits: no bit is shared", "trellis-2", hyb("hyb-q9", 9, bits=8), SMALL
    )
    for bits in ([2, 2, 2, 3], [1, 2], [3, 4, 4, 4, 4, 4, 4, 4], [8, 1]):
        name = "-".join(map(str, bits))
        yield packed(f"trellis/widths-{name}", f"widths {bits} in turn", "trellis-3", term("mul1", bits), SMALL)
    yield packed(
        "trellis/widths-V2-2-3",
        "two values a step, widths 2 and 3 in turn",
        "trellis-3",
        hyb("hyb-q9", 9, bits=0) | {"bits": [2, 3]},
        SMALL,
    )


def _places() -> Iterator[Draft]:
    for name, order in ORDERS.items():
        yield packed(
            f"trellis/order-{name}", f"element order {order}", "trellis-4", term("mcg", 2, order=order), (32, 32)
        )
    yield packed(
        "trellis/reversed", "steps in reverse", "trellis-5", term("mcg", 3, order=ORDERS["exl3"], reversed=True), SMALL
    )
    yield packed(
        "trellis/reversed-V2",
        "steps in reverse, the two values of a step not",
        "trellis-5",
        hyb("hyb-q9", 9, order=ORDERS["qtip-kernel"], reversed=True),
        SMALL,
    )
    for tile, order in (
        ((8, 16), "c0 c1 c2 c3 r0 r1 r2"),
        ((32, 8), "r4 c0 r0 c1 r1 c2 r2 r3"),
        ((4, 8), "r0 r1 c0 c1 c2"),
    ):
        name = f"{tile[0]}x{tile[1]}"
        yield packed(
            f"trellis/tile-{name}",
            f"tiles of {name}",
            "O1 trellis-1 trellis-4",
            term("1mad", 2, order=order, tile=list(tile)),
            (2 * tile[0], 3 * tile[1]),
            group="optional",
            error="unsupported",
        )


def _scales() -> Iterator[Draft]:
    for name, block, dtype in (
        ("row", (1, -1), "float16"),
        ("whole", (-1, -1), "float32"),
        ("blocks", (16, 8), "bfloat16"),
        ("e4m3", (4, 16), "float8_e4m3fn"),
    ):
        yield packed(
            f"trellis/scales-{name}",
            f"a scale of {dtype} for blocks {list(block)}",
            "C2 trellis-13",
            term(
                "hash", 2, 12, ORDERS["2-bits"], block=list(block), scales=dtype, table="hash-16", **HASHES["hash-16"]
            ),
            (32, 32),
            slices=[(0, 16, 32), (1, 16, 32), (0, 8, 16, "unsupported"), (1, 0, 8, "unsupported")],
        )
    yield packed(
        "trellis/exl3-like",
        "an EXL3 layer: mul1 at 3 bits, padded to 128 on both sides, a Hadamard transform and a scale on either",
        "trellis-5 trellis-9 R1 R2 M8",
        term("mul1", 3, order=ORDERS["exl3"], reversed=True),
        (40, 56),
        stored_shape=[128, 128],
        rotation={"in": {"size": 128, "scale": "float16"}, "out": {"size": 128, "scale": "float16"}},
        tolerance=WIDE,
    )


def _invalid() -> Iterator[Draft]:
    good = term("mul1", 2)

    def bad(
        name: str, what: str, change: dict[str, Any], like: dict[str, Any] = good, shape: tuple[int, int] = SMALL
    ) -> Draft:
        item, valid = entry({**like, **change}, shape), entry(like, SMALL)
        return refused(f"trellis/invalid-{name}", what, "trellis-14", item, like=valid)

    named = term("hash", 2, 12, table="hash-16", **HASHES["hash-16"])
    yield bad("step-longer-than-L", "a step of 9 bits and L = 8", {"L": 8, "bits": [8, 8], "V": 2}, hyb("hyb-q9", 9))
    yield bad("widths-of-3", "a list of three widths", {"bits": [2, 2, 2]})
    yield bad("tile-not-a-power", "a tile of 16 x 12", {"tile": [16, 12]})
    yield bad("tile-too-large", "a tile of 128 x 64", {"tile": [128, 64], "order": " ".join(_bits(128, 64))})
    yield bad("tile-too-small", "a tile of 4 x 4", {"tile": [4, 4], "order": " ".join(_bits(4, 4))})
    yield bad("order-twice", "a bit of the row twice", {"order": "c0 c1 c2 c3 r0 r1 r2 r2"})
    yield bad("order-spaces", "an order with two spaces between two bits", {"order": "c0  c1 c2 c3 r0 r1 r2 r3"})
    yield bad("order-short", "an order of seven bits for 256 elements", {"order": "c0 c1 c2 c3 r0 r1 r2"})
    yield bad(
        "half-a-byte", "a bit string of 33 bits", {"tile": [4, 8], "order": "c0 c1 c2 r0 r1", "bits": [1] * 31 + [2]}
    )
    yield bad("rows", "rows that are no whole tiles", {}, shape=(24, 16))
    yield bad("taps-beside-mul1", "taps beside a code that has none", {"taps": [0]})
    yield bad("multiplier-beside-1mad", "a multiplier beside 1mad", {"multiplier": 5}, term("1mad"))
    yield bad("hash-without-taps", "a hash without taps", {"taps": []}, named)
    yield bad("hash-beyond-L", "a tap beyond the state", {"taps": [0, 12]}, named)
    yield bad("hash-shift-beyond-L", "an index that reaches beyond the state", {"shift": 11}, named)
    yield bad("table-size", "a table of 64 entries for an index of 4 bits", {"table": "hash-64"}, named)
    yield bad("V2-of-1mad", "two values a step of a code that has one", {"V": 2}, term("1mad"))
    values = np.ones((256, 1), np.float16)
    values[17] = np.inf
    yield packed(
        "trellis/invalid-table-infinite",
        "a stored entry that is infinite",
        "V9",
        term("table", 2, 8, table="float16"),
        SMALL,
        parts={"table": values},
        error="damaged",
    )


def _bits(rows: int, cols: int) -> list[str]:
    return [f"c{i}" for i in range(cols.bit_length() - 1)] + [f"r{i}" for i in range(rows.bit_length() - 1)]
