"""Rotations: ``W = diag(out.scale) · P_out · U_out · Ŵ · U_inᵀ · P_inᵀ · diag(in.scale)``, Ŵ the stored matrix.

U is block-diagonal: orthonormal Hadamard blocks of ``size``, H_K ⊗ Sylvester, or copies of the stored ``matrix`` [size,
size]. A permutation places: ``(X · Pᵀ)[:, perm[j]] = X[:, j]``, rows alike. Page: ``spec/README.md``, Rotation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from . import tables
from .dtypes import Array
from .errors import DamagedError, UnsupportedError
from .layout import Part
from .records import Record

SIDES = ("in", "out")


class Side(Record, frozen=True, kw_only=True):
    """One side of a rotation. The values of ``scale``, ``perm`` and ``matrix`` are the dtypes of their parts."""

    size: Annotated[int, Meta(ge=1)] = 1
    scale: Literal["float16", "bfloat16", "float32", "int8"] | None = None
    perm: Literal["int32"] | None = None
    matrix: Literal["float16", "bfloat16", "float32", "float64"] | None = None


class Rotation(Record, frozen=True, kw_only=True, rename={"in_": "in"}):
    in_: Side | None = None
    out: Side | None = None

    def sides(self) -> list[tuple[str, Side]]:
        return [(name, side) for name, side in (("in", self.in_), ("out", self.out)) if side is not None]


def layout(rotation: Rotation, shape: tuple[int, int]) -> list[Part]:
    """The parts of a rotation of a stored matrix of ``shape``: ``in_scale``, ``out_perm``, ..."""
    parts = []
    for name, side in rotation.sides():
        length = shape[1] if name == "in" else shape[0]
        if length % side.size:
            raise DamagedError(f"a rotation size that divides {length}", str(side.size))
        if side.matrix is None:
            order(side.size)
        along = {"in_axis": 0, "in_unit": Fraction(1)} if name == "in" else {"out_axis": 0, "out_unit": Fraction(1)}
        for part in ("scale", "perm"):
            if (dtype := getattr(side, part)) is not None:
                parts.append(Part(f"{name}_{part}", dtype, (length,), **along))  # type: ignore[arg-type]
        if side.matrix is not None:
            parts.append(Part(f"{name}_matrix", side.matrix, (side.size, side.size)))
    return parts


def order(size: int) -> int:
    """K of H_K ⊗ Sylvester: 1 for a power of two, else 4 times the odd part of ``size``.

    Raises :class:`UnsupportedError` for a size that no matrix is known for.
    """
    odd = size // (size & -size)
    found = 1 if odd == 1 else 4 * odd
    if size % found:
        raise UnsupportedError(f"a Hadamard size that is a power of two or a multiple of {found}", str(size))
    return len(tables.hadamard(found))


@functools.cache
def factors(size: int) -> tuple[Array, Array]:
    """(A, B) with U = A ⊗ B / √size, of about equal sizes: ones and minus ones, int8. B is symmetric, A is not:
    U x is A X B / √size for x as rows X [len(A), len(B)].
    """
    left = tables.hadamard(order(size))
    while (2 * len(left)) ** 2 <= size:
        left = np.kron(left, _PAIR)
    right = functools.reduce(np.kron, [_PAIR] * ((size // len(left)).bit_length() - 1), np.ones((1, 1), np.int8))
    return left, right


_PAIR = np.array([[1, 1], [1, -1]], np.int8)


def hadamard(columns: Array, size: int, inverse: bool = False) -> Array:
    """X · Uᵀ for X = ``columns`` [..., length], of the orthonormal block-diagonal U; X · U for the inverse."""
    if size == 1:
        return columns
    shape, half, known = columns.shape, 1, order(size)
    while half < size // known:
        pairs = columns.reshape(-1, shape[-1] // (2 * half), 2, half)
        columns = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
    if known > 1:
        turn = tables.hadamard(known).astype(columns.dtype)
        columns = (turn.T if inverse else turn) @ columns.reshape(-1, known, size // known)
    out: Array = columns.reshape(shape) / np.sqrt(columns.dtype.type(size))
    return out


def _turn(columns: Array, side: Side, matrix: Array | None, inverse: bool) -> Array:
    """X · Uᵀ (or X · U for the inverse) for X = columns [..., length]."""
    if matrix is None:
        return hadamard(columns, side.size, inverse)
    turn = matrix.astype(np.float64)
    blocked = columns.reshape(*columns.shape[:-1], -1, side.size)
    out: Array = (blocked @ (turn if inverse else turn.T)).reshape(columns.shape)
    return out


def undo(rotation: Rotation, stored: Array, parts: Mapping[str, Array]) -> Array:
    """Ŵ [out, in] -> W in float64."""
    weight = stored.astype(np.float64)
    for name, side in rotation.sides():
        weight = weight if name == "in" else weight.T
        weight = _turn(weight, side, parts.get(f"{name}_matrix"), inverse=False)
        if side.perm is not None:
            placed = np.empty_like(weight)
            placed[:, parts[f"{name}_perm"]] = weight
            weight = placed
        if side.scale is not None:
            weight = weight * parts[f"{name}_scale"].astype(np.float64)
        weight = weight if name == "in" else weight.T
    return weight


def apply(rotation: Rotation, weight: Array, parts: Mapping[str, Array]) -> Array:
    """W [out, in] -> the Ŵ that :func:`undo` takes back to it, float64; a scale of 0 leaves zeros."""
    stored = weight.astype(np.float64)
    for name, side in rotation.sides():
        stored = stored if name == "in" else stored.T
        if side.scale is not None:
            scale = parts[f"{name}_scale"].astype(np.float64)
            stored = stored * np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
        if side.perm is not None:
            stored = stored[:, parts[f"{name}_perm"]]
        stored = _turn(stored, side, parts.get(f"{name}_matrix"), inverse=True)
        stored = stored if name == "in" else stored.T
    return stored


def check(rotation: Rotation, parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` for a scale that is not finite, a perm that is none, a matrix that is not
    orthogonal.
    """
    for name, side in rotation.sides():
        if side.scale is not None and not np.isfinite(parts[f"{name}_scale"].astype(np.float32)).all():
            raise DamagedError(f"a finite {name}_scale", "an infinity or NaN")
        if side.perm is not None:
            perm = parts[f"{name}_perm"]
            if not np.array_equal(np.sort(perm), np.arange(len(perm))):
                raise DamagedError(f"{name}_perm with every index from 0 to {len(perm) - 1} once", "other indices")
        if side.matrix is not None:
            matrix = parts[f"{name}_matrix"].astype(np.float64)
            off = np.abs(matrix @ matrix.T - np.eye(len(matrix))).max()
            if not off < 1e-2:
                raise DamagedError(f"an orthogonal {name}_matrix", f"one that is off by {off:.1e}")
