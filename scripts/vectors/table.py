"""Vectors of the codec ``table``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qformat import tables

from . import foreign
from .case import Draft, entry, packed, refused


def term(table: str, bits: int | None = None, p: int | None = None, **params: Any) -> dict[str, Any]:
    """The term of a named table, its bits and p from its shape; of a stored one with those given."""
    if bits is None:
        entries, p = tables.named(table).shape
        bits = entries.bit_length() - 1
    return {"codec": "table", "bits": bits, "p": p, "table": table, **params}


def drafts() -> Iterator[Draft]:
    yield example()
    yield from _named()
    yield from _stored()
    yield from _scales()
    yield from _invalid()
    yield from foreign.drafts("table")


def example() -> Draft:
    """The example of the page."""
    return packed(
        "table/example",
        "the example of the page: a stored table of four pairs, one row of three codes",
        "table-1 table-3 table-4",
        {"codec": "table", "bits": 2, "p": 2, "table": "float16", "scales": "float32"},
        (1, 6),
        parts={
            "codes": np.array([[0x2D]], np.uint8),
            "table": np.array([[[[-1, 1], [-0.5, 0], [0.25, -0.75], [2, 0.5]]]], np.float16),
            "scales": np.array([[1.5]], np.float32),
        },
    )


def _named() -> Iterator[Draft]:
    for name in tables.names():
        if name.startswith(("nf4", "fp4", "higgs", "gauss", "d4", "hi4")):
            cols = 52 if tables.named(name).size <= 64 else 92
            yield packed(
                f"table/{name}",
                f"the named table {name}, a scale for each block",
                "C1 table-1 table-2 table-4",
                term(name, block=[1, 16], scales="float16"),
                (3, cols),
            )
    every = np.arange(16, dtype=np.uint8)
    for name in ("nf4", "fp4"):
        yield packed(
            f"table/{name}-every-code",
            "every code once, no scales: the table itself, its negative zero included",
            "table-2 table-4",
            term(name),
            (1, 16),
            parts={"codes": (every[::2] | every[1::2] << 4)[None]},
        )


def _stored() -> Iterator[Draft]:
    yield packed("table/stored-float16", "one stored table", "table-3", term("float16", 3, 1), (5, 11))
    yield packed("table/stored-bfloat16", "one stored table of pairs", "table-3", term("bfloat16", 4, 2), (5, 14))
    yield packed("table/stored-float32", "one stored table of fours", "table-3", term("float32", 5, 4), (3, 28))
    yield packed(
        "table/stored-per-row",
        "a table for each row (SqueezeLLM), cut by rows and, three bits a code, by eight columns",
        "table-3 V10",
        term("float16", 3, 1, table_block=[1, -1]),
        (6, 24),
        slices=[(0, 2, 5), (1, 8, 16), (1, 4, 8, "unsupported")],
    )
    yield packed(
        "table/stored-per-block",
        "a table for each block of 2 rows and 6 columns, short blocks last; scales of their own blocks",
        "table-3 table-4",
        term("float16", 2, 2, table_block=[2, 6], block=[1, 4], scales="float16"),
        (5, 16),
    )
    yield packed(
        "table/bits-10",
        "codes of 10 bits",
        "O1 C1 table-1",
        term("float16", 10, 1),
        (3, 21),
        error="unsupported",
        group="optional",
    )
    yield packed(
        "table/bits-9",
        "codes of 9 bits, pairs",
        "O1 C1 table-1",
        term("bfloat16", 9, 2),
        (3, 22),
        error="unsupported",
        group="optional",
    )


def _scales() -> Iterator[Draft]:
    for dtype in ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu"):
        yield packed(
            f"table/scales-{dtype}", f"scales of {dtype}", "table-4", term("nf4", block=[1, 8], scales=dtype), (4, 20)
        )
    yield packed(
        "table/scale-whole", "one scale", "C2 table-4", term("higgs-p2-n16", block=[-1, -1], scales="float32"), (4, 20)
    )
    yield packed(
        "table/block-within-entry",
        "blocks of 3 columns beside entries of 2 values: the scale is the element's, not the code's",
        "C2 table-4",
        term("higgs-p2-n16", block=[2, 3], scales="float16"),
        (4, 20),
    )
    yield packed(
        "table/view-flat",
        "flat blocks of 10 that cross rows of 14 (bitsandbytes)",
        "C3 table-4",
        term("nf4", block=[1, -1], view=[7, 10], scales="float32"),
        (5, 14),
    )
    for dtype in ("float16", "bfloat16", "float32"):
        yield packed(
            f"table/offsets-{dtype}",
            f"offsets of {dtype} for blocks that are short at the end, beside scales of float32",
            "C2 table-4 table-8",
            term("nf4", block=[2, 8], scales="float32", offsets=dtype),
            (5, 20),
        )
    yield packed(
        "table/offsets-alone", "offsets without scales", "table-8", term("float16", 3, 1, offsets="float32"), (4, 11)
    )
    yield packed(
        "table/offsets-rounded",
        "the sum rounded once, after it was rounded to float32; flat blocks",
        "C3 table-5 table-8",
        term("nf4", block=[1, 10], view=[1, 70], scales="float32", offsets="float16")
        | {"rounding": "once", "round_dtype": "float16"},
        (5, 14),
    )
    inner = term("float32", 8, 1, block=[1, 4], scales="float32", offsets="float32")
    yield packed(
        "table/scales-packed",
        "scales packed by a stored table of 8 bits with scales and offsets of their own (bitsandbytes, nested)",
        "V4 table-3 table-4 table-8",
        term("nf4", block=[1, 8], scales={**inner, "view": [1, 12]}),
        (4, 24),
    )
    for dtype in ("float16", "bfloat16"):
        yield packed(
            f"table/rounding-once-{dtype}",
            f"the product rounded once to {dtype}",
            "table-5",
            term("nf4", block=[1, 8], scales=dtype, rounding="once", round_dtype=dtype),
            (4, 24),
        )
    yield packed(
        "table/rounding-once-no-scales",
        "an entry rounded once to bfloat16",
        "table-5",
        term("nf4", rounding="once", round_dtype="bfloat16"),
        (2, 16),
    )
    yield packed(
        "table/slices",
        "pairs of 6 bits: eight columns are three bytes",
        "V10",
        term("higgs-p2-n64", block=[1, 8], scales="float16"),
        (4, 32),
        slices=[(0, 1, 2), (1, 8, 24), (1, 24, 32), (1, 4, 8, "unsupported"), (1, 2, 8, "unsupported")],
    )


def _invalid() -> Iterator[Draft]:
    def bad(name: str, what: str, rules: str, wrong: dict[str, Any], like: dict[str, Any], cols: int = 16) -> Draft:
        return refused(f"table/invalid-{name}", what, rules, entry(wrong, (2, cols)), like=entry(like, (2, 16)))

    pairs = term("higgs-p2-n16")
    yield bad(
        "table-entries", "a table with fewer entries than the bits reach", "table-6", term("nf4", 5, 1), term("nf4")
    )
    yield bad("table-width", "a table of single values for pairs", "table-6", term("nf4", 4, 2), pairs)
    yield bad("columns", "an odd number of columns for pairs", "table-6", pairs, pairs, cols=15)
    yield bad("p-3", "entries of three values", "M4 table-6", term("higgs-p2-n16", 4, 3), pairs)
    stored = term("float16", 4, 2)
    yield bad(
        "table-block", "tables for blocks of 3 columns, and pairs", "table-6", {**stored, "table_block": [1, 3]}, stored
    )
    yield refused(
        "table/invalid-table-unknown",
        "a table that this version does not have",
        "table-7",
        entry(term("nf5", 4, 1), (2, 16)),
        like=entry(term("nf4"), (2, 16)),
        error="unsupported",
    )
    values = np.linspace(-1, 1, 8, dtype=np.float16)[None, None, :, None].copy()
    values[0, 0, 5] = np.nan
    yield packed(
        "table/invalid-entry-nan",
        "an entry that is a NaN",
        "V9",
        term("float16", 3, 1),
        (2, 16),
        parts={"table": values},
        error="damaged",
    )
