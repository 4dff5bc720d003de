"""Vectors of rotations: Ŵ, the stored matrix, is exact; W is compared with a tolerance unless it is exact too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .case import WIDE, Draft, entry, packed, refused

TERM = {"codec": "int", "bits": 4, "block": [1, 8], "zero": 8}


def turned(
    name: str, what: str, rules: str, rotation: dict[str, Any], shape: tuple[int, ...] = (8, 24), **keys: Any
) -> Draft:
    keys = {"tolerance": WIDE, **keys}
    return packed(f"rotation/{name}", what, rules, TERM, shape, rotation=rotation, **keys)


def drafts() -> Iterator[Draft]:
    yield turned("in", "Hadamard blocks of 8 on the input side", "R1 R2 R6", {"in": {"size": 8}})
    yield turned("out", "Hadamard blocks of 4 on the output side", "R1 R2", {"out": {"size": 4}})
    both = {"in": {"size": 8, "scale": "float16"}, "out": {"size": 2, "scale": "float32"}}
    yield turned("both", "both sides, each with its scale", "R1 R2 R4", both)
    yield turned("one-block", "a block of 64: the whole input side", "R2", {"in": {"size": 64}}, (4, 64))
    yield turned(
        "order-12",
        "blocks of 24 = 12 · 2 on the input side: the matrix of order 12 is transposed",
        "R1 R2",
        {"in": {"size": 24}},
    )
    yield turned("order-28", "a block of 28 on the output side", "R1 R2", {"out": {"size": 28}}, (28, 24))
    orders = {"in": {"size": 40, "scale": "float16"}, "out": {"size": 48, "scale": "float32"}}
    yield turned(
        "orders",
        "two blocks of 40 = 20 · 2 and two of 48 = 12 · 4, with scales",
        "R1 R2 R4 V10",
        orders,
        (96, 80),
        slices=[(0, 48, 96), (1, 0, 40), (1, 0, 8, "unsupported")],
    )
    for order in (36, 52, 60, 108, 116, 124, 140, 156, 172):
        what = f"a block of {order} on the input side"
        yield turned(f"order-{order}", what, "R2", {"in": {"size": order}}, (1, order))
    signs = {"in": {"size": 8, "scale": "int8"}, "out": {"size": 8, "scale": "int8"}}
    yield turned("signs", "signs of int8 on both sides", "R4", signs)
    yield turned("scale-alone", "a scale without a transform", "R4", {"in": {"scale": "bfloat16"}})
    yield turned(
        "perm-in",
        "a permutation alone leaves W exact; there is no cut through it",
        "R3 V10",
        {"in": {"perm": "int32"}},
        tolerance=0,
        slices=[(0, 2, 6), (1, 8, 16, "unsupported")],
    )
    yield turned("perm-out", "rows placed by a permutation", "R3", {"out": {"perm": "int32"}}, tolerance=0)
    every = {
        "in": {"size": 4, "perm": "int32", "scale": "float16"},
        "out": {"size": 2, "perm": "int32", "scale": "float16"},
    }
    yield turned("all", "transform, then permutation, then scale, on both sides", "R1 R3 R4", every)
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        yield turned(
            f"matrix-in-{dtype}",
            f"copies of a stored matrix of {dtype}, not symmetric, on the input side",
            "O1 R5",
            {"in": {"size": 6, "matrix": dtype}},
            group="optional",
            error="unsupported",
        )
    yield turned(
        "matrix-out",
        "a stored matrix on the output side, with a permutation and a scale",
        "O1 R1 R5",
        {"out": {"size": 8, "matrix": "float32", "perm": "int32", "scale": "float32"}},
        group="optional",
        error="unsupported",
    )
    yield turned(
        "padded",
        "a stored matrix of 16 x 32 of which 11 x 21 remain; permuted before it is cut",
        "R1 V8 M8",
        {"in": {"size": 16, "perm": "int32", "scale": "float16"}, "out": {"size": 8, "scale": "float16"}},
        (11, 21),
        stored_shape=[16, 32],
        slices=[(0, 8, 11), (0, 0, 8), (0, 0, 4, "unsupported"), (1, 0, 16, "unsupported")],
    )
    yield turned(
        "stack", "each matrix of a stack with its own vectors", "R1 V5", both, (3, 8, 24), stack=1, slices=[(0, 1, 3)]
    )
    yield turned(
        "transposed", "in is the side of columns as the codec sees them", "R1 V7", both, (24, 8), transposed=True
    )
    yield turned(
        "slices",
        "cuts at multiples of the size on both sides",
        "V10",
        {"in": {"size": 8, "scale": "float16"}, "out": {"size": 4}},
        slices=[(0, 4, 8), (1, 8, 24), (0, 2, 6, "unsupported")],
    )
    yield from _invalid()


def _invalid() -> Iterator[Draft]:
    def bad(name: str, what: str, rules: str, wrong: dict[str, Any], error: str = "damaged") -> Draft:
        like = entry(TERM, (8, 24), rotation={"in": {"size": 8}})
        return refused(
            f"rotation/invalid-{name}", what, rules, entry(TERM, (8, 24), rotation=wrong), like=like, error=error
        )

    yield bad("size", "a size that does not divide the columns", "R7", {"in": {"size": 16}})
    yield bad("size-zero", "a size of 0", "M4 R7", {"in": {"size": 0}})
    yield bad("size-6", "6 is neither a power of two nor 12 times one", "R8", {"in": {"size": 6}}, "unsupported")
    yield bad("size-3", "an odd size", "R8", {"in": {"size": 3}}, "unsupported")
    perm = np.arange(24, dtype=np.int32)
    perm[3] = 4
    matrix = np.eye(6, dtype=np.float32)
    matrix[2, 3] = 0.5
    scale = np.ones(24, np.float16)
    scale[7] = np.inf
    for name, what, side, part, array in (
        ("perm", "a permutation that names a column twice", {"perm": "int32"}, "in_perm", perm),
        ("matrix", "a matrix that is not orthogonal", {"size": 6, "matrix": "float32"}, "in_matrix", matrix),
        ("scale", "an infinite scale", {"scale": "float16"}, "in_scale", scale),
    ):
        yield turned(f"invalid-{name}", what, "R7", {"in": side}, parts={part: array}, error="damaged", tolerance=0)
