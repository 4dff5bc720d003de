"""Blocks of a matrix that share a scale: ``block = [rows, cols]``, -1 for the whole axis, a short last block allowed.

Blocks are those of the matrix, or of its row-major reshape ``view = [R, C]`` where a scheme counts them so.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from .dtypes import Array
from .errors import DamagedError
from .layout import Part, PartType

Block = tuple[int, int]
Shape = tuple[int, ...]


def size(block: Block, shape: Shape) -> Block:
    """Rows and columns of one block, none larger than the matrix."""
    rows, cols = (full if want == -1 else min(want, full) for want, full in zip(block, shape, strict=True))
    return rows, cols


def grid(block: Block, shape: Shape) -> Block:
    """How many blocks there are along each axis."""
    rows, cols = (-(-full // max(1, one)) for one, full in zip(size(block, shape), shape, strict=True))
    return rows, cols


def part(name: str, dtype: PartType, shape: Shape, block: Block, view: Block | None = None) -> Part:
    """The part that holds one value for each block."""
    if view is not None:
        return Part(name, dtype, grid(block, view))
    rows, cols = size(block, shape)
    by_row, by_col = block[0] != -1, block[1] != -1
    return Part(
        name,
        dtype,
        grid(block, shape),
        out_axis=0 if by_row else None,
        out_unit=Fraction(rows) if by_row else Fraction(0),
        in_axis=1 if by_col else None,
        in_unit=Fraction(cols) if by_col else Fraction(0),
    )


def spread(values: Array, shape: Shape, block: Block, view: Block | None = None) -> Array:
    """One value for each block [blocks of rows, blocks of columns] -> one for each element of ``shape``."""
    rows, cols = size(block, view or shape)
    full = np.repeat(np.repeat(values, rows, axis=0), cols, axis=1)
    return full[: (view or shape)[0], : (view or shape)[1]].reshape(shape)


def gather(matrix: Array, block: Block, view: Block | None = None) -> Array:
    """Matrix -> [elements of a block, blocks], blocks in row-major order; a short block is filled up with zeros."""
    source: Shape = view or matrix.shape
    (rows, cols), (down, across) = size(block, source), grid(block, source)
    matrix = matrix.reshape(source)
    if source != (down * rows, across * cols):
        full = np.zeros((down * rows, across * cols), matrix.dtype)
        full[: source[0], : source[1]] = matrix
        matrix = full
    blocked = matrix.reshape(down, rows, across, cols).transpose(1, 3, 0, 2)
    return np.ascontiguousarray(blocked).reshape(rows * cols, down * across)


def scatter(blocked: Array, shape: Shape, block: Block, view: Block | None = None) -> Array:
    """The inverse of :func:`gather`: [elements of a block, blocks] -> matrix of ``shape``."""
    target = view or shape
    (rows, cols), (down, across) = size(block, target), grid(block, target)
    full = blocked.reshape(rows, cols, down, across).transpose(2, 0, 3, 1).reshape(down * rows, across * cols)
    return np.ascontiguousarray(full[: target[0], : target[1]]).reshape(shape)


def check_finite(parts: Mapping[str, Array]) -> None:
    """Raise :class:`DamagedError` where a part holds an infinity or a NaN."""
    for name, values in parts.items():
        finite = np.isfinite(values.astype(np.float32))
        if not finite.all():
            raise DamagedError(f"finite {name}", f"{int((~finite).sum())} that are not")


def validate(block: Block, view: Block | None, shape: Shape | None = None) -> None:
    """Raise :class:`DamagedError` for a block or view that no matrix can have, or that ``shape`` contradicts."""
    if any(one != -1 and one < 1 for one in block):
        raise DamagedError("block of positive sizes or -1", str(list(block)))
    if view is not None and min(view) < 1:
        raise DamagedError("view of positive sizes", str(list(view)))
    if view is not None and shape is not None and view[0] * view[1] != shape[0] * shape[1]:
        raise DamagedError(f"view of {shape[0] * shape[1]} elements", str(list(view)))
