"""Vectors of the codec ``e8p``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import foreign
from .case import Draft, entry, packed, refused

EVERY = np.arange(256, dtype=np.uint8)


def term(bits: int = 2, **params: Any) -> dict[str, Any]:
    return {"codec": "e8p", **({} if bits == 2 else {"bits": bits}), **params}


def drafts() -> Iterator[Draft]:
    yield example()
    yield from _points()
    yield from _scales()
    yield from _sums()
    yield from _invalid()
    yield from foreign.drafts("e8p")


def example() -> Draft:
    """The example of the page."""
    return packed(
        "e8p/example",
        "the example of the page: even signs, then odd ones",
        "e8p-1 e8p-2 e8p-4",
        term(scales="float16"),
        (1, 16),
        parts={"codes": np.array([[[0, 0], [2, 1]]], np.uint8), "scales": np.array([[2]], np.float16)},
    )


def _points() -> Iterator[Draft]:
    for name, signs in (("even", 0x5A), ("odd", 0x8A)):
        codes = np.stack([np.full_like(EVERY, signs), EVERY], axis=1)
        yield packed(
            f"e8p/every-pattern-{name}",
            f"every pattern once, with an {name} number of signs",
            "e8p-1 e8p-2",
            term(),
            (16, 128),
            parts={"codes": codes.reshape(16, 16, 2)},
        )
    codes = np.stack([EVERY, np.full_like(EVERY, 0xE4)], axis=1)
    yield packed(
        "e8p/every-sign",
        "every byte of signs once, one pattern",
        "e8p-1 e8p-2",
        term(),
        (16, 128),
        parts={"codes": codes.reshape(16, 16, 2)},
    )
    yield packed(
        "e8p/every-point-1",
        "every point of the codebook of 1 bit once",
        "e8p-1 e8p-3",
        term(1),
        (16, 128),
        parts={"codes": EVERY.reshape(16, 16, 1)},
    )
    yield packed("e8p/one-code", "a single code", "e8p-1 e8p-2", term(), (1, 8))


def _scales() -> Iterator[Draft]:
    for bits in (1, 2):
        for dtype in ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu")[: 5 if bits == 2 else 1]:
            yield packed(
                f"e8p/scale-{dtype}-{bits}",
                f"{bits} bits, a scale in {dtype} for each row",
                "C2 e8p-4",
                term(bits, block=[1, -1], scales=dtype),
                (3, 24),
            )
        for dtype in ("float16", "bfloat16"):
            yield packed(
                f"e8p/rounding-once-{dtype}-{bits}",
                f"{bits} bits, the product rounded once to {dtype}",
                "e8p-5",
                term(bits, scales="float32", rounding="once", round_dtype=dtype),
                (3, 24),
            )
    yield packed(
        "e8p/block-within-code",
        "blocks of 2 rows and 5 columns, the last ones short: the scale is the element's, not the code's",
        "C2 e8p-4",
        term(block=[2, 5], scales="float16"),
        (5, 32),
    )
    nested = {"codec": "int", "bits": 6, "block": [-1, -1], "scales": "float16", "zero": 31}
    yield packed(
        "e8p/scales-packed",
        "scales that are packed themselves",
        "V4 e8p-4",
        term(block=[1, 8], scales=nested),
        (3, 32),
    )
    yield packed(
        "e8p/slices",
        "cuts at multiples of eight columns, none between",
        "V10",
        term(block=[1, 16], scales="float16"),
        (4, 64),
        slices=[(0, 1, 3), (1, 16, 48), (1, 32, 64), (1, 4, 12, "unsupported"), (1, 8, 24, "unsupported")],
    )


def _sums() -> Iterator[Draft]:
    for bits, scale in ((1, 2.04), (2, 3.45)):
        rest = term(bits, scales="float32", rounding="once", round_dtype="float16")
        yield packed(
            f"e8p/sum-{bits + 2}",
            f"two terms, {bits + 2} bits in all, as QuIP# has them",
            "V2 e8p-5",
            [term(), rest],
            (8, 64),
            parts={"1_scales": np.array([[1 / np.float32(scale)]], np.float32)},
            sum_dtype="float16",
        )


def _invalid() -> Iterator[Draft]:
    like = entry(term(), (2, 16))

    def bad(name: str, what: str, rules: str, wrong: dict[str, Any], shape: tuple[int, int] = (2, 16)) -> Draft:
        return refused(f"e8p/invalid-{name}", what, rules, entry(wrong, shape), like=like)

    yield bad("columns", "columns that are no multiple of eight", "e8p-6", term(), (2, 12))
    yield bad("bits-3", "a codebook that there is not", "M4 e8p-6", term(3))
    yield bad("block", "blocks of no rows", "C2 e8p-6", term(block=[0, -1], scales="float16"))
    yield packed(
        "e8p/invalid-scale-nan",
        "a scale that is a NaN",
        "V9",
        term(scales="float16"),
        (2, 16),
        parts={"scales": np.array([[np.nan]], np.float16)},
        error="damaged",
    )
