"""Vectors of what lies around the codecs: sums of terms, packed parts, stacks, axes, padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .case import WIDE, Draft, entry, packed, refused

INT = {"codec": "int", "bits": 4, "block": [1, 8], "zero": 8}
ROWS = {"codec": "int", "bits": 3, "block": [1, -1], "offsets": "bfloat16"}
TRELLIS = {
    "codec": "trellis",
    "L": 16,
    "bits": [2],
    "code": "mul1",
    "order": "c0 c1 c2 c3 r0 r1 r2 r3",
    "block": [1, -1],
    "scales": "float16",
}
NESTED = {"codec": "int", "bits": 8, "block": [2, -1], "scales": "float32", "offsets": "float32"}


def drafts() -> Iterator[Draft]:
    yield from _sums()
    yield from _packed_parts()
    yield from _axes()
    yield from _invalid()


def _sums() -> Iterator[Draft]:
    shape = (16, 16)
    for dtype in ("float32", "float16", "bfloat16"):
        yield packed(
            f"values/sum-{dtype}",
            f"three terms of two codecs, the sum rounded to {dtype} after each addition",
            "P1 V1 V2",
            [INT, ROWS, TRELLIS],
            shape,
            sum_dtype=dtype,
            slices=[(0, 0, 16)],
        )
    yield packed(
        "values/sum-order",
        "equal terms in the order that they have",
        "V2",
        [INT, INT, INT],
        (3, 16),
        sum_dtype="float16",
    )
    yield packed(
        "values/outside",
        "a term outside: without a rotation it is added last",
        "V3",
        [{**INT, "outside": True}, ROWS, INT],
        (4, 16),
        sum_dtype="float16",
    )
    yield packed(
        "values/outside-rotation",
        "a term that is added after the rotation is undone",
        "V3 R1",
        [ROWS, {**INT, "outside": True}],
        (4, 16),
        rotation={"in": {"size": 16, "scale": "float16"}},
        tolerance=WIDE,
    )
    yield packed(
        "values/outside-no-side",
        "a rotation without sides is none: a term outside is added last, and rounded to float16",
        "V3",
        [{**INT, "outside": True}, ROWS, INT],
        (4, 16),
        sum_dtype="float16",
        rotation={"in": None},
    )


def _packed_parts() -> Iterator[Draft]:
    yield packed(
        "values/packed-scales",
        "scales that are packed themselves, 8 bits with an offset (double quantization)",
        "V4",
        {**INT, "scales": NESTED},
        (6, 32),
        slices=[(0, 2, 4), (0, 1, 3, "unsupported"), (1, 8, 24)],
    )
    small = {
        "codec": "int",
        "bits": 3,
        "block": [4, 1],
        "scales": "float16",
        "zeros": "float16",
        "rounding": "each",
        "round_dtype": "float16",
    }
    yield packed(
        "values/packed-zeros",
        "scales and zeros of 3 bits over blocks of blocks, every operation rounded to float16 (SpQR's dense part)",
        "V4 int-4 int-7",
        {
            "codec": "int",
            "bits": 3,
            "block": [1, 4],
            "scales": small,
            "zeros": small,
            "rounding": "each",
            "round_dtype": "float16",
        },
        (8, 20),
    )
    yield packed(
        "values/packed-view",
        "scales of a view, packed: their matrix is that of the blocks",
        "V4 C3",
        {**INT, "block": [1, -1], "view": [15, 4], "scales": NESTED},
        (6, 10),
    )
    yield packed(
        "values/packed-twice",
        "the scales of packed scales are packed",
        "V4 O1",
        {**INT, "scales": {**NESTED, "scales": {"codec": "int", "bits": 8, "block": [-1, -1], "scales": "float32"}}},
        (8, 16),
        group="optional",
        error="unsupported",
    )
    yield packed(
        "values/packed-second-term",
        "packed scales of one term of two",
        "P1 V4",
        [ROWS, {**INT, "scales": NESTED}],
        (4, 16),
    )


def _axes() -> Iterator[Draft]:
    yield packed(
        "values/stack",
        "a stack of three matrices",
        "V5",
        INT,
        (3, 5, 12),
        stack=1,
        slices=[(0, 1, 3), (1, 2, 4), (2, 8, 12)],
    )
    yield packed(
        "values/stack-2", "two leading axes", "V5", ROWS, (2, 3, 4, 12), stack=2, slices=[(1, 1, 2), (2, 0, 2)]
    )
    per = {"codec": "table", "bits": 2, "p": 1, "table": "float16"}
    yield packed(
        "values/stack-table", "each matrix of a stack has its own table", "V5 table-3", per, (3, 4, 8), stack=1
    )
    yield packed("values/conv", "a convolution [out, in, 3, 2] is a matrix [out, in * 3 * 2]", "V6", INT, (4, 3, 3, 2))
    yield packed("values/conv-stack", "a stack of convolutions along one axis", "V5 V6", INT, (2, 4, 3, 5), stack=1)
    yield packed(
        "values/transposed",
        "the model holds [in, out]: cuts follow the model's axes",
        "V7",
        INT,
        (24, 6),
        transposed=True,
        slices=[(0, 8, 16), (1, 2, 5), (0, 4, 16, "unsupported")],
    )
    yield packed(
        "values/transposed-stack", "experts [experts, in, out]", "V5 V7", INT, (2, 24, 6), stack=1, transposed=True
    )
    yield packed(
        "values/padded",
        "a stored matrix of 8 x 24 of which 5 x 18 remain",
        "M8 V8",
        INT,
        (5, 18),
        stored_shape=[8, 24],
        slices=[(0, 2, 5), (0, 2, 4), (1, 8, 18), (1, 8, 16)],
    )
    yield packed(
        "values/padded-transposed",
        "stored_shape has the order of shape",
        "M8 V7 V8",
        INT,
        (2, 18, 5),
        stored_shape=[2, 24, 8],
        stack=1,
        transposed=True,
    )


def _invalid() -> Iterator[Draft]:
    yield packed(
        "values/invalid-all-outside", "no term inside", "V3", {**INT, "outside": True}, (4, 16), error="damaged"
    )
    deep = {**INT, "scales": {**NESTED, "scales": {**NESTED, "scales": NESTED}}}
    like = entry({**INT, "scales": {**NESTED, "scales": NESTED}}, (8, 16))
    yield refused(
        "values/invalid-packed-thrice", "three levels of packed parts", "V4 L1", entry(deep, (8, 16)), like=like
    )
    inner = {**INT, "scales": {**NESTED, "outside": True}}
    yield refused(
        "values/invalid-packed-outside",
        "a packed part that is outside",
        "V4 M2",
        entry(inner, (8, 16)),
        like=entry({**INT, "scales": NESTED}, (8, 16)),
    )
    codec = {**INT, "scales": {"codec": "e9p"}}
    yield refused(
        "values/invalid-packed-codec",
        "scales packed by an unknown codec",
        "V4 M3",
        entry(codec, (8, 16)),
        error="unsupported",
    )
    nested = np.full((1, 2), np.nan, np.float32)
    yield packed(
        "values/invalid-packed-nan",
        "a scale of a packed scale that is a NaN",
        "V4 V9",
        {**INT, "scales": {**NESTED, "block": [-1, 1]}},
        (4, 16),
        parts={"scales_scales": nested},
        error="damaged",
    )
