"""Rotations of activations and of decoded rows: the factors of ``W = D·P·U · Ŵ · Uᵀ·Pᵀ·D``, one side at a time.

As in :mod:`qformat.rotation`, in torch: along the last axis of a tensor, in its floating dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qformat.rotation import Side, factors


def undo(name: str, side: Side | None, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``D·P·U x`` for the side called ``name`` (``in`` or ``out``), whose parts are ``in_scale``, ``in_perm``, ..."""
    if side is None:
        return x
    x = _turn(x, side.size, parts.get(f"{name}_matrix"), transpose=False)
    if side.perm is not None:
        x = torch.empty_like(x).index_copy_(-1, parts[f"{name}_perm"].long(), x)
    return x * parts[f"{name}_scale"] if side.scale is not None else x


def apply(name: str, side: Side | None, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``Uᵀ·Pᵀ·D x``: the transpose of :func:`undo`."""
    if side is None:
        return x
    if side.scale is not None:
        x = x * parts[f"{name}_scale"]
    if side.perm is not None:
        x = x.index_select(-1, parts[f"{name}_perm"])
    return _turn(x, side.size, parts.get(f"{name}_matrix"), transpose=True)


def mix(side: Side, parts: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
    """``U`` of the output side for whole blocks of rows: float [blocks, size, cols]."""
    return _turn(blocks.mT, side.size, parts.get("out_matrix"), transpose=False).mT


def _turn(x: Tensor, size: int, matrix: Tensor | None, transpose: bool) -> Tensor:
    if matrix is not None:
        turn = matrix.to(x.dtype)
        return (x.unflatten(-1, (-1, size)) @ (turn if transpose else turn.mT)).flatten(-2)
    return hadamard(x, size, transpose)


def hadamard(x: Tensor, size: int, transpose: bool = False) -> Tensor:
    """Times the orthonormal block-diagonal Hadamard matrix U, or Uᵀ: two small products, as U = A ⊗ B."""
    if size == 1:
        return x
    left, right = _factors(size, x.dtype, x.device)
    blocks = (left.mT if transpose else left) @ x.reshape(-1, len(left), len(right)) @ right
    return (blocks * (1 / math.sqrt(size))).reshape(x.shape)


@functools.cache
def _factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = (torch.tensor(factor.tolist(), dtype=dtype, device=device) for factor in factors(size))
    return left, right
