"""Rotations of activations and of decoded rows, along the last axis of float32 [..., length], in operators of ONNX."""

from __future__ import annotations

import math

import numpy as np

from qformat.rotation import Side, factors

from .body import Body


def undo(body: Body, name: str, side: Side | None, x: str, length: int) -> str:
    """``D·P·U x`` for the side called ``name``, ``in`` or ``out``; its parts are inputs: ``in_scale``, ``in_perm``."""
    if side is None:
        return x
    x = _turn(body, name, side, x, length, transpose=False)
    if side.perm is not None:
        numbers = body.op("Range", np.int32(0), np.int32(length), np.int32(1))
        inverse = body.op("ScatterElements", numbers, f"{name}_perm", numbers)
        x = body.op("Gather", x, inverse, axis=-1)
    return _scaled(body, name, side, x)


def apply(body: Body, name: str, side: Side | None, x: str, length: int) -> str:
    """``Uᵀ·Pᵀ·D x``: the transpose of :func:`undo`."""
    if side is None:
        return x
    x = _scaled(body, name, side, x)
    if side.perm is not None:
        x = body.op("Gather", x, f"{name}_perm", axis=-1)
    return _turn(body, name, side, x, length, transpose=True)


def _scaled(body: Body, name: str, side: Side, x: str) -> str:
    return body.op("Mul", x, body.widen(f"{name}_scale", side.scale)) if side.scale is not None else x


def _turn(body: Body, name: str, side: Side, x: str, length: int, transpose: bool) -> str:
    if side.matrix is not None:
        matrix = body.widen(f"{name}_matrix", side.matrix)
        turn = matrix if transpose else body.op("Transpose", matrix)
        turned = body.op("MatMul", _blocks(body, x, length // side.size, side.size), turn)
    elif side.size > 1:  # two small products, as U = A ⊗ B
        a, b = factors(side.size)
        left, right = (body.cast(body.constant(factor), "float32") for factor in (a.T if transpose else a, b))
        product = body.op("MatMul", left, _blocks(body, x, length // side.size, len(a), len(b)))
        turned = body.op("Mul", body.op("MatMul", product, right), np.float32(1 / math.sqrt(side.size)))
    else:
        return x
    return body.op("Reshape", turned, body.op("Shape", x))


def _blocks(body: Body, x: str, *shape: int) -> str:
    """[..., length] -> [..., *shape]."""
    return body.op("Reshape", x, body.op("Concat", body.op("Shape", x, end=-1), np.array(shape, np.int64), axis=0))
