"""A packed weight: its layout, its values from its terms and rotation, its slices."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import e8p_terms, entry, float_terms, int_terms, packed, seeds, table_terms, trellis_terms

from qformat import codecs, rotation, weight
from qformat.dtypes import Array, rounded
from qformat.errors import DamagedError, UnsupportedError, UsageError
from qformat.manifest import Entry

INT: dict[str, Any] = {"codec": "int", "bits": 4, "zero": 8, "block": [1, 16]}


def decode_term(term: dict[str, Any], shape: tuple[int, int], parts: dict[str, Array], prefix: str) -> Array:
    """A term without packed parts, by its codec alone."""
    codec, params = codecs.read_params({key: value for key, value in term.items() if key != "outside"})
    return codec.decode(params, shape, {part.name: parts[prefix + part.name] for part in codec.layout(params, shape)})


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """Weights of every kind that a manifest can describe: stacked, padded, transposed, rotated, several terms."""
    kind = draw(st.sampled_from(["e8p", "float", "int", "table", "trellis"]))
    cols = 8 * draw(st.integers(1, 4)) if kind == "e8p" else draw(st.integers(1, 33))
    shape = (16, 32) if kind == "trellis" else (draw(st.integers(1, 33)), cols)
    make = {
        "e8p": e8p_terms(shape),
        "float": float_terms(shape),
        "int": int_terms(shape),
        "table": table_terms(shape),
        "trellis": trellis_terms(),
    }[kind]
    terms = draw(st.lists(make, min_size=1, max_size=3))
    more: dict[str, Any] = {"sum_dtype": draw(st.sampled_from(["float32", "float16", "bfloat16"]))}
    if len(terms) > 1 and draw(st.booleans()):
        terms[-1] = {**terms[-1], "outside": True}
    sides = {}
    for name, length in zip(("out", "in"), shape, strict=True):
        if draw(st.booleans()):
            sides[name] = {"size": math.gcd(length, draw(st.sampled_from([1, 2, 4, 8]))), "scale": "float16"}
    stack = draw(st.sampled_from([(), (), (2,), (2, 3)]))
    transposed = draw(st.booleans())
    stored = (*stack, *(reversed(shape) if transposed else shape))
    cut = tuple(draw(st.integers(max(1, n - 3), n)) for n in stored[len(stack) :]) if draw(st.booleans()) else None
    whole = (*stack, *cut) if cut else stored
    more |= {"stored_shape": list(stored)} if whole != stored else {}
    more |= {"rotation": sides} if sides else {}
    return entry(whole, *terms, stack=len(stack), transposed=transposed, **more)


@settings(max_examples=60)
@given(entries(), seeds)
def test_layout_is_what_a_weight_has(of: Entry, rng: np.random.Generator) -> None:
    one = packed(rng, of)
    one.check() if np.isfinite(one.decode()).all() else weight.check_parts(of, one.parts, "w")
    assert sum(part.nbytes for part in weight.layout(of)) == one.nbytes
    assert one.stored_bits == 8 * one.nbytes / math.prod(of.shape)
    assert one.decode().shape == of.shape and one.decode().dtype == np.float32
    assert one.decode(rotated=True).shape == (*of.shape[: of.stack], *weight.matrix_shape(of))


@settings(max_examples=60)
@given(entries(), seeds)
def test_a_stack_is_its_matrices(of: Entry, rng: np.random.Generator) -> None:
    one = packed(rng, of)
    whole = one.decode()
    for at in itertools.product(*map(range, of.shape[: of.stack])):
        parts = {name: array[at] for name, array in one.parts.items()}
        matrix = weight.decode_matrix(of, parts)
        matrix = matrix.T if of.transposed else matrix
        rows, cols = of.shape[of.stack :]
        np.testing.assert_array_equal(whole[at], matrix[:rows, :cols])


@settings(max_examples=60)
@given(entries(), seeds, st.data())
def test_a_slice_decodes_to_the_slice(of: Entry, rng: np.random.Generator, data: st.DataObject) -> None:
    one = packed(rng, of)
    axis = data.draw(st.integers(0, len(of.shape) - 1))
    unit = data.draw(st.sampled_from([1, 8, 16]))  # most packings can only be cut at some multiple
    start = unit * data.draw(st.integers(0, (of.shape[axis] - 1) // unit))
    stop = min(of.shape[axis], start + unit * data.draw(st.integers(1, 3)))
    try:
        part = one.slice(axis, start, stop)
    except UnsupportedError:
        return
    assert all(np.shares_memory(array, one.parts[name]) for name, array in part.parts.items())
    weight.check_parts(part.entry, part.parts, "w")
    here = (slice(None),) * axis + (slice(start, stop),)
    np.testing.assert_array_equal(part.decode(), one.decode()[here])


CUTS = [  # (entry, axis, start, stop, may it be cut there)
    (entry((16, 64), INT), 0, 3, 5, True),
    (entry((16, 64), INT), 1, 16, 48, True),
    (entry((16, 64), INT), 1, 8, 48, False),
    (entry((16, 60), INT), 1, 48, 60, True),
    (entry((16, 60), INT), 1, 32, 56, False),
    (entry((16, 64), {**INT, "block": [1, -1]}), 1, 2, 4, True),
    (entry((16, 64), {**INT, "block": [1, -1]}), 1, 1, 4, False),
    (entry((16, 64), {**INT, "bits": 3, "block": [-1, -1]}), 1, 8, 24, True),
    (entry((16, 64), {**INT, "bits": 3, "block": [-1, -1]}), 1, 4, 24, False),
    (entry((16, 64), {**INT, "block": [4, -1]}), 0, 4, 12, True),
    (entry((16, 64), {**INT, "block": [4, -1]}), 0, 2, 12, False),
    (entry((18, 64), {**INT, "block": [4, -1]}), 0, 16, 18, True),
    (entry((16, 64), {**INT, "block": [1, 128], "view": [8, 128]}), 0, 0, 8, False),
    (entry((16, 64), {**INT, "groups": "int32"}), 0, 3, 5, True),
    (entry((16, 64), {**INT, "groups": "int32"}), 1, 0, 32, False),  # its scales would be more than its blocks
    (entry((16, 64), {**INT, "scales": {"codec": "int", "bits": 8, "block": [4, -1]}}), 0, 4, 8, True),
    (entry((16, 64), {**INT, "scales": {"codec": "int", "bits": 8, "block": [4, -1]}}), 0, 2, 8, False),
    (entry((16, 64), {**INT, "scales": {"codec": "int", "bits": 8}}), 1, 16, 32, True),
    (entry((16, 64), {**INT, "scales": {"codec": "int", "bits": 4}}), 1, 16, 32, False),  # half a byte of its scales
    (entry((16, 64), INT, rotation={"in": {"size": 32, "scale": "float16"}}), 1, 32, 64, True),
    (entry((16, 64), INT, rotation={"in": {"size": 32, "scale": "float16"}}), 1, 16, 64, False),
    (entry((16, 64), INT, rotation={"in": {"size": 32, "scale": "float16"}}), 0, 5, 6, True),
    (entry((16, 64), INT, rotation={"out": {"size": 8}}), 0, 8, 16, True),
    (entry((16, 64), INT, rotation={"out": {"size": 8}}), 0, 4, 16, False),
    (entry((16, 64), INT, rotation={"in": {"perm": "int32"}}), 1, 0, 32, False),
    (entry((16, 64), INT, rotation={"in": {"perm": "int32"}}), 0, 0, 3, True),
    (entry((64, 16), INT, transposed=True), 0, 16, 48, True),
    (entry((64, 16), INT, transposed=True), 0, 8, 48, False),
    (entry((4, 16, 64), INT, stack=1), 0, 1, 3, True),
    (entry((4, 16, 64), INT, stack=1), 1, 1, 3, True),
    (entry((4, 16, 64), INT, stack=1), 2, 16, 32, True),
    (entry((4, 8, 2, 2), INT), 0, 1, 3, False),  # a convolution
    (entry((13, 60), INT, stored_shape=[16, 64]), 1, 32, 60, True),
    (entry((13, 60), INT, stored_shape=[16, 64]), 1, 32, 59, False),
    (entry((13, 60), INT, stored_shape=[16, 64]), 0, 2, 13, True),
    (entry((16, 64), {"codec": "table", "bits": 8, "p": 2, "table": "higgs-p2-n256"}), 1, 2, 6, True),
    (entry((16, 64), {"codec": "table", "bits": 8, "p": 2, "table": "higgs-p2-n256"}), 1, 1, 6, False),
    (entry((16, 64), {"codec": "table", "bits": 4, "table": "float16", "table_block": [1, -1]}), 0, 1, 6, True),
    (entry((32, 64), {"codec": "trellis", "L": 8, "bits": [2], "code": "1mad", "order": "c0 c1 c2 c3 r0 r1 r2 r3"}),
     0, 16, 32, True),
    (entry((32, 64), {"codec": "trellis", "L": 8, "bits": [2], "code": "1mad", "order": "c0 c1 c2 c3 r0 r1 r2 r3"}),
     1, 8, 24, False),
]  # fmt: skip


@pytest.mark.parametrize(("of", "axis", "start", "stop", "allowed"), CUTS, ids=range(len(CUTS)))
def test_where_a_weight_can_be_cut(of: Entry, axis: int, start: int, stop: int, allowed: bool) -> None:
    one = packed(np.random.default_rng(0), of)
    if not allowed:
        with pytest.raises(UnsupportedError, match="w: expected "):
            one.slice(axis, start, stop)
        return
    here = (slice(None),) * axis + (slice(start, stop),)
    np.testing.assert_array_equal(one.slice(axis, start, stop).decode(), one.decode()[here])


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 0, 17), (0, 5, 5), (0, -1, 3), (2, 0, 1), (-1, 0, 1)])
def test_a_slice_that_the_weight_has_not(axis: int, start: int, stop: int) -> None:
    with pytest.raises(UsageError):
        packed(np.random.default_rng(0), entry((16, 64), INT)).slice(axis, start, stop)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_terms_are_added_in_order_and_rounded_each_time(dtype: str) -> None:
    of = entry((8, 32), INT, {**INT, "bits": 2, "zero": 2}, {**INT, "bits": 1, "zero": 0.5}, sum_dtype=dtype)
    one = packed(np.random.default_rng(1), of)
    values = [decode_term(term, (8, 32), dict(one.parts), f"{i}_") for i, term in enumerate(of.terms)]
    want = rounded(rounded(values[0] + values[1], dtype) + values[2], dtype)
    np.testing.assert_array_equal(one.decode(), want)
    if dtype != "float32":
        assert (want != values[0] + values[1] + values[2]).any()


def test_a_term_outside_is_added_when_the_rotation_is_undone() -> None:
    of = entry((8, 32), INT, {**INT, "outside": True}, rotation={"in": {"size": 32, "scale": "float16"}})
    one = packed(np.random.default_rng(2), of)
    inside, outside = (decode_term(term, (8, 32), dict(one.parts), f"{i}_") for i, term in enumerate(of.terms))
    np.testing.assert_array_equal(one.decode(rotated=True), inside)
    assert of.rotation is not None
    want = rotation.undo(of.rotation, inside, one.parts) + outside.astype(np.float64)
    np.testing.assert_array_equal(one.decode(), want.astype(np.float32))


def test_a_convolution_is_a_matrix_of_its_rows() -> None:
    one = packed(np.random.default_rng(3), entry((4, 8, 2, 2), INT))
    same = packed(np.random.default_rng(3), entry((4, 32), INT))
    np.testing.assert_array_equal(one.decode(), same.decode().reshape(4, 8, 2, 2))


@pytest.mark.parametrize("levels", [1, 2])
def test_packed_scales_are_decoded_first(levels: int) -> None:
    scales: Any = "float16"
    for _ in range(levels):
        scales = {"codec": "int", "bits": 8, "block": [1, 2], "scales": scales}
    one = packed(np.random.default_rng(4), entry((8, 64), {**INT, "scales": scales}))
    names = (
        {"codes"} | {"scales_" * level + "codes" for level in range(1, levels + 1)} | {"scales_" * levels + "scales"}
    )
    assert one.parts.keys() == names
    found = one.parts["scales_" * levels + "scales"]
    for level in range(levels, 0, -1):
        codes = one.parts["scales_" * level + "codes"].astype(np.float32)
        found = np.repeat(found.astype(np.float32), 2, axis=1)[:, : codes.shape[1]] * codes
    params = {**INT, "scales": "float32"}
    want = decode_term(params, (8, 64), {"codes": one.parts["codes"], "scales": found}, "")
    np.testing.assert_array_equal(one.decode(), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("scales"), "w: expected part scales, found none"),
        (lambda parts: parts.update(extra=parts["codes"]), "w: expected no such part, found extra"),
        (lambda parts: parts.update(codes=parts["codes"][:-1]), r"part codes uint8 \[16, 32\], found uint8 \[15, 32\]"),
        (lambda parts: parts.update(codes=parts["codes"].view(np.int8)), "codes uint8.*found int8"),
        (lambda parts: parts["scales"].fill(np.nan), "w: expected finite scales, found 64 that are not"),
    ],
)
def test_parts_that_do_not_fit(change: Any, message: str) -> None:
    one = packed(np.random.default_rng(0), entry((16, 64), INT))
    change(one.parts)
    with pytest.raises(DamagedError, match=message):
        one.check()


@pytest.mark.filterwarnings("error")
def test_values_beyond_float32_are_found_without_a_warning() -> None:
    one = packed(np.random.default_rng(0), entry((16, 64), {**INT, "scales": "float32"}))
    one.parts["scales"].fill(3e38)  # finite, but not times a code
    with pytest.raises(DamagedError, match="w: expected finite values, found an infinity or NaN"):
        one.check()
