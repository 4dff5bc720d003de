"""Rotations, against the matrices that they stand for."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import part, seeds

from qformat import rotation, tables
from qformat.dtypes import Array
from qformat.errors import DamagedError, UnsupportedError
from qformat.records import read_record
from qformat.rotation import Rotation

length = st.sampled_from([1, 2, 4, 6, 8, 12, 16, 24, 28, 32, 40, 48])


SIZES = {1, 2, 4, 8, 16, 32, 12, 24, 48, 20, 40, 28}


@st.composite
def sides(draw: st.DrawFn, length: int) -> dict[str, Any] | None:
    if draw(st.booleans()):
        return None
    matrix = draw(st.sampled_from([None, "float16", "bfloat16", "float32", "float64"]))
    divisors = [n for n in range(1, length + 1) if length % n == 0 and (matrix or n in SIZES)]
    scale = draw(st.sampled_from([None, "float16", "bfloat16", "float32", "int8"]))
    side = {"size": draw(st.sampled_from(divisors)), "scale": scale, "matrix": matrix}
    return {key: value for key, value in {**side, "perm": draw(st.sampled_from([None, "int32"]))}.items() if value}


@st.composite
def rotations(draw: st.DrawFn) -> tuple[Rotation, tuple[int, int]]:
    shape = draw(length), draw(length)
    found = {"out": draw(sides(shape[0])), "in": draw(sides(shape[1]))}
    return read_record(Rotation, {name: side for name, side in found.items() if side is not None}), shape


def vectors(rng: np.random.Generator, turn: Rotation, shape: tuple[int, int]) -> dict[str, Array]:
    parts: dict[str, Array] = {}
    for one in rotation.layout(turn, shape):
        array = part(rng, one, parts)
        parts[one.name] = np.where(array == 0, array.dtype.type(1), array) if one.name.endswith("scale") else array
    return parts


def block(size: int) -> Array:
    """H_K ⊗ Sylvester, element by element."""
    order = next((k for k in (28, 20, 12) if size % k == 0), 1)
    fast, slow = size // order, tables.hadamard(order).astype(np.float64)
    signs = [
        [slow[i // fast, j // fast] * (-1) ** (i % fast & j % fast).bit_count() for j in range(size)]
        for i in range(size)
    ]
    return np.array(signs) / np.sqrt(size)


def by_hand(turn: Rotation, name: str, length: int, parts: dict[str, Array]) -> Array:
    """``diag(scale) · P · U`` of one side as a float64 matrix."""
    side = dict(turn.sides()).get(name)
    if side is None:
        return np.eye(length)
    one = parts[f"{name}_matrix"].astype(np.float64) if side.matrix else block(side.size)
    full = np.kron(np.eye(length // side.size), one)
    if side.perm is not None:
        placed = np.zeros((length, length))
        placed[parts[f"{name}_perm"], np.arange(length)] = 1  # (P X)[perm[j], :] = X[j, :]
        full = placed @ full
    scale = parts[f"{name}_scale"].astype(np.float64) if side.scale else np.ones(length)
    return np.asarray(scale[:, None] * full)


@given(rotations(), seeds)
def test_undo_is_the_product_of_the_specification(
    found: tuple[Rotation, tuple[int, int]], rng: np.random.Generator
) -> None:
    turn, shape = found
    parts, stored = vectors(rng, turn, shape), rng.standard_normal(shape)
    want = by_hand(turn, "out", shape[0], parts) @ stored @ by_hand(turn, "in", shape[1], parts).T
    got = rotation.undo(turn, stored, parts)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, atol=1e-12 * np.abs(want).max())


@given(rotations(), seeds)
def test_apply_undoes_undo(found: tuple[Rotation, tuple[int, int]], rng: np.random.Generator) -> None:
    turn, shape = found
    parts, weight = vectors(rng, turn, shape), rng.standard_normal(shape)
    rotation.check(turn, parts)
    stored = rotation.apply(turn, weight, parts)
    if all(side.matrix in (None, "float64") for _, side in turn.sides()):  # a rounded matrix is not quite orthogonal
        np.testing.assert_allclose(rotation.undo(turn, stored, parts), weight, atol=1e-10)
    if all(side.size == 1 and side.matrix is None for _, side in turn.sides()):
        np.testing.assert_allclose(rotation.undo(turn, stored, parts), weight, rtol=1e-15)


def test_a_permutation_alone_leaves_the_weight_exact() -> None:
    rng = np.random.default_rng(0)
    turn = read_record(Rotation, {"in": {"perm": "int32"}, "out": {"perm": "int32"}})
    parts = vectors(rng, turn, (6, 9))
    stored = rng.standard_normal((6, 9)).astype(np.float32)
    weight = rotation.undo(turn, stored, parts).astype(np.float32)
    for i in range(6):
        for j in range(9):
            assert weight[parts["out_perm"][i], parts["in_perm"][j]] == stored[i, j]


def test_a_row_of_scale_zero_stays_zero() -> None:
    turn = read_record(Rotation, {"out": {"size": 1, "scale": "float16"}})
    parts = {"out_scale": np.array([0, 2], np.float16)}
    stored = rotation.apply(turn, np.array([[0.0, 0], [1, 2]]), parts)
    assert stored.tolist() == [[0, 0], [0.5, 1]]


@pytest.mark.parametrize(
    ("side", "parts", "message"),
    [
        ({"scale": "float16"}, {"in_scale": np.array([1, np.nan], np.float16)}, "finite in_scale"),
        ({"perm": "int32"}, {"in_perm": np.array([0, 2], np.int32)}, "every index from 0 to 1 once"),
        ({"perm": "int32"}, {"in_perm": np.array([-1, 0], np.int32)}, "every index from 0 to 1 once"),
        ({"perm": "int32"}, {"in_perm": np.array([1, 1], np.int32)}, "every index from 0 to 1 once"),
        ({"size": 2, "matrix": "float32"}, {"in_matrix": np.ones((2, 2), np.float32)}, "orthogonal in_matrix"),
        ({"size": 2, "matrix": "float32"}, {"in_matrix": np.full((2, 2), np.nan, np.float32)}, "orthogonal"),
    ],
)
def test_vectors_that_are_none(side: dict[str, Any], parts: dict[str, Array], message: str) -> None:
    with pytest.raises(DamagedError, match=f"{message}.*, found "):
        rotation.check(read_record(Rotation, {"in": side}), parts)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(DamagedError, match="divides 12, found 8"):
        rotation.layout(read_record(Rotation, {"in": {"size": 8}}), (4, 12))
    for size, expected in (
        (6, "multiple of 12"),
        (3, "multiple of 12"),
        (44, "order 1, 12, 20, 28, 36, 52"),
        (4 * 173, "172"),
    ):
        with pytest.raises(UnsupportedError, match=f"{expected}.*, found {size}"):
            rotation.layout(read_record(Rotation, {"in": {"size": size}}), (4, size))


def test_the_matrices_are_those_of_the_authors_of_quip_and_qtip() -> None:
    """Their own int8 matrices, one after the other, have this digest; none but 28 and 36 are symmetric."""
    orders = (12, 20, 28, 36, 52, 60, 108, 116, 124, 140, 156, 172)
    every = [tables.hadamard(order) for order in orders]
    digest = "d8e20babc7110790cb95aad569093b6d78b6020cadffc1f28029966868e85881"
    assert hashlib.sha256(b"".join(one.tobytes() for one in every)).hexdigest() == digest
    assert [len(one) for one in every if np.array_equal(one, one.T)] == [28, 36]


@pytest.mark.parametrize("size", [1, 2, 32, 12, 24, 160, 172 * 4])
def test_the_factors_of_a_block(size: int) -> None:
    left, right = rotation.factors(size)
    x = np.random.default_rng(size).standard_normal((3, size))
    product = (left @ x.reshape(3, len(left), len(right)) @ right).reshape(3, size) / np.sqrt(size)
    np.testing.assert_allclose(product, rotation.hadamard(x, size), atol=1e-12)
    np.testing.assert_allclose(rotation.hadamard(product, size, inverse=True), x, atol=1e-12)
