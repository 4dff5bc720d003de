"""Whole weights in the native library: sums, padding and rotations, against ``PackedWeight.decode`` and float64."""

from __future__ import annotations

import making
import numpy as np
import pytest
from native_setup import each_variant, needs_library

from qformat.errors import DamagedError
from qformat.kernels import native
from qformat.kernels.cpu import weight as whole

INT = {"codec": "int", "bits": 4, "block": [1, 16], "zero": 8}
NF4 = {"codec": "table", "bits": 4, "table": "nf4", "block": [1, 32], "scales": "bfloat16"}
NESTED = {**NF4, "scales": {"codec": "int", "bits": 8, "block": [4, 1], "scales": "float32", "zero": 128}}
E8P = {"codec": "e8p", "bits": 2, "block": [-1, -1], "scales": "float16"}
MUL1 = {"codec": "trellis", "L": 12, "bits": [2], "code": "mul1", "order": "c0 c1 r0 r1 r2 r3 c2 c3"}
FUSED = {**INT, "offsets": "float16", "zero": 0, "rounding": "fused"}  # the library has no kernel for this
TURN = {"in": {"size": 32, "scale": "int8"}, "out": {"size": 16, "scale": "float16"}}
FULL = {
    "in": {"size": 16, "matrix": "float32", "scale": "float32", "perm": "int32"},
    "out": {"size": 4, "matrix": "float64", "perm": "int32"},
}
ENTRIES = {
    "plain": making.entry((24, 64), INT),
    "packed-scales": making.entry((24, 64), NESTED),
    "padded": making.entry((21, 50), INT, stored_shape=[24, 64]),
    "scaled": making.entry((24, 64), INT, rotation={"in": {"scale": "bfloat16"}}),
    "placed": making.entry((24, 64), INT, rotation={"out": {"size": 2, "perm": "int32"}}),
    "turned": making.entry((32, 64), INT, rotation=TURN),
    "turned-blocks-below-a-tile": making.entry((48, 64), MUL1, rotation={"out": {"size": 8, "perm": "int32"}}),
    "turned-56-12": making.entry((24, 112), INT, rotation={"in": {"size": 56}, "out": {"size": 12}}),
    "turned-wholly": making.entry((112, 320), MUL1, rotation={"in": {"size": 320}, "out": {"size": 112}}),
    "by-matrices": making.entry((24, 64), INT, rotation=FULL),
    "trellis-padded": making.entry((21, 50), MUL1, stored_shape=[32, 64], rotation=TURN),
    "sum": making.entry((32, 2064), MUL1, INT),
    "sum-in-float16": making.entry((32, 1032), E8P, NF4, E8P, sum_dtype="float16"),
    "sum-in-bfloat16": making.entry((24, 64), INT, NF4, sum_dtype="bfloat16"),
    "outside": making.entry((24, 64), INT, {**NF4, "outside": True}, rotation=FULL),
    "outside-of-none": making.entry((21, 50), INT, {**NF4, "outside": True}, stored_shape=[24, 64]),
    "without-a-kernel": making.entry((32, 64), FUSED, rotation=TURN),
}


@each_variant
@pytest.mark.parametrize("name", ENTRIES)
def test_products_and_rows(variant: str, name: str) -> None:
    rng = np.random.default_rng(len(name))
    packed = making.packed(rng, ENTRIES[name])
    dense = packed.decode()
    x = rng.standard_normal((9, dense.shape[1]), dtype=np.float32)
    exact = x.astype(np.float64) @ dense.T.astype(np.float64)
    rows = np.array([len(dense) - 1, 0, 3, 3])
    with native.using(variant):
        matrix = whole.weight(packed.entry, packed.parts)
        y, taken = matrix.linear(x), matrix.embedding(rows)
        assert np.array_equal(matrix.linear(x[5]), y[5])  # a row does not depend on its company
    assert matrix.packed == (name != "without-a-kernel")
    # a rotation is two more products, so what is compared with is made of as many
    of_float32 = np.sqrt(((x @ dense.T - exact) ** 2).mean()) * (2 if packed.entry.rotation else 1)
    assert np.sqrt(((y - exact) ** 2).mean()) <= 2 * of_float32
    if packed.entry.rotation is None:
        assert np.array_equal(taken, dense[rows])
    else:
        assert np.sqrt(((taken - dense[rows]) ** 2).mean()) <= 1e-6 * np.sqrt((dense**2).mean())


@each_variant
def test_a_sum_is_rounded_as_the_reference_rounds(variant: str) -> None:
    """Halves of every size, subnormal and too large ones among them."""
    rng = np.random.default_rng(0)
    scales = {"scales": "float32", "block": [1, 16]}
    for dtype in ("float16", "bfloat16", "float32"):
        packed = making.packed(rng, making.entry((64, 256), {**INT, **scales}, {**NF4, **scales}, sum_dtype=dtype))
        for part in ("0_scales", "1_scales"):
            packed.parts[part][:] = np.exp2(rng.uniform(-30, 16, packed.parts[part].shape))  # type: ignore[index]
        with np.errstate(over="ignore"):
            expected = packed.decode()
        with native.using(variant):
            found = whole.weight(packed.entry, packed.parts).embedding(np.arange(64))
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@needs_library
def test_any_number_of_threads_gives_the_same() -> None:
    packed = making.packed(np.random.default_rng(1), making.entry((256, 1024), MUL1, rotation=TURN))
    matrix = whole.weight(packed.entry, packed.parts)
    x = np.random.default_rng(2).standard_normal((100, 1024), dtype=np.float32)
    rows = np.arange(0, 256, 3)
    first = matrix.linear(x, threads=1), matrix.embedding(rows, threads=1)
    for threads in (2, 3, 0):
        assert np.array_equal(matrix.linear(x, threads=threads), first[0])
        assert np.array_equal(matrix.embedding(rows, threads=threads), first[1])


@needs_library
def test_parts_that_are_not_those_of_the_layout_are_refused() -> None:
    packed = making.packed(np.random.default_rng(1), ENTRIES["placed"])
    for part, change in (("codes", lambda a: a[:-1]), ("out_perm", lambda a: a * 0), ("out_perm", lambda a: a - 1)):
        with pytest.raises(DamagedError):
            whole.weight(packed.entry, {**packed.parts, part: change(packed.parts[part])})
