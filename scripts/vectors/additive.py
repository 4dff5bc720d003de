"""Vectors of the codec ``additive``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import foreign
from .case import Draft, entry, packed, refused


def term(bits: int, books: int = 1, group: tuple[int, int] = (1, 8), **params: Any) -> dict[str, Any]:
    return {"codec": "additive", "bits": bits, "books": books, "group": list(group), **params}


def drafts() -> Iterator[Draft]:
    yield example()
    yield from _sizes()
    yield from _numbers()
    yield from _cuts()
    yield from _invalid()
    yield from foreign.drafts("additive")


def example() -> Draft:
    """The example of the page."""
    first = [[-1, 1], [0, 0.5], [2, -0.5], [1, 0]]
    second = [[0, 0.25], [0.25, 0], [-0.25, 0.5], [0.5, -0.5]]
    return packed(
        "additive/example",
        "the example of the page: two books of four pairs, one row of three groups, the last run half empty",
        "additive-1 additive-2 additive-3 additive-4",
        term(2, 2, (1, 2), scales="float32"),
        (1, 6),
        parts={
            "codes": np.array([[[0x4E], [0x03]]], np.uint8),
            "table": np.array([first, second], np.float16)[:, :, None],
            "scales": np.array([[1.5]], np.float32),
        },
    )


def _sizes() -> Iterator[Draft]:
    for bits in range(1, 9):
        yield packed(
            f"additive/bits-{bits}",
            f"one book of {bits} bits, a scale for each row",
            "C1 additive-1 additive-3",
            term(bits, 1, (1, 4), scales="float16"),
            (3, 44),
        )
    for bits in (10, 12, 16):
        yield packed(
            f"additive/bits-{bits}",
            f"one book of {bits} bits" + (" with single values" if bits == 16 else ""),
            "C1 additive-1",
            term(bits, 1, (1, 2 if bits < 16 else 1), scales="float16"),
            (3, 18),
        )
    for bits, books, group in ((8, 2, (1, 8)), (6, 3, (1, 8)), (5, 4, (1, 16)), (3, 7, (1, 3)), (1, 16, (1, 2))):
        yield packed(
            f"additive/books-{books}x{bits}-g{group[1]}",
            f"{books} books of {bits} bits, groups of {group[1]}",
            "additive-1 additive-2",
            term(bits, books, group, scales="float16"),
            (3, 5 * group[1]),
        )
    for group in ((4, 8), (3, 5), (2, 1)):
        yield packed(
            f"additive/group-{group[0]}x{group[1]}",
            f"tiles of {group[0]} rows and {group[1]} columns, a scale for each row of tiles",
            "additive-1 additive-2 additive-3",
            term(4, 2, group, block=[group[0], -1], scales="float16"),
            (3 * group[0], 7 * group[1]),
        )


def _numbers() -> Iterator[Draft]:
    for dtype in ("bfloat16", "float32"):
        yield packed(
            f"additive/table-{dtype}", f"books of {dtype}", "additive-2", term(4, 3, (1, 4), table=dtype), (3, 20)
        )
    for dtype in ("bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu"):
        yield packed(
            f"additive/scales-{dtype}", f"scales of {dtype}", "additive-3", term(4, 2, (1, 4), scales=dtype), (3, 20)
        )
    yield packed("additive/no-scales", "no scales: the sums themselves", "additive-2", term(4, 2, (1, 4)), (3, 20))
    yield packed(
        "additive/block-within-tile",
        "blocks of 3 rows and 5 columns beside tiles of 2 and 4: the scale is the element's, not the tile's",
        "C2 additive-3",
        term(4, 2, (2, 4), block=[3, 5], scales="float16"),
        (8, 20),
    )
    yield packed(
        "additive/scales-packed",
        "scales of 8 bits, packed by themselves",
        "V4 additive-3",
        term(4, 2, (1, 4), scales={"codec": "int", "bits": 8, "block": [-1, 1], "zero": 0, "scales": "float16"}),
        (6, 20),
    )
    order = np.array([2.0**24, 1, -(2.0**24)], np.float32)
    yield packed(
        "additive/order",
        "the order of the sum shows: in float32 (2^24 + 1) - 2^24 is 0 and (-2^24 + 1) + 2^24 is 1, by turns",
        "additive-2",
        term(1, 3, (1, 1), table="float32"),
        (1, 8),
        parts={
            "codes": np.array([[[0x38, 0x8E, 0xE3]]], np.uint8),  # of eight tiles, 000 and 111 by turns
            "table": np.stack([order, order[::-1]], axis=1)[:, :, None, None].copy(),
        },
    )
    yield packed(
        "additive/minus-zero",
        "a single book's negative zero keeps its sign, and so does the sum of two; a scale may turn it",
        "additive-2 additive-3",
        term(1, 2, (1, 1), block=[1, 4], scales="float32"),
        (1, 8),
        parts={
            "codes": np.array([[[0xE4], [0xE4]]], np.uint8),
            "table": np.array([[-0.0, 0.0], [-0.0, 1.0]], np.float16)[:, :, None, None],
            "scales": np.array([[1, -1]], np.float32),
        },
    )


def _cuts() -> Iterator[Draft]:
    yield packed(
        "additive/cut-2x8",
        "a group of eight columns is two bytes: a cut through it is refused, though the bytes would divide",
        "V10 additive-1",
        term(8, 2, (1, 8), scales="float16"),
        (4, 32),
        slices=[(0, 1, 3), (1, 8, 24), (1, 16, 32), (1, 4, 12, "unsupported"), (1, 4, 32, "unsupported")],
    )
    yield packed(
        "additive/cut-1x12",
        "two groups of twelve bits share three bytes: cuts come at every second group",
        "V10 additive-1",
        term(12, 1, (1, 2), scales="float16"),
        (3, 18),
        slices=[(0, 0, 2), (1, 4, 12), (1, 8, 18), (1, 2, 6, "unsupported"), (1, 4, 10, "unsupported")],
    )
    yield packed(
        "additive/cut-tiles",
        "tiles of 4 x 2: rows are cut at multiples of 4, columns at multiples of 4",
        "V10 additive-1",
        term(4, 1, (4, 2), block=[4, -1], scales="float16"),
        (12, 16),
        slices=[(0, 4, 8), (0, 8, 12), (1, 4, 16), (0, 2, 6, "unsupported"), (1, 2, 6, "unsupported")],
    )


def _invalid() -> Iterator[Draft]:
    good = term(4, 2, (2, 4))

    def bad(name: str, what: str, rules: str, wrong: dict[str, Any], shape: tuple[int, int] = (4, 16)) -> Draft:
        like = entry(good, (4, 16))
        return refused(f"additive/invalid-{name}", what, rules, entry(wrong, shape), like=like)

    yield bad("rows", "an odd number of rows for tiles of two", "additive-5", good, (3, 16))
    yield bad("columns", "columns that are no whole groups", "additive-5", good, (4, 18))
    yield bad("bits-17", "codes of 17 bits", "M4 additive-5", {**good, "bits": 17})
    yield bad("books-0", "no books", "M4 additive-5", {**good, "books": 0})
    yield bad("group-0", "a group of no columns", "M4 additive-5", {**good, "group": [1, 0]})
    yield bad("table-named", "the name of a table", "M4 additive-5", {**good, "table": "nf4"})
    values = np.linspace(-1, 1, 16, dtype=np.float16).reshape(2, 8, 1, 1).copy()
    values[1, 5] = np.inf
    yield packed(
        "additive/invalid-entry-infinite",
        "an entry that is infinite",
        "V9",
        term(3, 2, (1, 1)),
        (2, 16),
        parts={"table": values},
        error="damaged",
    )
