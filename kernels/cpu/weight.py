"""Whole weights for the native library: sums of terms, and the rotation around a matrix."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from qformat import codecs, rotation, tables
from qformat.dtypes import Array
from qformat.manifest import Entry
from qformat.rotation import Side
from qformat.weight import check_parts, matrix_shape, term_parts, terms_of

from .. import native


class Sum(Structure):
    _fields_ = [("matrix", native.Head), ("terms", c_void_p), ("count", c_int64), ("dtype", c_int64)]


class Dense(Structure):
    _fields_ = [("matrix", native.Head), ("data", c_void_p)]


class Turn(Structure):  # qf_side
    _fields_ = [
        *((name, c_int64) for name in ("length", "size", "order")),
        *((name, c_void_p) for name in ("hadamard", "matrix", "scale", "perm", "inverse")),
    ]


class Whole(Structure):  # qf_weight
    _fields_ = [
        ("rows", c_int64),
        ("cols", c_int64),
        ("stored", c_void_p),
        ("in_", Turn),
        ("out", Turn),
        ("outside", c_void_p),
        ("outsides", c_int64),
    ]


@dataclass(frozen=True)
class Weight(native.Operand):
    """A weight ``[rows, cols]`` for the library. ``head`` is its C structure, ``held`` what that points into;
    ``packed`` is false where a term has no kernel and lies there decoded.
    """

    PREFIX = "qf_weight"
    head: Whole
    held: tuple[Any, ...]
    packed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.head.rows, self.head.cols


def weight(entry: Entry, parts: Mapping[str, Array], name: str = "") -> Weight:
    """One matrix ``[out, in]``, neither stacked nor transposed, from its parts, which are used where they lie.

    Raises :class:`DamagedError` where the parts are not those of the layout, or hold what their codec forbids.
    """
    assert not entry.stack and not entry.transposed and len(entry.shape) == 2
    check_parts(entry, parts, name)
    inside: list[native.Matrix] = []
    outside: list[native.Matrix] = []
    for prefix, term, is_outside in terms_of(entry):
        codec, params = codecs.read_params(term)
        arrays = term_parts(codec, params, matrix_shape(entry), parts, prefix, native.decode)
        (outside if is_outside else inside).append(_matrix(codec, params, matrix_shape(entry), arrays))
    packed = not any(isinstance(matrix.head, Dense) for matrix in (*inside, *outside))
    if entry.rotation is None:
        inside, outside = inside + outside, []
    else:
        rotation.check(entry.rotation, parts)
    stored = inside[0] if len(inside) == 1 else _sum(inside, entry.sum_dtype)
    sides = dict(entry.rotation.sides()) if entry.rotation is not None else {}
    rows, cols = matrix_shape(entry)
    (into, kept_in), (out, kept_out) = (
        _side(side, length, sides.get(side), parts) for side, length in (("in", cols), ("out", rows))
    )
    also = _pointers(outside)
    head = Whole(*entry.shape, ctypes.addressof(stored.head), into, out, ctypes.addressof(also), len(outside))
    return Weight(head, (stored, *outside, also, *kept_in, *kept_out), packed)


def _matrix(codec: codecs.Codec, params: Any, shape: tuple[int, int], parts: Mapping[str, Array]) -> native.Matrix:
    """A term's matrix; decoded by its definition where the library has no kernel for its settings."""
    matrix = native.matrix(codec.NAME, params, shape, parts)
    if matrix is None:
        values = np.ascontiguousarray(codec.decode(params, shape, parts))
        matrix = native.Matrix(Dense(native.Head(7, *shape, 1, 1), values.ctypes.data), (values,))
    return matrix


def _sum(terms: Sequence[native.Matrix], dtype: str) -> native.Matrix:
    units = (max(getattr(term.head.matrix, unit) for term in terms) for unit in ("row_unit", "col_unit"))
    pointers = _pointers(terms)
    head = native.Head(6, *terms[0].shape, *units)
    whole = Sum(head, ctypes.addressof(pointers), len(terms), native.DTYPES[dtype])
    return native.Matrix(whole, (pointers, *terms))


def _pointers(matrices: Sequence[native.Matrix]) -> Any:
    return (c_void_p * len(matrices))(*(ctypes.addressof(matrix.head) for matrix in matrices))


def _side(name: str, length: int, side: Side | None, parts: Mapping[str, Array]) -> tuple[Turn, list[Array]]:
    """A side of the rotation as the library takes it, and what it points into."""
    if side is None:
        return Turn(length, 1, 1), []
    arrays: dict[str, Array] = {}
    if side.size > 1 and side.matrix is None:
        arrays["hadamard"] = tables.hadamard(rotation.order(side.size)).astype(np.float32)
    for field, given in (("matrix", side.matrix), ("scale", side.scale)):
        if given is not None:
            arrays[field] = np.ascontiguousarray(parts[f"{name}_{field}"], np.float32)
    if side.perm is not None:
        arrays["perm"] = np.ascontiguousarray(parts[f"{name}_perm"])
        arrays["inverse"] = np.argsort(arrays["perm"]).astype(np.int32)
    order = len(arrays["hadamard"]) if "hadamard" in arrays else 1
    pointers = {field: array.ctypes.data for field, array in arrays.items()}
    return Turn(length, side.size, order, **pointers), list(arrays.values())
